"""Every setting of the product, and the only reader of the environment. The defaults are for development."""

from datetime import timedelta
from pathlib import Path

import environ
from django.core.exceptions import ImproperlyConfigured

BASE_DIR = Path(__file__).resolve().parent.parent

env = environ.Env()
env.read_env(BASE_DIR / ".env")  # what is in the environment already wins


def at_least(name: str, *, default: float, minimum: float) -> float:
    """Read a number from the environment; raises ImproperlyConfigured when it is none or too small."""
    value: float = env.float(name, default=default)
    if not value >= minimum:  # also refuses NaN
        raise ImproperlyConfigured(f"{name} is {value:g}; it must be at least {minimum:g}.")
    return value


# --- What kind of installation this is -------------------------------------------------------------------------------

# True shows error pages and allows the development secrets. Never on a machine that others reach.
DEBUG = env.bool("DEBUG", default=True)

_DEVELOPMENT_SECRET = "development only: this value is in the repository, so it protects nothing"  # noqa: S105


def secret(name: str, purpose: str) -> str:
    """Read a secret; outside DEBUG the development value, an empty or a short one stops the start."""
    value: str = env.str(name, default=_DEVELOPMENT_SECRET)
    if not DEBUG and (value == _DEVELOPMENT_SECRET or len(value) < 50):
        raise ImproperlyConfigured(
            f"{name} ({purpose}) must be set to at least 50 random characters when DEBUG is off. Make one with: "
            "python3 -c 'import secrets; print(secrets.token_urlsafe(50))'"
        )
    return value


SECRET_KEY = secret("SECRET_KEY", "signs sessions and access tokens")
# Turns voters into voter keys and signs receipts. It must outlive every open poll: with another one, everybody could vote again.
VOTER_SECRET = secret("VOTER_SECRET", "turns voters into voter keys")

ALLOWED_HOSTS = env.list("ALLOWED_HOSTS", default=["localhost", "127.0.0.1", "[::1]"])
CSRF_TRUSTED_ORIGINS = env.list("CSRF_TRUSTED_ORIGINS", default=[])

# --- Services --------------------------------------------------------------------------------------------------------

DATABASES = {"default": env.db_url("DATABASE_URL", default="postgres://nexus@127.0.0.1:5432/nexus")}
if DATABASES["default"]["ENGINE"] != "django.db.backends.postgresql":
    raise ImproperlyConfigured("DATABASE_URL must start with postgres://: counting relies on PostgreSQL's own statements.")
DATABASES["default"]["OPTIONS"] = {
    "connect_timeout": 2,  # seconds; libpq takes nothing shorter
    # No statement, lock or forgotten transaction may hold the counting of others for long (milliseconds).
    "options": "-c statement_timeout=15000 -c lock_timeout=5000 -c idle_in_transaction_session_timeout=30000",
    **DATABASES["default"].get("OPTIONS", {}),
}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

# Shared throttling and caching only; the pipeline itself never needs it.
CACHES = {"default": env.cache_url("CACHE_URL", default="locmemcache://")}

# Goes before every queue's name, so that several installations can share one broker.
QUEUE_PREFIX = env.str("QUEUE_PREFIX", default="")
VOTES_QUEUE = QUEUE_PREFIX + "votes"
DEAD_LETTER_QUEUE = QUEUE_PREFIX + "votes.dead"
PERIODIC_QUEUE = QUEUE_PREFIX + "periodic"

# --- Taking and counting votes ---------------------------------------------------------------------------------------

# Proxies of our own in front of the web processes. X-Forwarded-For is read that many places from the right; 0 ignores it.
TRUSTED_PROXIES = int(at_least("TRUSTED_PROXIES", default=0, minimum=0))

# Votes that one message carries at most. Chosen: past 200 the cost per vote hardly falls, and a message stays under 64 KiB.
BUNDLE_MAX_VOTES = int(at_least("BUNDLE_MAX_VOTES", default=200, minimum=1))

# How long a bundle may wait for the broker's confirm, and then for the outbox's commit. Together under the 4 s that a client waits at most.
CONFIRM_SECONDS = at_least("CONFIRM_SECONDS", default=2, minimum=0.1)
OUTBOX_SECONDS = at_least("OUTBOX_SECONDS", default=1.2, minimum=0.1)
if CONFIRM_SECONDS + OUTBOX_SECONDS > 3.4:
    raise ImproperlyConfigured("CONFIRM_SECONDS + OUTBOX_SECONDS must stay within 3.4 s: a client gets its answer within 4 s.")

