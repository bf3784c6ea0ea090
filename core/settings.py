"""Every setting of the product, and the only reader of the environment. The defaults are for development."""

import hashlib
import json
import logging
import re
import ssl
from datetime import timedelta
from ipaddress import ip_address, ip_network
from pathlib import Path
from tempfile import gettempdir
from typing import Any
from urllib.parse import urlsplit

import environ
from django.core.exceptions import ImproperlyConfigured

BASE_DIR = Path(__file__).resolve().parent.parent

env = environ.Env()
if (BASE_DIR / ".env").exists():
    env.read_env(BASE_DIR / ".env")  # what is in the environment already wins


# The readers below raise ImproperlyConfigured, with a sentence, where django-environ would guess: to it "1e3" is 13,
# "2 minutes" is 2, and DEBUG=yess is False.


def confidential(name: str, *, default: str) -> str:
    """Read what may hold a secret: from the environment, or from the file that <name>_FILE names there."""
    path: str = env.str(f"{name}_FILE", default="")
    if not path:
        value: str = env.str(name, default=default)
        return value
    if env.str(name, default=""):
        raise ImproperlyConfigured(f"Both {name} and {name}_FILE are set; set one of them.")
    try:
        return Path(path).read_text().strip()  # whoever writes it with an editor or echo adds a line's end
    except (OSError, UnicodeDecodeError) as exc:
        raise ImproperlyConfigured(f"{name}_FILE is {path!r}, and that can't be read ({type(exc).__name__}).") from None


def switch(name: str, *, default: bool) -> bool:
    """Read true or false."""
    text = env.str(name, default=str(default)).strip().lower()
    if text not in ("true", "yes", "on", "1", "false", "no", "off", "0"):
        raise ImproperlyConfigured(f"{name} is {text!r}; it must be true or false.")
    return text in ("true", "yes", "on", "1")


def number(name: str, *, default: float, minimum: float, maximum: float) -> float:
    """Read a number."""
    text = env.str(name, default=str(default))
    try:
        value = float(text)
    except ValueError:
        raise ImproperlyConfigured(f"{name} is {text!r}; it must be a number.") from None
    if not minimum <= value <= maximum:  # also refuses NaN
        raise ImproperlyConfigured(f"{name} is {text}; it must be from {minimum} to {maximum}.")
    return value


def whole(name: str, *, default: int, minimum: int, maximum: int) -> int:
    """Read a whole number."""
    value = number(name, default=default, minimum=minimum, maximum=maximum)
    if value != int(value):
        raise ImproperlyConfigured(f"{name} is {value}; it must be a whole number.")
    return int(value)


def words(name: str, *, default: list[str]) -> list[str]:
    """Read words that commas part; spaces around them are no part of them."""
    return [word.strip() for word in env.list(name, default=default) if word.strip()]


# --- What kind of installation this is -------------------------------------------------------------------------------

# True shows error pages and allows the development secrets. Never on a machine that others reach.
DEBUG = switch("DEBUG", default=True)

_DEVELOPMENT_SECRET = "development only: this value is in the repository, so it protects nothing"  # noqa: S105


def secret(name: str, purpose: str) -> str:
    """Read a secret; outside DEBUG the development value, an empty or a short one stops the start."""
    value = confidential(name, default=_DEVELOPMENT_SECRET)
    if not DEBUG and (value == _DEVELOPMENT_SECRET or len(value) < 50):
        raise ImproperlyConfigured(
            f"{name} ({purpose}) must be set to at least 50 random characters when DEBUG is off. Make one with: "
            "python3 -c 'import secrets; print(secrets.token_urlsafe(50))'"
        )
    return value


SECRET_KEY = secret("SECRET_KEY", "signs sessions and access tokens")
# Turns voters into voter keys and signs receipts. It must outlive every open poll: with another one, everybody could vote again.
VOTER_SECRET = secret("VOTER_SECRET", "turns voters into voter keys")


def earlier(name: str) -> list[str]:
    """Read the secrets that were used before, newest first, parted by commas; outside DEBUG a short one stops the start."""
    values = [value.strip() for value in confidential(name, default="").split(",") if value.strip()]
    if not DEBUG and any(len(value) < 50 for value in values):
        raise ImproperlyConfigured(f"{name} holds a secret of less than 50 characters. Commas part them, newest first.")
    return values


