"""The settings: a wrong value stops the start with a sentence that names it, and .env.example tells of each."""

import os
import re
import runpy
import secrets
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import environ
import pytest
from django.core.exceptions import ImproperlyConfigured

from stack.stack import OWN
from tests.conftest import ROOT

PRODUCTION = {
    "DEBUG": "false",
    "SECRET_KEY": secrets.token_urlsafe(50),
    "VOTER_SECRET": secrets.token_urlsafe(50),
    "ALLOWED_HOSTS": "vote.example.org",
    "DATABASE_URL": "postgres://nexus:secret@db.example.org:5432/nexus",
    "CELERY_BROKER_URL": "amqps://nexus:secret@mq.example.org:5671//",
}
WHOLE_NUMBERS = [
    "KEY_ROTATION_HOURS",
    "TRUSTED_PROXIES",
    "ADDRESS_REQUESTS_PER_MINUTE",
    "CLIENT_VOTES_PER_MINUTE",
    "ATTEMPTS_PER_MINUTE",
    "BUNDLE_MAX_VOTES",
    "MAX_WAITING_VOTES",
    "FOLLOWERS_MAX",
    "METRICS_PORT",
    "SECURE_HSTS_SECONDS",
]
NUMBERS = [
    *WHOLE_NUMBERS,
    "BUNDLE_SECONDS",
    "CONFIRM_SECONDS",
    "OUTBOX_SECONDS",
    "POLL_SNAPSHOT_SECONDS",
    "RESULTS_CACHE_SECONDS",
    "DATABASE_PATIENCE_SECONDS",
    "FINAL_AFTER_SECONDS",
    "OUTCOMES_KEEP_DAYS",
    "CASE_OPEN_DAYS",
    "ACCESS_TOKEN_MINUTES",
    "REFRESH_TOKEN_DAYS",
    "NETWORK_SECRET_ROTATE_DAYS",
    "NETWORK_SECRET_KEEP_DAYS",
]


@pytest.fixture(autouse=True)
def _no_env_file(monkeypatch):
    """A developer's .env is no part of the tests."""
    monkeypatch.setattr(environ.Env, "read_env", lambda *_: None)


@pytest.fixture
def load(monkeypatch):
    def load(**environment):
        """Run core/settings.py with this environment and nothing else; return what it sets."""
        monkeypatch.setattr(environ.Env, "ENVIRON", environment)
        return runpy.run_path(str(ROOT / "core/settings.py"))

    return load


def settings_read():
    """The names that core/settings.py reads, by its source."""
    source = (ROOT / "core/settings.py").read_text()
    return re.findall(r'(?:env\.\w+|switch|number|whole|words|secret|earlier|confidential)\(\s*"(\w+)"', source)


# --- Wrong values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("text", ["", "many", "2 s", "-1", "nan", "inf", "-inf", "1e300", "1,5", "0x10"])
def test_a_number_that_is_none_or_far_too_small_or_large(load, name, text):
    with pytest.raises(ImproperlyConfigured, match=rf"^{name} is .*; it must be (a number|from \S+ to \S+)\.$"):
        load(**{name: text})


@pytest.mark.parametrize("name", WHOLE_NUMBERS)
def test_half_of_what_is_counted_in_wholes(load, name):
    with pytest.raises(ImproperlyConfigured, match=rf"^{name} is 2\.5; it must be a whole number\.$"):
        load(**{name: "2.5"})


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("TRUSTED_PROXIES", 0, 20),
        ("BUNDLE_MAX_VOTES", 1, 10_000),
        ("BUNDLE_SECONDS", 0, 0.1),
        ("MAX_WAITING_VOTES", 1, 1_000_000),
        ("METRICS_PORT", 0, 65_535),
        ("POLL_SNAPSHOT_SECONDS", 0, 60),
        ("RESULTS_CACHE_SECONDS", 0, 60),
        ("DATABASE_PATIENCE_SECONDS", 1, 840),
        ("FINAL_AFTER_SECONDS", 4, 86_400),
        ("OUTCOMES_KEEP_DAYS", 1, 36_500),
        ("ACCESS_TOKEN_MINUTES", 1, 1440),
        ("REFRESH_TOKEN_DAYS", 1, 365),
        ("KEY_ROTATION_HOURS", 0, 720),
    ],
)
def test_a_number_at_its_limits_and_just_past_them(load, name, least, most):
    assert [load(**{name: str(value)})[name] for value in (least, most)] == [least, most]
    for past in (least - 0.001, most + 0.001):
        with pytest.raises(ImproperlyConfigured, match=rf"^{name} is "):
            load(**{name: str(past)})