# Votes that one web process holds unanswered at most; more are refused with 503.
MAX_WAITING_VOTES = int(at_least("MAX_WAITING_VOTES", default=5000, minimum=1))

# How old a poll may be in a web process's memory (seconds). An edit is in force everywhere after this time.
POLL_SNAPSHOT_SECONDS = at_least("POLL_SNAPSHOT_SECONDS", default=1, minimum=0)

# How old results may be when they are read (seconds): at most one query per poll, process and this time.
RESULTS_CACHE_SECONDS = at_least("RESULTS_CACHE_SECONDS", default=0.25, minimum=0)

# How long a worker waits for PostgreSQL before it gives a bundle back to the queue (seconds). RabbitMQ closes channels after 30 minutes.
DATABASE_PATIENCE_SECONDS = at_least("DATABASE_PATIENCE_SECONDS", default=600, minimum=1)
if DATABASE_PATIENCE_SECONDS > 840:
    raise ImproperlyConfigured("DATABASE_PATIENCE_SECONDS must stay within 840 s: the task's own limit is 900 s.")

# Outcomes of votes that do not stand are deleted this long after their poll closed.
OUTCOMES_KEEP_DAYS = at_least("OUTCOMES_KEEP_DAYS", default=90, minimum=1)

# --- Celery (the namespace CELERY_ is Celery's own) ------------------------------------------------------------------

CELERY_BROKER_URL = env.str("CELERY_BROKER_URL", default="amqp://guest:guest@127.0.0.1:5672//")
if not CELERY_BROKER_URL.startswith(("amqp://", "amqps://")):
    raise ImproperlyConfigured("CELERY_BROKER_URL must start with amqp:// or amqps://: only RabbitMQ keeps the promise of the 202.")

# A worker acknowledges after the commit; what fails goes to votes.dead; what was interrupted is delivered again.
CELERY_TASK_ACKS_LATE = True
CELERY_TASK_REJECT_ON_WORKER_LOST = True
CELERY_TASK_ACKS_ON_FAILURE = False
CELERY_TASK_ACKS_ON_TIMEOUT = False
CELERY_TASK_IGNORE_RESULT = True
CELERY_TASK_TIME_LIMIT = 900
CELERY_TASK_CREATE_MISSING_QUEUES = False
CELERY_TASK_DEFAULT_QUEUE = PERIODIC_QUEUE
CELERY_ACCEPT_CONTENT = ["json"]
CELERY_TASK_SERIALIZER = "json"

CELERY_BROKER_HEARTBEAT = 20
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
CELERY_BROKER_CONNECTION_MAX_RETRIES = None
CELERY_BROKER_CHANNEL_ERROR_RETRY = True
CELERY_BROKER_POOL_ACQUIRE_TIMEOUT = 2

CELERY_WORKER_CONSUMER = "tasks.consumer:KeepingConsumer"
CELERY_WORKER_PREFETCH_MULTIPLIER = 4
CELERY_WORKER_SOFT_SHUTDOWN_TIMEOUT = 20
CELERY_WORKER_CANCEL_LONG_RUNNING_TASKS_ON_CONNECTION_LOSS = False  # a bundle is short, and counting it twice changes nothing
CELERY_WORKER_DISABLE_RATE_LIMITS = True
CELERY_WORKER_MAX_TASKS_PER_CHILD = 50_000
CELERY_WORKER_HIJACK_ROOT_LOGGER = False
CELERY_WORKER_SEND_TASK_EVENTS = True  # Flower shows each bundle as <37 votes>
CELERY_DB_REUSE_MAX = 10_000  # tasks per database connection; after an error it is dropped at once

CELERY_TIMEZONE = "UTC"
CELERY_BEAT_SCHEDULER = "django_celery_beat.schedulers:DatabaseScheduler"
CELERY_BEAT_MAX_LOOP_INTERVAL = 1
# Intervals only: django-celery-beat can miss crontab runs after a pause. A run that waited longer than `expires` is
# dropped, the next one catches up from the database's state.
CELERY_BEAT_SCHEDULE = {
    "open and close polls": {"task": "polls.open_and_close", "schedule": timedelta(seconds=2), "options": {"expires": 10}},
    "drain the outbox": {"task": "outbox.drain", "schedule": timedelta(seconds=2), "options": {"expires": 10}},
    "purge old outcomes": {"task": "outcomes.purge", "schedule": timedelta(hours=1), "options": {"expires": 3000}},
}

