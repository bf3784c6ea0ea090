"""What keeps strangers out: secrets in files, pages that run no script of theirs, headers, and that SECURITY.md's defences have tests."""

import re
from html.parser import HTMLParser

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.test import Client

from stack import product
from tests.conftest import PASSWORD, ROOT, Api, make_user
from tests.test_settings import PRODUCTION, _no_env_file, load  # noqa: F401 - fixtures

CONFIDENTIAL = [
    "SECRET_KEY",
    "VOTER_SECRET",
    "DATABASE_URL",
    "CELERY_BROKER_URL",
    "BROKER_API_URL",
    "CACHE_URL",
    "EMAIL_URL",
    "FLOWER_BASIC_AUTH",
    "REPLICA_URL",
    "SENTRY_DSN",
]
GIVEN = {
    **PRODUCTION,
    "BROKER_API_URL": "https://monitor:secret@mq.example.org/api/",
    "CACHE_URL": "rediss://:secret@cache.example.org:6379/0",
    "EMAIL_URL": "smtp+tls://nexus:secret@mail.example.org:587",
    "FLOWER_BASIC_AUTH": "flower:secret",
    "REPLICA_URL": "postgres://nexus:secret@replica.example.org:5432/nexus",
}

# --- Secrets ----------------------------------------------------------------------------------------------------------


# Without the one of Sentry, whose library would begin to report.
@pytest.mark.parametrize("name", sorted(set(CONFIDENTIAL) - {"SENTRY_DSN"}))
def test_a_secret_in_a_file_is_the_same_as_in_the_environment(load, tmp_path, name):  # noqa: F811
    said = load(**GIVEN)
    (tmp_path / "secret").write_text(GIVEN[name] + "\n")
    others = {key: value for key, value in GIVEN.items() if key != name}
    read = load(**others, **{f"{name}_FILE": str(tmp_path / "secret")})
    assert {key: value for key, value in read.items() if key.isupper()} == {key: value for key, value in said.items() if key.isupper()}


def test_every_setting_that_may_hold_a_secret_can_be_in_a_file():
    source = (ROOT / "core/settings.py").read_text()
    assert set(re.findall(r'(?:confidential|secret)\(\s*"(\w+)"', source)) == set(CONFIDENTIAL)
    others = re.findall(r'(?:env\.\w+|switch|number|whole|words)\(\s*"(\w+)"', source)
    may = [name for name in others if re.search("SECRET|PASSWORD|KEY|TOKEN|_URL$|_DSN$", name)]
    assert [name for name in may if not re.search("_(DAYS|HOURS|MINUTES)$", name)] == ["PASSWORD_RESET_URL"]


def test_a_secret_that_is_said_twice_or_can_not_be_read(load, tmp_path):  # noqa: F811
    with pytest.raises(ImproperlyConfigured, match=r"^Both SECRET_KEY and SECRET_KEY_FILE are set; set one of them\.$"):
        load(**GIVEN, SECRET_KEY_FILE=str(tmp_path))
    others = {key: value for key, value in GIVEN.items() if key != "SECRET_KEY"}
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ImproperlyConfigured, match=r"^SECRET_KEY_FILE is '.*', and that can't be read \(\w+\)\.$"):
            load(**others, SECRET_KEY_FILE=str(path))


def test_no_secret_is_an_argument_of_a_process():
    """Arguments are read by everybody on the machine."""
    env = {**GIVEN, "HOST": "127.0.0.1", "PORT": "1", "FLOWER_PORT": "2"}
    for program in product.programs(env):
        words = " ".join([*program.command, *program.env.values()])
        assert not [name for name, value in GIVEN.items() if name in CONFIDENTIAL and value in words], program.name


# --- TLS --------------------------------------------------------------------------------------------------------------


def test_a_broker_by_tls_must_prove_who_it_is(load):  # noqa: F811
    assert "CELERY_BROKER_USE_SSL" not in load(CELERY_BROKER_URL="amqp://nexus:secret@mq//")
    options = load(CELERY_BROKER_URL="amqps://nexus:secret@mq1//;amqps://nexus:secret@mq2//")["CELERY_BROKER_USE_SSL"]
    assert options["cert_reqs"].name == "CERT_REQUIRED"
    assert "server_hostname" in options  # without it kombu would not compare the host's name
    options["server_hostname"] = "mq1"  # as kombu does; for the next node it looks anew
    assert options["server_hostname"] is None
    assert dict(**options)["server_hostname"] == "mq1"
    with pytest.raises(ImproperlyConfigured, match=r"^CELERY_BROKER_URL must read amqps:// for every node, or for none\.$"):
        load(CELERY_BROKER_URL="amqps://nexus:secret@mq1//;amqp://nexus:secret@mq2//")