def test_two_waits_that_together_keep_a_client_waiting(load):
    assert load(CONFIRM_SECONDS="2.2", OUTBOX_SECONDS="1.2")["CONFIRM_SECONDS"] == 2.2
    with pytest.raises(ImproperlyConfigured, match=r"CONFIRM_SECONDS \+ OUTBOX_SECONDS must stay within 3\.4 s"):
        load(CONFIRM_SECONDS="2.3", OUTBOX_SECONDS="1.2")


def test_a_secret_that_is_deleted_while_new_polls_get_it(load):
    for rotate, keep in (("1", "1.5"), ("7", "7.5"), ("36499", "36500")):
        read = load(NETWORK_SECRET_ROTATE_DAYS=rotate, NETWORK_SECRET_KEEP_DAYS=keep)
        assert read["NETWORK_SECRET_KEEP_DAYS"] == float(keep)
    for rotate, keep in (("7", "7"), ("7", "6"), ("36500", "36500")):
        with pytest.raises(ImproperlyConfigured, match=r"^NETWORK_SECRET_KEEP_DAYS must be more than NETWORK_SECRET_ROTATE_DAYS"):
            load(NETWORK_SECRET_ROTATE_DAYS=rotate, NETWORK_SECRET_KEEP_DAYS=keep)
    for name in ("NETWORK_SECRET_ROTATE_DAYS", "NETWORK_SECRET_KEEP_DAYS"):
        for past in ("0.999", "36500.001"):
            with pytest.raises(ImproperlyConfigured, match=rf"^{name} is "):
                load(**{name: past})


@pytest.mark.parametrize("text", ["campus", "198.51.100.0/33", "198.51.100.7/24", "192.0.2.0/24;198.51.100.0/24", "::g/64"])
def test_a_network_that_is_none(load, text):
    read = load(ALLOWED_NETWORKS="192.0.2.7, 198.51.100.0/24,2001:db8::/48")["ALLOWED_NETWORKS"]
    assert [str(network) for network in read] == ["192.0.2.7/32", "198.51.100.0/24", "2001:db8::/48"]
    with pytest.raises(ImproperlyConfigured, match=r"^ALLOWED_NETWORKS: .*\. A network reads 198\.51\.100\.0/24 or 2001:db8::/48\.$"):
        load(ALLOWED_NETWORKS=f"192.0.2.0/24,{text}")


@pytest.mark.parametrize("text", ["", "regular", "{", "{'regular': {}}"])
def test_rules_that_are_no_json(load, text):
    assert load(RULES='{"regular": {"off": true}}')["RULES"] == {"regular": {"off": True}}
    with pytest.raises(ImproperlyConfigured, match=r"^RULES is no JSON\. It reads "):
        load(RULES=text)


@pytest.mark.parametrize(
    ("text", "field"), [("[]", "RULES"), ('{"busy": {}}', "RULES/busy"), ('{"regular": {"votes": "x"}}', "RULES/regular/votes")]
)
def test_rules_that_there_are_not_stop_the_start(text, field):
    command = [sys.executable, "manage.py", "check"]
    ended = subprocess.run(command, cwd=ROOT, env={**os.environ, "RULES": text}, capture_output=True, text=True, timeout=60)

    assert ended.returncode == 1
    assert f"ImproperlyConfigured: {field}: " in ended.stderr


@pytest.mark.parametrize("name", ["DEBUG", "SECURE_SSL_REDIRECT", "REGISTRATION_OPEN", "GRAPHQL_INTROSPECTION"])
@pytest.mark.parametrize("text", ["", "yess", "2", "none"])
def test_a_switch_that_is_neither_on_nor_off(load, name, text):
    with pytest.raises(ImproperlyConfigured, match=rf"^{name} is '{text}'; it must be true or false\.$"):
        load(**{name: text})


@pytest.mark.parametrize("name", ["SECRET_KEY_FALLBACKS", "VOTER_SECRET_FALLBACKS"])
def test_without_debug_a_secret_of_before_that_is_too_short(load, name):
    assert load(**PRODUCTION, **{name: f"{'x' * 50}, {'y' * 50} ,"})[name] == ["x" * 50, "y" * 50]
    with pytest.raises(ImproperlyConfigured, match=f"^{name} holds a secret of less than 50 characters"):
        load(**PRODUCTION, **{name: f"{'x' * 50},short"})