# --- Django ----------------------------------------------------------------------------------------------------------

INSTALLED_APPS = [
    "polls",
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "django_celery_beat",
    "rest_framework",
    "drf_spectacular",
    "drf_spectacular_sidecar",
]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "core.middleware.OptionalSlash",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]
ROOT_URLCONF = "core.urls"
ASGI_APPLICATION = "core.asgi.application"
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": f"django.contrib.auth.password_validation.{name}"}
    for name in ("UserAttributeSimilarityValidator", "MinimumLengthValidator", "CommonPasswordValidator", "NumericPasswordValidator")
]
USE_TZ = True
TIME_ZONE = "UTC"
LANGUAGE_CODE = "en-us"
STATIC_URL = "/static/"
STATIC_ROOT = BASE_DIR / "static"
WHITENOISE_USE_FINDERS = DEBUG
DATA_UPLOAD_MAX_MEMORY_SIZE = 1_000_000  # bytes; polls with 100 long options stay far below

# TLS ends at a proxy of ours; it must set this header itself.
SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https") if TRUSTED_PROXIES else None
SECURE_SSL_REDIRECT = env.bool("SECURE_SSL_REDIRECT", default=not DEBUG)
SECURE_HSTS_SECONDS = int(at_least("SECURE_HSTS_SECONDS", default=0 if DEBUG else 31_536_000, minimum=0))
SECURE_HSTS_INCLUDE_SUBDOMAINS = not DEBUG
SECURE_HSTS_PRELOAD = not DEBUG
SESSION_COOKIE_SECURE = not DEBUG
CSRF_COOKIE_SECURE = not DEBUG

REST_FRAMEWORK = {
    "DEFAULT_AUTHENTICATION_CLASSES": ["rest_framework_simplejwt.authentication.JWTAuthentication"],
    "DEFAULT_PERMISSION_CLASSES": ["rest_framework.permissions.IsAuthenticatedOrReadOnly"],
    "DEFAULT_RENDERER_CLASSES": ["rest_framework.renderers.JSONRenderer"],
    "DEFAULT_PARSER_CLASSES": ["rest_framework.parsers.JSONParser"],
    "DEFAULT_SCHEMA_CLASS": "drf_spectacular.openapi.AutoSchema",
    "EXCEPTION_HANDLER": "polls.api.errors.answer_with_a_problem",
    "UNAUTHENTICATED_USER": "django.contrib.auth.models.AnonymousUser",
}
SIMPLE_JWT = {
    "ACCESS_TOKEN_LIFETIME": timedelta(minutes=15),
    "REFRESH_TOKEN_LIFETIME": timedelta(days=7),
    "UPDATE_LAST_LOGIN": False,
}
SPECTACULAR_SETTINGS = {
    "TITLE": "Nexus",
    "VERSION": "1",
    "OAS_VERSION": "3.1.1",
    "SERVE_INCLUDE_SCHEMA": False,
    "SWAGGER_UI_DIST": "SIDECAR",
    "SWAGGER_UI_FAVICON_HREF": "SIDECAR",
    "REDOC_DIST": "SIDECAR",
    "COMPONENT_SPLIT_REQUEST": True,
    "POSTPROCESSING_HOOKS": [
        "drf_spectacular.hooks.postprocess_schema_enums",
        "polls.api.schema.add_hot_routes",
    ],
}

# One line per event on standard output. No address, voter or choice is ever logged.
LOG_LEVEL = env.str("LOG_LEVEL", default="INFO")
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "{asctime} {levelname:<7} {name}: {message}", "datefmt": "%H:%M:%S", "style": "{"}},
    "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "line"}},
    "root": {"handlers": ["console"], "level": LOG_LEVEL},
    "loggers": {
        "django": {"handlers": [], "propagate": True},
        "django.server": {"handlers": [], "propagate": True},
        # One line per bundle and task would drown the rest, and at full rate cost a tenth of the worker.
        "celery.app.trace": {"level": "WARNING"},
        "celery.worker.strategy": {"level": "WARNING"},
        "aiormq": {"level": "ERROR"},  # polls.publishing says the same once, in a sentence
    },
}