# While a secret is changed, the ones before it (docs/operations.md): tokens and sessions that SECRET_KEY signed stay good, and a poll
# keeps the VOTER_SECRET that it was made with.
SECRET_KEY_FALLBACKS = earlier("SECRET_KEY_FALLBACKS")
VOTER_SECRET_FALLBACKS = earlier("VOTER_SECRET_FALLBACKS")

# The names by which others reach us, and the origins (with their scheme) whose pages may send forms to the admin.
ALLOWED_HOSTS = words("ALLOWED_HOSTS", default=["localhost", "127.0.0.1", "[::1]"])
CSRF_TRUSTED_ORIGINS = words("CSRF_TRUSTED_ORIGINS", default=[])

# The origins whose pages may call the API from a browser, such as https://vote.example.org.
CORS_ALLOWED_ORIGINS = words("CORS_ALLOWED_ORIGINS", default=[])
for _origin in CORS_ALLOWED_ORIGINS:
    if not re.fullmatch(r"https?://[^/*?#\s]+", _origin):
        raise ImproperlyConfigured(f"CORS_ALLOWED_ORIGINS holds {_origin!r}; an origin reads https://host or https://host:port.")

# --- Services --------------------------------------------------------------------------------------------------------


_NOT_NAMED = "nowhere"


def database(name: str, url: str, *, writes: bool) -> dict[str, Any]:
    """Return Django's configuration for the PostgreSQL of this URL. It may name several hosts, which are tried in turn."""
    if url == _NOT_NAMED:
        return {"ENGINE": "core.nowhere", "NAME": _NOT_NAMED}
    try:
        if not url.startswith(("postgres://", "postgresql://")):
            raise ValueError
        config: dict[str, Any] = env.db_url_config(url)
    except ValueError:  # its text may hold the password
        raise ImproperlyConfigured(
            f"{name} must read postgres://user:password@host:port/name: counting relies on PostgreSQL's own statements."
        ) from None
    hosts = urlsplit(url).netloc.rpartition("@")[2].split(",")
    if len(hosts) > 1 and not (
        all(re.fullmatch(r"[^:]+:\d{1,5}", host) for host in hosts) or all(re.fullmatch(r"[^:]+", host) for host in hosts)
    ):
        raise ImproperlyConfigured(f"{name} with several hosts must read postgres://user:password@host:port,host:port/name.")
    wanted = config.get("OPTIONS", {}).get("target_session_attrs")
    if wanted not in (None, "any", "read-write", "read-only", "primary", "standby", "prefer-standby"):
        raise ImproperlyConfigured(f"{name}: PostgreSQL knows no such target_session_attrs; use read-write or prefer-standby.")
    if writes and len(hosts) > 1 and wanted not in ("read-write", "primary"):
        raise ImproperlyConfigured(
            f"{name} names {len(hosts)} hosts: it must end in ?target_session_attrs=read-write, or a standby may be taken for the primary."
        )
    config["OPTIONS"] = {
        "connect_timeout": 2,  # seconds for each host; libpq takes nothing shorter
        # A host that vanishes says no goodbye: whoever waits for its answer gives up after 5 + 3 * 2 s.
        "keepalives_idle": 5,
        "keepalives_interval": 2,
        "keepalives_count": 3,
        "tcp_user_timeout": 10_000,  # milliseconds that what was sent may stay unacknowledged
        # No statement, lock or forgotten transaction may hold the counting of others for long (milliseconds).
        "options": "-c statement_timeout=15000 -c lock_timeout=5000 -c idle_in_transaction_session_timeout=30000",
        **config.get("OPTIONS", {}),
    }
    return config


# Without a name for it there is none, and no broker: servers at the usual ports may be anybody's. manage.py and `python -m core` name
# those that `make up` made (core/installation.py).
_database_url = confidential("DATABASE_URL", default=_NOT_NAMED)
DATABASES = {"default": database("DATABASE_URL", _database_url, writes=True)}
# A standby of the same PostgreSQL, where the results that everybody may see are read; from the primary while it is away or far behind.
if _replica_url := confidential("REPLICA_URL", default=""):
    DATABASES["replica"] = database("REPLICA_URL", _replica_url, writes=False) | {"TEST": {"MIRROR": "default"}}