@pytest.mark.parametrize("name", ["SECRET_KEY", "VOTER_SECRET"])
def test_without_debug_a_secret_that_protects_nothing(load, name):
    public = load(DEBUG="true")[name]
    others = {key: value for key, value in PRODUCTION.items() if key != name}
    for environment in (others, {**others, name: ""}, {**others, name: "x" * 49}, {**others, name: public}):
        with pytest.raises(ImproperlyConfigured, match=rf"^{name} \(.*\) must be set to at least 50 random characters when DEBUG is off"):
            load(**environment)
    assert load(**others, **{name: "x" * 50})[name] == "x" * 50


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *[("DATABASE_URL", text) for text in ("", "terces", "sqlite:///nexus.db", "mysql://nexus:terces@db/nexus", "://")],
        ("DATABASE_URL", "postgres://nexus:terces/@db/nexus"),
        ("DATABASE_URL", "postgres://nexus@db:terces/nexus"),
        *[("REPLICA_URL", text) for text in ("terces", "mysql://nexus:terces@db/nexus", "postgres://nexus@db:terces/nexus")],
        *[("CELERY_BROKER_URL", text) for text in ("", "terces", "redis://:terces@cache:6379/0", "memory://", "://")],
        ("CELERY_BROKER_URL", "amqp://nexus:terces/@mq//"),
        ("CELERY_BROKER_URL", "amqp://nexus@mq:terces//"),
        ("CELERY_BROKER_URL", "amqp://mq//;redis://:terces@cache"),
        *[("BROKER_API_URL", text) for text in ("", "terces", "amqp://nexus:terces@mq:15672/api/", "http:///api/terces", "://")],
        ("BROKER_API_URL", "http://nexus:terces/@mq:15672/api/"),
        ("BROKER_API_URL", "http://nexus@mq:terces/api/"),
        ("BROKER_API_URL", "http://mq:15672/api/;amqp://:terces@mq"),
        *[("CACHE_URL", text) for text in ("", "terces", "terces://cache")],
        *[("EMAIL_URL", text) for text in ("", "terces", "terces://mail", "smtp+tls://")],
        ("EMAIL_URL", "smtp://nexus@mail:terces"),
        ("EMAIL_URL", "smtp://nexus:terces/@mail"),
    ],
)
def test_an_address_of_no_such_server_is_told_without_its_password(load, name, text):
    with pytest.raises(ImproperlyConfigured, match=rf"^{name} must read [\w+]+://") as refused:
        load(**{name: text})
    assert "terces" not in str(refused.value)
    assert refused.value.__suppress_context__


def test_several_brokers_are_tried_in_turn(load):
    urls = "amqp://nexus:secret@mq1:5672//;amqp://nexus:secret@mq2//"
    assert load(CELERY_BROKER_URL=urls)["CELERY_BROKER_URL"] == urls
    apis = "http://nexus:secret@mq1:15672/api/;https://nexus:secret@mq2/api/"
    assert load(BROKER_API_URL=apis)["BROKER_API_URL"] == apis


@pytest.mark.parametrize("text", ["a b", "amq.", "ä", "x" * 101, "a/"])
def test_a_prefix_that_no_queue_may_have(load, text):
    with pytest.raises(ImproperlyConfigured, match=r"^QUEUE_PREFIX takes "):
        load(QUEUE_PREFIX=text)


@pytest.mark.parametrize("text", ["admin", "Owner", "owner,admin", " ", "none"])
def test_a_role_that_no_new_account_may_have(load, text):
    assert [load(NEW_ACCOUNT_ROLE=role)["NEW_ACCOUNT_ROLE"] for role in ("", "owner")] == ["", "owner"]
    with pytest.raises(ImproperlyConfigured, match=r"^NEW_ACCOUNT_ROLE is .*; it must be \"owner\", or empty for none\.$"):
        load(NEW_ACCOUNT_ROLE=text)


def test_a_mail_server_with_its_login_and_tls(load):
    read = load(EMAIL_URL="smtp+tls://nexus:pass%2Fword@mail.example.org:587")
    assert (read["EMAIL_HOST"], read["EMAIL_PORT"], read["EMAIL_USE_TLS"]) == ("mail.example.org", 587, True)
    assert (read["EMAIL_HOST_USER"], read["EMAIL_HOST_PASSWORD"]) == ("nexus", "pass/word")


def test_no_mail_is_written_to_the_log_of_a_production_installation(load):
    assert load(**PRODUCTION)["EMAIL_BACKEND"].endswith("dummy.EmailBackend")
    with pytest.raises(ImproperlyConfigured, match=r"^EMAIL_URL must name a mail server when DEBUG is off"):
        load(**PRODUCTION, EMAIL_URL="consolemail://")