@pytest.mark.parametrize("name", ["WEB_DATABASE_ROLE", "WORKER_DATABASE_ROLE"])
@pytest.mark.parametrize("text", ['nexus"web', "nexus web", "x" * 64, "a;b"])
def test_a_role_that_is_no_name(load, name, text):  # noqa: F811
    assert load(**{name: "nexus-web_2"})[name] == "nexus-web_2"
    with pytest.raises(ImproperlyConfigured, match=rf"^{name} is .*; a role's name has letters, digits, _ and -, up to 63\.$"):
        load(**{name: text})


# --- What browsers are told -------------------------------------------------------------------------------------------


class Inline(HTMLParser):
    """Collects what stands inside a page that a browser runs or styles by: none of it is let through."""

    def __init__(self):
        super().__init__()
        self.found, self._open = [], None

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.found += [f"{tag} {name}" for name in given if name == "style" or name.startswith("on")]
        is_script = tag == "script" and "src" not in given and given.get("type") not in ("application/json", "text/template")
        if tag == "style" or is_script:
            self.found.append(tag)


PAGES = [
    "/admin/",
    "/admin/polls/poll/",
    "/admin/polls/tally/",
    "/admin/polls/apiclient/add/",
    "/admin/polls/suspiciousip/",
    "/admin/polls/suspiciousip/try",
    "/admin/polls/block/add/",
    "/admin/polls/decision/",
    "/admin/polls/pipelinedesk/",
    "/admin/polls/deadletterdesk/",
    "/admin/django_celery_beat/periodictask/",
    "/admin/django_celery_beat/periodictask/add/",
    "/admin/auth/user/",
    "/api/docs",
    "/api/redoc",
    "/problems/invalid",
]


@pytest.fixture(scope="module")
def operator(_database):
    operator = make_user("sec-otto")
    operator.is_staff = operator.is_superuser = True
    operator.save()
    return operator


@pytest.fixture
def browser(operator):
    browser = Client()
    browser.force_login(operator)
    return browser


@pytest.mark.parametrize("path", PAGES)
def test_no_script_runs_on_a_page_but_those_in_files_of_ours(browser, path):
    page = browser.get(path)
    assert page.status_code == 200
    rules = dict(rule.split(maxsplit=1) for rule in page["Content-Security-Policy"].split("; "))
    assert (rules["default-src"], rules["script-src"]) == ("'none'", "'self'")
    assert (rules["frame-ancestors"], rules["base-uri"], rules["form-action"]) == ("'none'", "'none'", "'self'")
    assert ("unsafe-inline" in page["Content-Security-Policy"]) == (path == "/api/redoc")  # its styles alone
    inline = Inline()
    inline.feed(page.content.decode())
    assert inline.found == []


def test_every_answer_tells_browsers_to_take_it_for_what_it_is(api, poll):
    anonymous = Api(api.port, {})
    answers = [
        api.cast(poll, "alice"),
        anonymous.get(f"/api/v1/polls/{poll.pk}/results"),
        anonymous.get(f"/api/v1/polls/{poll.pk}"),
        anonymous.get("/api/docs"),
        anonymous.get("/nowhere"),
    ]
    assert [answer.status for answer in answers] == [202, 200, 200, 200, 404]
    for answer in answers:
        assert answer.headers["x-content-type-options"] == "nosniff"
    policy = answers[2].headers["content-security-policy"]
    for answer in answers[:3]:  # pages may load more, and Django's own about an error style themselves
        assert (answer.headers["referrer-policy"], answer.headers["content-security-policy"]) == ("same-origin", policy)
    for answer in answers[2:]:
        assert (answer.headers["x-frame-options"], answer.headers["referrer-policy"]) == ("DENY", "same-origin")
        assert answer.headers["permissions-policy"].startswith("camera=()")


def test_cookies_are_for_tls_alone_and_for_no_script(load, settings, browser):  # noqa: F811
    read = load(**PRODUCTION)
    assert read["SESSION_COOKIE_SECURE"] and read["CSRF_COOKIE_SECURE"] and read["SECURE_HSTS_SECONDS"] == 31_536_000
    answer = Client().post("/admin/login/", {"username": "sec-otto", "password": PASSWORD})
    assert answer.cookies["sessionid"]["httponly"]
    assert answer.cookies["sessionid"]["samesite"] == "Lax"


# --- SECURITY.md ------------------------------------------------------------------------------------------------------


def test_every_defence_has_a_test_that_is_there():
    rows = [
        line.strip("| ").split(" | ")
        for line in (ROOT / "SECURITY.md").read_text().partition("## Threats")[2].splitlines()
        if line.startswith("| ")
    ]
    assert rows[0] == ["asset", "threat", "defence", "test"]
    assert len(rows) > 25
    for asset, threat, defence, test in rows[2:]:
        assert all([asset, threat, defence]), threat
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", test)
        assert named, f"{threat}: no test"
        for file, name in named:
            assert f"def {name}(" in (ROOT / "tests" / file).read_text(), f"{file}::{name}"