# The roles that web processes, and that workers and beat log in as, if not as the owner of the tables: `manage.py setup` gives them what
# they need, and nothing more (polls/privileges.py).
WEB_DATABASE_ROLE = env.str("WEB_DATABASE_ROLE", default="")
WORKER_DATABASE_ROLE = env.str("WORKER_DATABASE_ROLE", default="")
for _name, _role in (("WEB_DATABASE_ROLE", WEB_DATABASE_ROLE), ("WORKER_DATABASE_ROLE", WORKER_DATABASE_ROLE)):
    if not re.fullmatch(r"[A-Za-z0-9_-]{0,63}", _role):
        raise ImproperlyConfigured(f"{_name} is {_role!r}; a role's name has letters, digits, _ and -, up to 63.")
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

# Shared throttling and caching only; the pipeline itself never needs it.
try:
    CACHES = {"default": env.cache_url_config(confidential("CACHE_URL", default="locmemcache://") or "nothing://")}
except ImproperlyConfigured:
    raise ImproperlyConfigured("CACHE_URL must read redis://host:port/number, or locmemcache:// for one in each process.") from None

# Goes before every queue's name, so that several installations can share one broker.
QUEUE_PREFIX = env.str("QUEUE_PREFIX", default="")
if not re.fullmatch(r"(?!amq\.)[A-Za-z0-9_.-]{0,100}", QUEUE_PREFIX):
    raise ImproperlyConfigured("QUEUE_PREFIX takes up to 100 letters, digits, dots, - and _; amq. is RabbitMQ's own.")
# They take the votes in turns: in even minutes since 1970, and in odd ones (polls/turns.py).
VOTES_QUEUES = (QUEUE_PREFIX + "votes.even", QUEUE_PREFIX + "votes.odd")
DEAD_LETTER_QUEUE = QUEUE_PREFIX + "votes.dead"
PERIODIC_QUEUE = QUEUE_PREFIX + "periodic"

# Where each web process and worker tells Prometheus its figures; 0: nowhere. Nobody outside may reach it. Processes of one machine that
# have the same one share it.
METRICS_PORT = whole("METRICS_PORT", default=0, minimum=0, maximum=65_535)
METRICS_HOST = env.str("METRICS_HOST", default="127.0.0.1")
try:
    ip_address(METRICS_HOST)
except ValueError:
    raise ImproperlyConfigured(f"METRICS_HOST is {METRICS_HOST!r}; it must be an address of this machine, such as 127.0.0.1.") from None

# --- Taking and counting votes ---------------------------------------------------------------------------------------

# Proxies of our own in front of the web processes. X-Forwarded-For is read that many places from the right; 0 ignores it.
TRUSTED_PROXIES = whole("TRUSTED_PROXIES", default=0, minimum=0, maximum=20)

# Votes that one message carries at most. Chosen: a batch of 1,000 in one message is counted a third faster than in five; one is
# under 100 KiB and counted in 10 ms. Single votes make bundles this large only when more than that many wait at once.
BUNDLE_MAX_VOTES = whole("BUNDLE_MAX_VOTES", default=2000, minimum=1, maximum=10_000)

# A web process's bundle that has room leaves this long after its last one at the earliest (seconds). Chosen: a few busy clients would else
# make hundreds of bundles of one a second, each of which costs the workers as much as 50 votes; and nobody notices 3 ms.
BUNDLE_SECONDS = number("BUNDLE_SECONDS", default=0.003, minimum=0, maximum=0.1)

# How long a bundle may wait for the broker's confirm, and then for the outbox's commit. Together under the 4 s that a client waits at most.
CONFIRM_SECONDS = number("CONFIRM_SECONDS", default=2, minimum=0.1, maximum=3.3)
OUTBOX_SECONDS = number("OUTBOX_SECONDS", default=1.2, minimum=0.1, maximum=3.3)
if round(CONFIRM_SECONDS + OUTBOX_SECONDS, 3) > 3.4:
    raise ImproperlyConfigured("CONFIRM_SECONDS + OUTBOX_SECONDS must stay within 3.4 s: a client gets its answer within 4 s.")

# Votes that one web process holds unanswered at most; more are refused with 503.
MAX_WAITING_VOTES = whole("MAX_WAITING_VOTES", default=20_000, minimum=1, maximum=1_000_000)

# What an address and an API client may send a minute; 0: as much as they like. A batch counts as many votes as it holds. An API
# client's requests don't count against its address.
ADDRESS_REQUESTS_PER_MINUTE = whole("ADDRESS_REQUESTS_PER_MINUTE", default=3000, minimum=0, maximum=1_000_000_000)
CLIENT_VOTES_PER_MINUTE = whole("CLIENT_VOTES_PER_MINUTE", default=3_000_000, minimum=0, maximum=1_000_000_000)
# What an address may try a minute where a guesser could succeed: sign-ins, registrations, password resets, wrong voter codes.
ATTEMPTS_PER_MINUTE = whole("ATTEMPTS_PER_MINUTE", default=60, minimum=0, maximum=1_000_000_000)