@pytest.mark.parametrize("text", ["example.org/{uid}/{token}", "https://vote.example.org/{uid}", "javascript:{uid}{token}", "{uid}{token}"])
def test_a_page_for_passwords_that_no_mail_can_link_to(load, text):
    page = "https://vote.example.org/password?uid={uid}&token={token}"
    assert load(PASSWORD_RESET_URL=page)["PASSWORD_RESET_URL"] == page
    with pytest.raises(ImproperlyConfigured, match=r"^PASSWORD_RESET_URL must read https://host/path, with \{uid\} and \{token\}"):
        load(PASSWORD_RESET_URL=text)


def test_a_log_level_that_is_none(load):
    assert load(LOG_LEVEL="debug")["LOG_LEVEL"] == "DEBUG"
    with pytest.raises(ImproperlyConfigured, match=r"^LOG_LEVEL is 'LOUD'; it must be DEBUG, "):
        load(LOG_LEVEL="loud")


def test_a_log_format_that_is_none(load):
    assert [load()["LOG_FORMAT"], load(**PRODUCTION)["LOG_FORMAT"]] == ["text", "json"]
    with pytest.raises(ImproperlyConfigured, match=r"^LOG_FORMAT is 'xml'; it must be text or json\.$"):
        load(LOG_FORMAT="xml")


@pytest.mark.parametrize("text", ["terces", "https://sentry.example.org/1", "https://terces@sentry.example.org/", "ftp://terces@host/1"])
def test_an_address_for_errors_that_is_none_is_told_without_its_key(load, text):
    with pytest.raises(ImproperlyConfigured, match=r"^SENTRY_DSN must read https://key@host/number, or be empty\.$") as refused:
        load(SENTRY_DSN=text)
    assert refused.value.__suppress_context__


def test_a_folder_for_liveness_that_is_none(load, tmp_path):
    assert load(LIVENESS_FOLDER=str(tmp_path))["LIVENESS_FOLDER"] == tmp_path
    with pytest.raises(ImproperlyConfigured, match=r"^LIVENESS_FOLDER is .*away; it must be a folder that exists\.$"):
        load(LIVENESS_FOLDER=str(tmp_path / "away"))


@pytest.mark.parametrize("name", ["DATABASE_URL", "REPLICA_URL"])
def test_several_hosts_of_which_one_can_be_none(load, name):
    for hosts in ("a,", "a:1,b", "a:1,b:terces", "a:1,b:2:3", "[::1]:1,[::1]:2"):
        with pytest.raises(ImproperlyConfigured, match=rf"^{name} (with several hosts )?must read postgres://") as refused:
            load(**{name: f"postgres://nexus:terces@{hosts}/nexus?target_session_attrs=read-write"})
        assert "terces" not in str(refused.value)


def test_several_hosts_of_which_any_could_be_written_to(load):
    two = "postgres://nexus@a:5432,b:5433/nexus"
    for attributes in ("", "?target_session_attrs=any", "?target_session_attrs=prefer-standby"):
        with pytest.raises(ImproperlyConfigured, match=r"^DATABASE_URL names 2 hosts: it must end in \?target_session_attrs=read-write"):
            load(DATABASE_URL=two + attributes)
    with pytest.raises(ImproperlyConfigured, match=r"^REPLICA_URL: PostgreSQL knows no such target_session_attrs"):
        load(REPLICA_URL=f"{two}?target_session_attrs=fastest")

    primary, standby = f"{two}?target_session_attrs=read-write", f"{two}?target_session_attrs=prefer-standby"
    both = load(DATABASE_URL=primary, REPLICA_URL=standby)["DATABASES"]

    assert {alias: (at["HOST"], at["PORT"], at["OPTIONS"]["target_session_attrs"]) for alias, at in both.items()} == {
        "default": ("a,b", "5432,5433", "read-write"),
        "replica": ("a,b", "5432,5433", "prefer-standby"),
    }
    assert both["replica"]["OPTIONS"]["connect_timeout"] == 2
    assert list(load(DATABASE_URL="postgres://nexus@a/nexus")["DATABASES"]) == ["default"]


@pytest.mark.parametrize(
    "origin", ["vote.example.org", "*", "https://*.example.org", "https://vote.example.org/", "ftp://vote.example.org"]
)
def test_an_origin_that_is_none(load, origin):
    with pytest.raises(ImproperlyConfigured, match="an origin reads https://host"):
        load(CORS_ALLOWED_ORIGINS=f"https://vote.example.org,{origin}")


@pytest.mark.parametrize("text", ["", "localhost", "127.0.0.1:9100", "*", "127.0.0.256"])
def test_an_address_to_listen_on_that_is_none(load, text):
    assert load(METRICS_HOST="::")["METRICS_HOST"] == "::"
    with pytest.raises(ImproperlyConfigured, match=r"^METRICS_HOST is '.*'; it must be an address of this machine"):
        load(METRICS_HOST=text)