# How old polls and blocks may be in a web process's memory (seconds). A change is in force everywhere after twice this time.
POLL_SNAPSHOT_SECONDS = number("POLL_SNAPSHOT_SECONDS", default=1, minimum=0, maximum=60)

# How old results may be when they are read (seconds): at most one query per poll, process and this time.
RESULTS_CACHE_SECONDS = number("RESULTS_CACHE_SECONDS", default=0.25, minimum=0, maximum=60)

# Clients that may follow results (streams) in one web process; more are refused with 503, and a tenth from one address with 429. Each is a
# connection.
FOLLOWERS_MAX = whole("FOLLOWERS_MAX", default=10_000, minimum=0, maximum=1_000_000)

# How long a worker waits for PostgreSQL before it gives a bundle back to the queue (seconds). RabbitMQ closes channels after 30 minutes,
# and CELERY_TASK_TIME_LIMIT ends the task after 15.
DATABASE_PATIENCE_SECONDS = number("DATABASE_PATIENCE_SECONDS", default=600, minimum=1, maximum=840)

# How long after its end every vote of a poll has arrived (seconds): more than CONFIRM_SECONDS + OUTBOX_SECONDS. It is final when figures
# of the broker's, which are up to 15 s old, have shown each queue of votes empty since then.
FINAL_AFTER_SECONDS = number("FINAL_AFTER_SECONDS", default=45, minimum=4, maximum=86_400)

# Outcomes of votes that do not stand are deleted this long after their poll closed.
OUTCOMES_KEEP_DAYS = number("OUTCOMES_KEEP_DAYS", default=90, minimum=1, maximum=36_500)

# Networks whose votes hold no network keys, in every poll, such as 198.51.100.0/24: limits and rules of suspicion leave them alone.
try:
    ALLOWED_NETWORKS = tuple(ip_network(network) for network in words("ALLOWED_NETWORKS", default=[]))
except ValueError as exc:
    raise ImproperlyConfigured(f"ALLOWED_NETWORKS: {exc}. A network reads 198.51.100.0/24 or 2001:db8::/48.") from None

# New polls encrypt addresses with another secret after this many days; a secret is deleted, and with it every address becomes unreadable
# that was encrypted with it, this many days after it was made. So the latter is the longest that an address can be read.
NETWORK_SECRET_ROTATE_DAYS = number("NETWORK_SECRET_ROTATE_DAYS", default=30, minimum=1, maximum=36_500)
NETWORK_SECRET_KEEP_DAYS = number("NETWORK_SECRET_KEEP_DAYS", default=90, minimum=1, maximum=36_500)
if NETWORK_SECRET_KEEP_DAYS <= NETWORK_SECRET_ROTATE_DAYS:
    raise ImproperlyConfigured("NETWORK_SECRET_KEEP_DAYS must be more than NETWORK_SECRET_ROTATE_DAYS: new polls need a secret that stays.")

# Where the rules of suspicion shall not be as they are made (polls/fraud.py): {"one_sided": {"votes": 200}, "regular": {"off": true}}.
try:
    RULES = json.loads(env.str("RULES", default="{}"))
except ValueError:
    raise ImproperlyConfigured('RULES is no JSON. It reads {"one_sided": {"votes": 200}, "regular": {"off": true}}.') from None

# A case that nobody has decided on expires after so many days, unless it keeps votes out.
CASE_OPEN_DAYS = number("CASE_OPEN_DAYS", default=30, minimum=1, maximum=36_500)

# Whether GraphQL tells its schema to whoever asks. Off, misspelt fields get no suggestions either.
GRAPHQL_INTROSPECTION = switch("GRAPHQL_INTROSPECTION", default=DEBUG)

# --- Accounts --------------------------------------------------------------------------------------------------------

# Whether everybody may make an account by the API, and the role that it gets: "owner" (makes polls) or "" (none).
REGISTRATION_OPEN = switch("REGISTRATION_OPEN", default=True)
NEW_ACCOUNT_ROLE = env.str("NEW_ACCOUNT_ROLE", default="owner")
if NEW_ACCOUNT_ROLE not in ("", "owner"):
    raise ImproperlyConfigured(f'NEW_ACCOUNT_ROLE is {NEW_ACCOUNT_ROLE!r}; it must be "owner", or empty for none.')

# How long an access token is good (minutes), and a refresh token that nobody uses (days).
ACCESS_TOKEN_MINUTES = number("ACCESS_TOKEN_MINUTES", default=5, minimum=1, maximum=1440)
REFRESH_TOKEN_DAYS = number("REFRESH_TOKEN_DAYS", default=7, minimum=1, maximum=365)

# How long an API client's old key works beside its new one, where a rotation does not say (hours).
KEY_ROTATION_HOURS = whole("KEY_ROTATION_HOURS", default=24, minimum=0, maximum=720)

# The mail server. On the console a mail is read in the log, with the token in it: for development only. Without DEBUG, no mail is sent
# until this is set.
EMAIL_URL = confidential("EMAIL_URL", default="consolemail://" if DEBUG else "dummymail://")
try:
    _email = env.email_url_config(EMAIL_URL)
    if _email["EMAIL_BACKEND"].endswith("smtp.EmailBackend") and not _email["EMAIL_HOST"]:
        raise ValueError
except (ImproperlyConfigured, ValueError):  # its text may hold the password
    raise ImproperlyConfigured(
        "EMAIL_URL must read smtp+tls://user:password@host:port (or smtp://, smtp+ssl://), or consolemail://, dummymail://, filemail:////folder."
    ) from None
if not DEBUG and EMAIL_URL.startswith("consolemail:"):
    raise ImproperlyConfigured("EMAIL_URL must name a mail server when DEBUG is off: consolemail:// writes secrets to the log.")
EMAIL_BACKEND, EMAIL_FILE_PATH = _email["EMAIL_BACKEND"], _email["EMAIL_FILE_PATH"]
EMAIL_HOST, EMAIL_PORT = _email["EMAIL_HOST"] or "", _email["EMAIL_PORT"] or 25
EMAIL_HOST_USER, EMAIL_HOST_PASSWORD = _email["EMAIL_HOST_USER"] or "", _email["EMAIL_HOST_PASSWORD"] or ""
EMAIL_USE_TLS, EMAIL_USE_SSL = _email.get("EMAIL_USE_TLS", False), _email.get("EMAIL_USE_SSL", False)
EMAIL_TIMEOUT = 5  # seconds, for each of the mail server's answers: the clock's jobs wait behind a mail
DEFAULT_FROM_EMAIL = env.str("DEFAULT_FROM_EMAIL", default="nexus@localhost")

# The page of yours that the mail about a forgotten password links to. Empty: the mail shows both values for the API.
PASSWORD_RESET_URL = env.str("PASSWORD_RESET_URL", default="")
if PASSWORD_RESET_URL and not (
    PASSWORD_RESET_URL.startswith(("http://", "https://")) and "{uid}" in PASSWORD_RESET_URL and "{token}" in PASSWORD_RESET_URL
):
    raise ImproperlyConfigured("PASSWORD_RESET_URL must read https://host/path, with {uid} and {token} in it, or be empty.")
PASSWORD_RESET_TIMEOUT = 3600  # seconds that the token in the mail is good

# --- Celery (the namespace CELERY_ is Celery's own) ------------------------------------------------------------------

_usual_port = 1 if _database_url == _NOT_NAMED else 5672  # nobody listens at port 1
CELERY_BROKER_URL = confidential("CELERY_BROKER_URL", default=f"amqp://guest:guest@127.0.0.1:{_usual_port}//")
try:
    for _url in map(urlsplit, CELERY_BROKER_URL.split(";")):  # several are tried in turn
        if _url.scheme not in ("amqp", "amqps") or _url.port == 0:
            raise ValueError
except ValueError:  # its text may hold the password
    raise ImproperlyConfigured(
        "CELERY_BROKER_URL must read amqp://user:password@host:port/vhost (or amqps://): only RabbitMQ keeps the promise of the 202."
    ) from None
if len({_url.split(":")[0] for _url in CELERY_BROKER_URL.split(";")}) > 1:
    raise ImproperlyConfigured("CELERY_BROKER_URL must read amqps:// for every node, or for none.")


class _NamedAnew(dict[str, Any]):
    """kombu writes the host's name into this, once, and would expect it of the next node, too: whenever it looks, there is none."""

    def __getitem__(self, key: str) -> Any:
        return None if key == "server_hostname" else super().__getitem__(key)