def test_every_setting_but_free_text_was_given_a_wrong_value():
    tried = {*NUMBERS, "DEBUG", "SECURE_SSL_REDIRECT", "SECRET_KEY", "VOTER_SECRET", "DATABASE_URL", "CELERY_BROKER_URL", "BROKER_API_URL"}
    tried |= {"REGISTRATION_OPEN", "GRAPHQL_INTROSPECTION", "NEW_ACCOUNT_ROLE", "EMAIL_URL", "PASSWORD_RESET_URL", "CORS_ALLOWED_ORIGINS"}
    tried |= {"SECRET_KEY_FALLBACKS", "VOTER_SECRET_FALLBACKS", "ALLOWED_NETWORKS", "RULES", "CACHE_URL", "REPLICA_URL", "METRICS_HOST"}
    free = {"ALLOWED_HOSTS", "CSRF_TRUSTED_ORIGINS", "DEFAULT_FROM_EMAIL"}  # Django's own checks look at them
    free |= {"FLOWER_BASIC_AUTH", "WEB_DATABASE_ROLE", "WORKER_DATABASE_ROLE"}  # test_flower.py, test_security.py
    assert set(settings_read()) == tried | free | {"QUEUE_PREFIX", "LOG_LEVEL", "LOG_FORMAT", "SENTRY_DSN", "LIVENESS_FOLDER"}


def test_spaces_in_a_list_are_no_part_of_the_names(load):
    assert load(ALLOWED_HOSTS=" vote.example.org , ,localhost")["ALLOWED_HOSTS"] == ["vote.example.org", "localhost"]


# --- The start --------------------------------------------------------------------------------------------------------


def run(*command, **environment):
    """A command of the product with this environment; DEBUG and its like do not come in from around the tests."""
    around = {name: value for name, value in os.environ.items() if name not in (*settings_read(), "DJANGO_SETTINGS_MODULE")}
    command = [sys.executable, *command]
    return subprocess.run(command, cwd=ROOT, env=around | environment, capture_output=True, text=True, timeout=60)


def test_every_process_refuses_to_start_and_a_production_installation_passes_the_checks():
    """One test, because the commands run at once."""
    bad = {**PRODUCTION, "VOTER_SECRET": "short"}
    starts = {
        "setup": (["manage.py", "setup"], bad),
        "web": (["-m", "core", "web", "--port", "0"], bad),
        "worker": (["-m", "celery", "-A", "core", "worker"], bad),
        "beat": (["-m", "celery", "-A", "core", "beat", "--pidfile="], bad),
        "check": (["manage.py", "check", "--deploy", "--fail-level", "WARNING"], PRODUCTION),
    }
    with ThreadPoolExecutor(4) as pool:
        ended = dict(zip(starts, pool.map(lambda start: run(*start[0], **start[1]), starts.values()), strict=True))

    for name in ("setup", "web", "worker", "beat"):
        assert ended[name].returncode != 0
        assert "VOTER_SECRET (turns voters into voter keys) must be set to at least 50 random characters" in ended[name].stderr, name
    assert (ended["check"].returncode, ended["check"].stdout) == (0, "System check identified no issues (0 silenced).\n"), ended["check"]


# --- .env.example -----------------------------------------------------------------------------------------------------


def example():
    """{name: default} of .env.example; every setting stands in it as a comment."""
    return dict(re.findall(r"^# ([A-Z_]+)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE))


def test_the_example_names_every_setting_and_no_other():
    compose = re.findall(r"\$\{([A-Z_]+)", (ROOT / "docker-compose.yml").read_text())
    assert set(example()) == {*settings_read(), *OWN, *compose}


def test_the_example_changes_nothing_until_it_is_edited():
    lines = (ROOT / ".env.example").read_text().splitlines()
    assert [line for line in lines if line and not line.startswith("# ")] == []


def test_the_example_tells_the_defaults(load):
    told = {name: default for name, default in example().items() if name in settings_read()}
    for none in ("SECRET_KEY", "VOTER_SECRET", "DATABASE_URL"):
        assert told.pop(none) == ""
    told["DATABASE_URL"] = PRODUCTION["DATABASE_URL"]  # without one, there is no broker either
    defaults = load(DATABASE_URL=PRODUCTION["DATABASE_URL"])

    assert {name: value for name, value in load(**told).items() if name.isupper()} == {
        name: value for name, value in defaults.items() if name.isupper()
    }