if CELERY_BROKER_URL.startswith("amqps:"):
    # By itself Celery would take a certificate for any host. Who may sign one is OpenSSL's matter: its list, or the file of SSL_CERT_FILE.
    CELERY_BROKER_USE_SSL = _NamedAnew(cert_reqs=ssl.CERT_REQUIRED, server_hostname=None)

# RabbitMQ's management, which knows what workers hold. While it does not answer, no poll becomes final, and Flower shows no queues.
BROKER_API_URL = confidential("BROKER_API_URL", default="http://guest:guest@127.0.0.1:15672/api/")
try:
    for _url in map(urlsplit, BROKER_API_URL.split(";")):  # several are tried in turn
        if _url.scheme not in ("http", "https") or not _url.hostname or _url.port == 0:
            raise ValueError
except ValueError:  # its text may hold the password
    raise ImproperlyConfigured("BROKER_API_URL must read http://user:password@host:15672/api/ (or https://).") from None

# Flower's login, user:password. It does not start without.
FLOWER_BASIC_AUTH = confidential("FLOWER_BASIC_AUTH", default="")

# A worker acknowledges after the commit; what fails goes to votes.dead; what was interrupted is delivered again.
CELERY_TASK_ACKS_LATE = True
CELERY_TASK_REJECT_ON_WORKER_LOST = True
CELERY_TASK_ACKS_ON_FAILURE = False
CELERY_TASK_ACKS_ON_TIMEOUT = False
CELERY_TASK_IGNORE_RESULT = True
CELERY_TASK_TIME_LIMIT = 900
CELERY_TASK_CREATE_MISSING_QUEUES = False
CELERY_TASK_DEFAULT_QUEUE = PERIODIC_QUEUE
CELERY_TASK_DEFAULT_EXCHANGE = ""  # RabbitMQ's own; else everybody who publishes would need the right to make one
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
CELERY_WORKER_SEND_TASK_EVENTS = True  # Flower shows a bundle as <37 votes>; tasks/events.py says how many it is told of
CELERY_DB_REUSE_MAX = 10_000  # tasks per database connection; after an error it is dropped at once

CELERY_TIMEZONE = "UTC"
CELERY_BEAT_SCHEDULER = "tasks.clock:NotingScheduler"
CELERY_BEAT_MAX_LOOP_INTERVAL = 1
# A run that no worker has taken for so long is dropped by the broker, by its clock alone (tasks/clock.py); the next one catches up from the
# database's state. The same for all, since a queue drops what is at its head: behind a message that stays, all others would, too.
JOB_WAITS_SECONDS = 20
_DROPPED = {"expire_seconds": JOB_WAITS_SECONDS}
# Intervals only: django-celery-beat can miss crontab runs after a pause.
CELERY_BEAT_SCHEDULE = {
    "open and close polls": {"task": "polls.open_and_close", "schedule": timedelta(seconds=2), "options": _DROPPED},
    "finalise polls": {"task": "polls.finalise", "schedule": timedelta(seconds=5), "options": _DROPPED},
    "look after what changed in tallies": {"task": "integrity.check_soon", "schedule": timedelta(seconds=30), "options": _DROPPED},
    "count all votes anew": {"task": "integrity.check", "schedule": timedelta(hours=1), "options": _DROPPED},
    "drain the outbox": {"task": "outbox.drain", "schedule": timedelta(seconds=2), "options": _DROPPED},
    "purge expired tokens": {"task": "tokens.purge", "schedule": timedelta(days=1), "options": _DROPPED},
    "renew network secrets": {"task": "networks.renew", "schedule": timedelta(hours=1), "options": _DROPPED},
    "find suspicious networks in what is new": {"task": "fraud.find_fast", "schedule": timedelta(minutes=1), "options": _DROPPED},
    "find suspicious networks": {"task": "fraud.find", "schedule": timedelta(hours=1), "options": _DROPPED},
    "expire cases": {"task": "cases.expire", "schedule": timedelta(days=1), "options": _DROPPED},
    "settle rulings that were interrupted": {"task": "review.settle", "schedule": timedelta(seconds=10), "options": _DROPPED},
    "purge old outcomes": {"task": "outcomes.purge", "schedule": timedelta(hours=1), "options": _DROPPED},
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
    "django_filters",
    "rest_framework_simplejwt.token_blacklist",
    "drf_spectacular",
    "drf_spectacular_sidecar",
]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "core.middleware.PagePolicies",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "core.middleware.Manners",
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
SECURE_SSL_REDIRECT = switch("SECURE_SSL_REDIRECT", default=not DEBUG)
SECURE_HSTS_SECONDS = whole("SECURE_HSTS_SECONDS", default=0 if DEBUG else 31_536_000, minimum=0, maximum=315_360_000)
SECURE_HSTS_INCLUDE_SUBDOMAINS = not DEBUG
SECURE_HSTS_PRELOAD = not DEBUG
# What a page tells on the next one, such as a new API key, goes by the session, never by a cookie.
MESSAGE_STORAGE = "django.contrib.messages.storage.session.SessionStorage"
SESSION_COOKIE_SECURE = not DEBUG
CSRF_COOKIE_SECURE = not DEBUG

# What pages may load, and from where: files of ours, and nothing that stands inside a page. As Django 6 reads it.
SECURE_CSP = {
    "default-src": ["'none'"],
    "script-src": ["'self'"],
    "style-src": ["'self'"],
    "img-src": ["'self'", "data:"],  # icons in the styles of Swagger UI and the admin
    "font-src": ["'self'"],
    "connect-src": ["'self'"],
    "form-action": ["'self'"],
    "base-uri": ["'none'"],
    "frame-ancestors": ["'none'"],
}

REST_FRAMEWORK = {
    "DEFAULT_AUTHENTICATION_CLASSES": [
        "rest_framework_simplejwt.authentication.JWTAuthentication",
        "polls.api.authentication.ApiKeyAuthentication",
    ],
    "DEFAULT_PERMISSION_CLASSES": ["rest_framework.permissions.IsAuthenticatedOrReadOnly"],
    "DEFAULT_RENDERER_CLASSES": ["rest_framework.renderers.JSONRenderer"],
    "DEFAULT_PARSER_CLASSES": ["rest_framework.parsers.JSONParser"],
    "DEFAULT_SCHEMA_CLASS": "drf_spectacular.openapi.AutoSchema",
    "EXCEPTION_HANDLER": "polls.api.errors.answer_with_a_problem",
    "UNAUTHENTICATED_USER": "django.contrib.auth.models.AnonymousUser",
}
SIMPLE_JWT = {
    "ACCESS_TOKEN_LIFETIME": timedelta(minutes=ACCESS_TOKEN_MINUTES),
    "REFRESH_TOKEN_LIFETIME": timedelta(days=REFRESH_TOKEN_DAYS),
    "ROTATE_REFRESH_TOKENS": True,
    "BLACKLIST_AFTER_ROTATION": True,
    "CHECK_REVOKE_TOKEN": True,  # another password ends every token
    "AUTH_TOKEN_CLASSES": ("polls.accounts.AccessToken",),
    "UPDATE_LAST_LOGIN": False,
}
SPECTACULAR_SETTINGS = {
    "TITLE": "Nexus",
    "DESCRIPTION": (
        "Cast a vote, and read what became of it and of the poll. A `202` is a promise: the vote can't be lost, and counts "
        "exactly once.\n\nEvery refusal is `application/problem+json` (RFC 9457) with a stable `type`. "
        "Moments are UTC; ids are strings; paths work with and without a slash at the end."
    ),
    "TAGS": [
        {"name": "votes", "description": "Cast votes, one or many; withdraw one; read receipts."},
        {"name": "results", "description": "The tallies of a poll."},
        {"name": "polls", "description": "Make and change polls."},
        {"name": "codes", "description": "Voter codes, for polls whose voter_policy is `code`."},
        {"name": "auth", "description": "Accounts: sign up, in and out; passwords."},
        {"name": "clients", "description": "Programs that act for you, and their keys."},
        {"name": "cases", "description": "Suspicious addresses, rulings on votes, blocks, rules. For operators; auditors read."},
        {"name": "operations", "description": "Queues and dead letters, for operators."},
    ],
    "VERSION": "1",
    "OAS_VERSION": "3.1.1",
    "SERVE_INCLUDE_SCHEMA": False,
    "SERVE_AUTHENTICATION": [],  # whoever's token has expired may read, too
    "SWAGGER_UI_DIST": "SIDECAR",
    "SWAGGER_UI_FAVICON_HREF": "SIDECAR",
    "SWAGGER_UI_SETTINGS": {"deepLinking": True, "validatorUrl": "none", "displayRequestDuration": True},
    "REDOC_DIST": "SIDECAR",
    "COMPONENT_SPLIT_REQUEST": True,
    "ENUM_NAME_OVERRIDES": {  # of fields that are called alike
        "StateEnum": "polls.codes.State",
        "CaseStateEnum": "polls.models.CaseState",
        "RulingEnum": "polls.models.Ruling",
    },
    "POSTPROCESSING_HOOKS": [
        "drf_spectacular.hooks.postprocess_schema_enums",
        "polls.api.schema.complete",
    ],
}

# What the files of this installation are called where those of others may be, too: whoever has the same database and queues is of it.
_place = {name: DATABASES["default"].get(name, "") for name in ("HOST", "PORT", "NAME")}
_place["PORT"], _place["QUEUE_PREFIX"] = str(_place["PORT"] or 5432), QUEUE_PREFIX
INSTALLATION = hashlib.sha256(json.dumps(_place).encode()).hexdigest()[:12]

# Where workers and beat note that they live, for `manage.py alive`. A file each, so it must be writable where all else is read-only. By
# default a folder of this installation's own, made by whoever notes first.
_liveness_folder = env.str("LIVENESS_FOLDER", default="")
LIVENESS_FOLDER = Path(_liveness_folder or f"{gettempdir()}/nexus-{INSTALLATION}")
if _liveness_folder and not LIVENESS_FOLDER.is_dir():
    raise ImproperlyConfigured(f"LIVENESS_FOLDER is {LIVENESS_FOLDER}; it must be a folder that exists.")

# --- Log and error tracking ------------------------------------------------------------------------------------------

# One line per event, on standard error: "text" for people, "json" for machines. No address, voter or choice is ever in it: without
# DEBUG, exceptions are told by class and place, for their texts may quote a row.
LOG_FORMAT = env.str("LOG_FORMAT", default="text" if DEBUG else "json")
if LOG_FORMAT not in ("text", "json"):
    raise ImproperlyConfigured(f"LOG_FORMAT is {LOG_FORMAT!r}; it must be text or json.")
LOG_LEVEL = env.str("LOG_LEVEL", default="INFO").upper()
if LOG_LEVEL not in logging.getLevelNamesMapping():
    raise ImproperlyConfigured(f"LOG_LEVEL is {LOG_LEVEL!r}; it must be DEBUG, INFO, WARNING, ERROR or CRITICAL.")
# What these say at DEBUG holds SQL with its values, whole messages, and what clients sent.
_talkative = ("django", "amqp", "kombu", "celery", "urllib3", "asyncio", "uvicorn", "tornado")
_calm = "INFO" if LOG_LEVEL in ("DEBUG", "NOTSET") else LOG_LEVEL
_NOWHERE = {"level": "CRITICAL", "handlers": ["nowhere"], "propagate": False}
LOGGING_CONFIG = "core.logs.configure"
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"text": {"()": "core.logs.Text", "texts": DEBUG}, "json": {"()": "core.logs.Json", "texts": DEBUG}},
    "handlers": {"console": {"class": "logging.StreamHandler", "formatter": LOG_FORMAT}, "nowhere": {"class": "logging.NullHandler"}},
    "root": {"handlers": ["console"], "level": LOG_LEVEL},
    "loggers": {
        **{name: {"level": _calm, "handlers": [], "propagate": True} for name in _talkative},
        "django.server": {"handlers": [], "propagate": True},
        # Only what went wrong on our side: any robot can ask for pages that are none, and its words would be in the log.
        "django.request": {"level": "ERROR"},
        "django.security.DisallowedHost": _NOWHERE,
        # They would tell addresses. Without any handler, not even one that does nothing, uvicorn does not compose them.
        "uvicorn.access": {"level": "CRITICAL", "handlers": [], "propagate": False},
        "tornado.access": _NOWHERE,
        # One line per bundle is enough (tasks/votes.py); theirs cost a tenth of the worker at full rate.
        "celery.app.trace": {"level": "WARNING"},
        "celery.worker.strategy": {"level": "WARNING"},
        "aiormq": {"level": "CRITICAL"},  # polls.publishing says the same once, in a sentence; its own may quote a message
    },
}

# Where unhandled errors are reported (Sentry, or what speaks its language): https://key@host/number. Empty: nowhere.
SENTRY_DSN = confidential("SENTRY_DSN", default="")
if SENTRY_DSN:
    from core import errors  # only then: the library takes its time, and memory

    try:
        errors.report_to(SENTRY_DSN, "development" if DEBUG else "production")
    except ValueError:  # its text may hold the key
        raise ImproperlyConfigured("SENTRY_DSN must read https://key@host/number, or be empty.") from None
