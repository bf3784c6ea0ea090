"""Accounts through the API: signing up and in, tokens that are good once, and passwords, forgotten ones too."""

import email
import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from email.policy import default as modern
from itertools import count
from threading import Barrier
from urllib.parse import urlsplit

import jwt
import pytest
from celery import current_app
from django.conf import settings as project
from django.contrib.auth import get_user_model
from django.contrib.auth.models import User
from django.contrib.auth.tokens import default_token_generator
from django.db import connection, transaction
from django.test import Client
from django.utils.encoding import force_bytes
from django.utils.http import urlsafe_base64_encode
from django.utils.timezone import now
from rest_framework_simplejwt.token_blacklist.models import BlacklistedToken, OutstandingToken

import core.settings
from polls import accounts, problems
from polls.problems import Refusal
from tasks import mail, periodic
from tests.conftest import PASSWORD, PROCESS_SETTINGS, Api, free_port, make_user, wait_until, worker
from tests.test_intake import assert_refused

AUTH = "/api/v1/auth"
OTHER_PASSWORD = "wrong donkey capacitor pin"
_numbers = count()


@pytest.fixture
def anonymous(pipeline):
    return Api(pipeline, {})


@dataclass
class Account:
    username: str
    email: str
    api: Api

    def tokens(self, password=PASSWORD):
        answer = self.api.post(f"{AUTH}/token", {"username": self.username, "password": password})
        assert answer.status == 200, answer.text
        return answer.json

    @property
    def user(self):
        return User.objects.get(username=self.username)


@pytest.fixture
def alice(anonymous):
    """An account that was made through the API, as everybody makes one."""
    wanted = new_account()
    assert anonymous.post(f"{AUTH}/register", wanted).status == 201
    return Account(wanted["username"], wanted["email"], anonymous)


@pytest.fixture
def inside():
    """The API within this process, where a test can change a setting."""
    return Inside()


class Inside:
    def post(self, path, body):
        answer = Client(raise_request_exception=False).post(path, json.dumps(body), content_type="application/json")
        answer.status, answer.text = answer.status_code, answer.content.decode()
        answer.json = json.loads(answer.text) if answer.text else None
        return answer


def new_account(**fields):
    name = f"alice{next(_numbers)}"
    wanted = {"username": name, "email": f"{name}@example.org", "password": PASSWORD, **fields}
    return {field: value for field, value in wanted.items() if value is not ...}


def bearer(token):
    return {"authorization": f"Bearer {token}"}


def at_once(call, times):
    """What each of these calls at the same time returned or raised."""
    ready = Barrier(times)

    def run(number):
        try:
            ready.wait(10)
            return call(number)
        except Refusal as refusal:
            return refusal
        finally:
            connection.close()

    with ThreadPoolExecutor(times) as pool:
        return list(pool.map(run, range(times)))


# --- Signing up -------------------------------------------------------------------------------------------------------


def test_an_account_is_made_and_makes_a_poll(anonymous):
    wanted = new_account()

    made = anonymous.post(f"{AUTH}/register", wanted)

    assert made.status == 201, made.text
    shown = {"username": wanted["username"], "email": wanted["email"], "roles": ["owner"]}
    assert (made.json, made.headers["location"]) == (shown, "/api/v1/auth/me")
    tokens = anonymous.post(f"{AUTH}/token", {"username": wanted["username"], "password": PASSWORD}).json
    assert set(tokens) == {"access", "refresh"}
    assert anonymous.get(f"{AUTH}/me", **bearer(tokens["access"])).json == shown
    lunch = {"title": "Lunch", "options": [{"text": "soup"}, {"text": "salad"}], "voter_policy": "ip"}
    closes_at = (now() + timedelta(days=1)).isoformat()
    assert anonymous.post("/api/v1/polls", {**lunch, "closes_at": closes_at}, **bearer(tokens["access"])).status == 201
    user = User.objects.get(username=wanted["username"])
    assert not user.is_staff and not user.is_superuser
    assert PASSWORD not in user.password


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"username": ...}, "/username"),
        ({"username": ""}, "/username"),
        ({"username": "alice smith"}, "/username"),
        ({"username": "a\x00b"}, "/username"),
        ({"username": "x" * 151}, "/username"),
        ({"username": "ﷺ" * 150}, "/username"),  # 18 letters each, once it is normalised
        ({"username": ["alice"]}, "/username"),
        ({"email": ...}, "/email"),
        ({"email": ""}, "/email"),
        ({"email": "alice"}, "/email"),
        ({"email": "alice@example.org\nBcc: bob@example.org"}, "/email"),
        ({"email": "a" * 250 + "@example.org"}, "/email"),
        ({"password": ...}, "/password"),
        ({"password": ""}, "/password"),
        ({"password": "short1!"}, "/password"),
        ({"password": "password1"}, "/password"),
        ({"password": "4611686018427"}, "/password"),
        ({"username": "margarethe", "password": "margarethe1"}, "/password"),
        ({"password": "x" * 201}, "/password"),
        ({"role": "admin"}, "/role"),
        ({"is_superuser": True}, "/is_superuser"),
        ({"roles": ["admin"]}, "/roles"),
    ],
)
def test_an_account_with_a_field_wrong(anonymous, fields, pointer):
    users = User.objects.count()
    assert_refused(anonymous.post(f"{AUTH}/register", new_account(**fields)), problems.INVALID, pointer=pointer)
    assert User.objects.count() == users


def test_every_reason_against_a_password_is_told(anonymous):
    detail = anonymous.post(f"{AUTH}/register", new_account(password="1234")).json["detail"]
    assert "too short" in detail and "too common" in detail and "entirely numeric" in detail


def test_the_product_hashes_passwords_as_django_does():
    assert not hasattr(core.settings, "PASSWORD_HASHERS")  # those of tests/settings.py are for tests


@pytest.mark.parametrize("written", [str, str.upper, lambda name: name.replace("a", "\uff41")])  # a wide a
def test_a_name_that_is_taken_however_it_is_written(anonymous, alice, written):
    taken = anonymous.post(f"{AUTH}/register", new_account(username=written(alice.username)))
    assert_refused(taken, problems.INVALID, pointer="/username")


@pytest.mark.parametrize("written", [str, str.upper, str.title])
def test_an_address_that_has_an_account(anonymous, alice, written):
    assert_refused(anonymous.post(f"{AUTH}/register", new_account(email=written(alice.email))), problems.INVALID, pointer="/email")


@pytest.mark.parametrize("same", ["username", "email"])
def test_of_many_registrations_at_once_with_one_name_or_address_one_is_made(same):
    wanted = new_account()
    spellings = [wanted[same], wanted[same].upper(), wanted[same].title(), wanted[same].swapcase().replace("L", "l")]

    def register(number):
        return accounts.register(**new_account(**{same: spellings[number]}), at=now())

    with ThreadPoolExecutor(1) as pool:
        with transaction.atomic(), connection.cursor() as cursor:
            # Names can be read and not written, until all four have looked, or wait for their turn to look.
            cursor.execute("LOCK TABLE auth_user IN EXCLUSIVE MODE")
            ended = pool.submit(at_once, register, len(spellings))
            wait_until(lambda: waiting_for_locks() == len(spellings))
        made = [result for result in ended.result(30) if isinstance(result, User)]

    assert len(made) == 1
    assert User.objects.filter(**{f"{same}__iexact": wanted[same]}).count() == 1


def waiting_for_locks():
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT count(*) FROM pg_locks JOIN pg_database d ON d.oid = database WHERE NOT granted AND datname = current_database()"
        )
        return cursor.fetchone()[0]


def test_where_registration_is_closed_nobody_signs_up(inside, settings):
    settings.REGISTRATION_OPEN = False
    users = User.objects.count()
    assert_refused(inside.post(f"{AUTH}/register", new_account()), problems.FORBIDDEN)
    assert User.objects.count() == users


def test_where_new_accounts_get_no_role_they_have_none(inside, settings):
    settings.NEW_ACCOUNT_ROLE = ""
    assert inside.post(f"{AUTH}/register", new_account()).json["roles"] == []


@pytest.mark.parametrize(("body", "problem"), [(b"{", problems.MALFORMED), (b"[]", problems.INVALID), (b"\xff", problems.MALFORMED)])
@pytest.mark.parametrize("path", ["register", "token", "token/refresh", "logout", "password/reset", "password/reset/confirm"])
def test_a_body_that_is_no_object(anonymous, path, body, problem):
    assert_refused(anonymous.post(f"{AUTH}/{path}", body), problem)


# --- Signing in and out -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "password"), [(None, "guess"), ("nobody", PASSWORD), (None, PASSWORD + " "), (None, PASSWORD.upper())])
def test_a_wrong_name_or_password_gets_no_token_and_does_not_tell_which(anonymous, alice, name, password):
    refused = anonymous.post(f"{AUTH}/token", {"username": name or alice.username, "password": password})
    assert_refused(refused, problems.UNAUTHENTICATED)
    assert refused.json["detail"] == "No active account has this name and this password."
    assert refused.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("body", "pointer"),
    [({"username": "alice"}, "/password"), ({"password": "x"}, "/username"), ({"username": "a", "password": "b", "otp": 1}, "/otp")],
)
def test_signing_in_with_a_field_wrong(anonymous, body, pointer):
    assert_refused(anonymous.post(f"{AUTH}/token", body), problems.INVALID, pointer=pointer)


def test_a_name_is_known_in_wide_letters_too(anonymous, alice):
    answer = anonymous.post(f"{AUTH}/token", {"username": alice.username.replace("a", "\uff41"), "password": PASSWORD})
    assert answer.status == 200


@pytest.mark.parametrize("field", ["username", "password"])
@pytest.mark.parametrize("text", [b'"\\ud800"', b'"\\u0000"', b"{}", b"1e999", b"null", b"true"])
def test_what_is_no_text_signs_nobody_in(anonymous, field, text):
    other = {"username": b"password", "password": b"username"}[field]
    answer = anonymous.post(f"{AUTH}/token", b'{"%s": %s, "%s": "alice"}' % (field.encode(), text, other))
    assert answer.status in (400, 401), answer.text


def test_tokens_are_kept_by_no_cache_and_live_as_long_as_the_settings_say(anonymous, alice):
    answer = anonymous.post(f"{AUTH}/token", {"username": alice.username, "password": PASSWORD})

    assert answer.headers["cache-control"] == "no-store"
    lives = {}
    for kind, token in answer.json.items():
        claims = jwt.decode(token, options={"verify_signature": False})
        lives[kind] = claims["exp"] - claims["iat"]
    assert lives == {"access": int(PROCESS_SETTINGS["ACCESS_TOKEN_MINUTES"]) * 60, "refresh": project.REFRESH_TOKEN_DAYS * 86_400}


def test_a_refresh_token_is_good_once(anonymous, alice):
    first = alice.tokens()

    second = anonymous.post(f"{AUTH}/token/refresh", {"refresh": first["refresh"]})

    assert (second.status, second.headers["cache-control"]) == (200, "no-store")
    assert anonymous.get(f"{AUTH}/me", **bearer(second.json["access"])).status == 200
    assert_refused(anonymous.post(f"{AUTH}/token/refresh", {"refresh": first["refresh"]}), problems.UNAUTHENTICATED)
    assert anonymous.post(f"{AUTH}/token/refresh", {"refresh": second.json["refresh"]}).status == 200


def test_of_many_refreshes_at_once_with_one_token_one_gets_new_ones(alice):
    token = alice.tokens()["refresh"]

    ended = at_once(lambda _: accounts.refresh(token), 8)

    assert sum(isinstance(result, accounts.Tokens) for result in ended) == 1
    assert {result.problem for result in ended if isinstance(result, Refusal)} == {problems.UNAUTHENTICATED}


def test_what_is_no_refresh_token_gives_nothing(anonymous, alice):
    tokens = alice.tokens()
    claims = jwt.decode(tokens["refresh"], options={"verify_signature": False})
    expired = accounts.RefreshToken()
    expired["user_id"] = str(alice.user.pk)
    expired.set_exp(from_time=now() - timedelta(days=30))
    forged = jwt.encode({**claims, "jti": "mine"}, "x" * 64, algorithm="HS256")
    unsigned = jwt.encode({**claims, "jti": "mine"}, None, algorithm="none")

    for token in (tokens["access"], str(expired), forged, unsigned, "nonsense", "a.b.c", "ä" * 10):
        assert_refused(anonymous.post(f"{AUTH}/token/refresh", {"refresh": token}), problems.UNAUTHENTICATED)
    assert_refused(anonymous.post(f"{AUTH}/token/refresh", {}), problems.INVALID, pointer="/refresh")
    assert_refused(anonymous.get(f"{AUTH}/me", **bearer(tokens["refresh"])), problems.UNAUTHENTICATED)


def test_signing_out_ends_the_refresh_token_and_can_be_repeated(anonymous, alice):
    here, elsewhere = alice.tokens(), alice.tokens()

    for _ in range(2):
        answer = anonymous.post(f"{AUTH}/logout", {"refresh": here["refresh"]})
        assert (answer.status, answer.text) == (204, "")

    assert_refused(anonymous.post(f"{AUTH}/token/refresh", {"refresh": here["refresh"]}), problems.UNAUTHENTICATED)
    assert anonymous.post(f"{AUTH}/token/refresh", {"refresh": elsewhere["refresh"]}).status == 200


def test_signing_out_with_a_token_that_has_expired_is_no_mistake_but_with_none_it_is(anonymous, alice):
    expired = accounts.RefreshToken()
    expired.set_exp(from_time=now() - timedelta(days=30))
    assert anonymous.post(f"{AUTH}/logout", {"refresh": str(expired)}).status == 204
    for token in ("nonsense", alice.tokens()["access"]):
        assert_refused(anonymous.post(f"{AUTH}/logout", {"refresh": token}), problems.INVALID, pointer="/refresh")


def test_an_expired_access_token_is_not_in_the_way_of_signing_in_anew(anonymous, alice):
    answer = anonymous.post(f"{AUTH}/token", {"username": alice.username, "password": PASSWORD}, **bearer("nonsense"))
    assert answer.status == 200


def test_an_account_that_was_closed_is_signed_out_at_once(anonymous, alice):
    tokens = alice.tokens()
    User.objects.filter(username=alice.username).update(is_active=False)

    assert_refused(anonymous.get(f"{AUTH}/me", **bearer(tokens["access"])), problems.UNAUTHENTICATED)
    assert_refused(anonymous.post(f"{AUTH}/token/refresh", {"refresh": tokens["refresh"]}), problems.UNAUTHENTICATED)
    assert anonymous.post(f"{AUTH}/logout", {"refresh": tokens["refresh"]}).status == 204


def test_an_account_that_was_deleted_leaves_tokens_that_are_none(anonymous, alice):
    tokens = alice.tokens()
    alice.user.delete()

    assert_refused(anonymous.get(f"{AUTH}/me", **bearer(tokens["access"])), problems.UNAUTHENTICATED)
    assert_refused(anonymous.post(f"{AUTH}/token/refresh", {"refresh": tokens["refresh"]}), problems.UNAUTHENTICATED)
    assert anonymous.post(f"{AUTH}/logout", {"refresh": tokens["refresh"]}).status == 204


def test_who_reads_the_database_finds_no_token_to_sign_in_with(anonymous, alice):
    tokens = alice.tokens()
    anonymous.post(f"{AUTH}/token/refresh", {"refresh": tokens["refresh"]})
    assert list(OutstandingToken.objects.filter(user=alice.user).values_list("token", flat=True)) == ["", ""]


def test_only_the_signed_in_read_who_they_are_and_no_api_key(anonymous, api):
    assert_refused(anonymous.get(f"{AUTH}/me"), problems.UNAUTHENTICATED)
    assert_refused(anonymous.get(f"{AUTH}/me", **bearer("nonsense")), problems.UNAUTHENTICATED)
    assert_refused(api.get(f"{AUTH}/me"), problems.FORBIDDEN)
    assert_refused(api.post(f"{AUTH}/password", {"old_password": PASSWORD, "new_password": OTHER_PASSWORD}), problems.FORBIDDEN)


def test_roles_are_told_in_one_order(pipeline):
    make_user("ada", "admin", "auditor", "operator", "owner")
    root = get_user_model().objects.create_superuser("ruth", password=PASSWORD)
    for username in ("ada", root.username):
        tokens = Account(username, "", Api(pipeline, {})).tokens()
        assert Api(pipeline, bearer(tokens["access"])).get(f"{AUTH}/me").json["roles"] == ["owner", "operator", "auditor", "admin"]


def test_expired_tokens_are_forgotten_and_no_others(alice, monkeypatch):
    monkeypatch.setattr(accounts, "AT_ONCE", 2)
    alice.tokens()
    accounts.refresh(alice.tokens()["refresh"])
    mine = OutstandingToken.objects.filter(user=alice.user)
    old, used, last = mine.order_by("pk")
    at = now()
    mine.filter(pk__in=[old.pk, used.pk]).update(expires_at=at)
    mine.filter(pk=last.pk).update(expires_at=at + timedelta(microseconds=1))

    assert accounts.purge_expired_tokens(at) >= 2
    assert list(mine) == [last]
    assert accounts.purge_expired_tokens(at) == 0
    assert not BlacklistedToken.objects.filter(token__in=[old, used]).exists()


def test_the_clock_has_them_forgotten_every_day(alice):
    token = accounts.RefreshToken(alice.tokens()["refresh"])
    OutstandingToken.objects.filter(jti=token["jti"]).update(expires_at=now())

    scheduled = [job for job in project.CELERY_BEAT_SCHEDULE.values() if job["task"] == periodic.purge_expired_tokens.name]
    assert [job["schedule"] for job in scheduled] == [timedelta(days=1)]
    periodic.purge_expired_tokens()

    assert not OutstandingToken.objects.filter(jti=token["jti"]).exists()


# --- Another password -------------------------------------------------------------------------------------------------


def test_another_password_ends_every_token_at_once(anonymous, alice):
    here, elsewhere = alice.tokens(), alice.tokens()

    changed = anonymous.post(f"{AUTH}/password", {"old_password": PASSWORD, "new_password": OTHER_PASSWORD}, **bearer(here["access"]))

    assert (changed.status, changed.text) == (204, "")
    for tokens in (here, elsewhere):
        assert_refused(anonymous.get(f"{AUTH}/me", **bearer(tokens["access"])), problems.UNAUTHENTICATED)
        assert_refused(anonymous.post("/api/v1/polls", {}, **bearer(tokens["access"])), problems.UNAUTHENTICATED)
        assert_refused(anonymous.post(f"{AUTH}/token/refresh", {"refresh": tokens["refresh"]}), problems.UNAUTHENTICATED)
    assert anonymous.post(f"{AUTH}/token", {"username": alice.username, "password": PASSWORD}).status == 401
    assert alice.tokens(OTHER_PASSWORD)
    assert OutstandingToken.objects.filter(user=alice.user, blacklistedtoken=None).count() == 1


def test_a_refresh_token_that_was_made_while_the_password_changed_is_none(alice):
    """It comes after the others were ended; what it holds of the old password tells."""
    late = alice.tokens()["refresh"]
    user = alice.user
    user.set_password(OTHER_PASSWORD)
    user.save()
    assert not BlacklistedToken.objects.filter(token__user=user).exists()

    with pytest.raises(Refusal, match="Sign in again"):
        accounts.refresh(late)


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"old_password": "guess", "new_password": OTHER_PASSWORD}, "/old_password"),
        ({"old_password": PASSWORD, "new_password": "12345678"}, "/new_password"),
        ({"old_password": PASSWORD, "new_password": ""}, "/new_password"),
        ({"new_password": OTHER_PASSWORD}, "/old_password"),
        ({"old_password": PASSWORD, "new_password": OTHER_PASSWORD, "user": 1}, "/user"),
    ],
)
def test_a_change_with_a_field_wrong_changes_nothing(anonymous, alice, body, pointer):
    tokens = alice.tokens()
    assert_refused(anonymous.post(f"{AUTH}/password", body, **bearer(tokens["access"])), problems.INVALID, pointer=pointer)
    assert anonymous.get(f"{AUTH}/me", **bearer(tokens["access"])).status == 200
    assert alice.tokens()


def test_of_many_changes_at_once_with_one_old_password_one_wins(alice):
    ended = at_once(lambda number: accounts.change_password(alice.user, PASSWORD, f"{OTHER_PASSWORD} {number}"), 4)

    [winner] = [number for number, result in enumerate(ended) if result is None]
    assert alice.tokens(f"{OTHER_PASSWORD} {winner}")


def test_changing_a_password_needs_a_signed_in_user(anonymous):
    body = {"old_password": PASSWORD, "new_password": OTHER_PASSWORD}
    assert_refused(anonymous.post(f"{AUTH}/password", body), problems.UNAUTHENTICATED)


# --- A forgotten password ---------------------------------------------------------------------------------------------


def mail_of(user, path=AUTH):
    """What the mail to this user holds: (uid, token)."""
    return urlsafe_base64_encode(force_bytes(user.pk)), default_token_generator.make_token(user)


def confirm(uid, token, new_password=OTHER_PASSWORD):
    return {"uid": uid, "token": token, "new_password": new_password}


def test_a_forgotten_password_is_replaced_by_mail(anonymous, alice, tmp_path):
    """The true way: web process, broker, the clock's worker, a mail."""
    tokens, box, log = alice.tokens(), tmp_path / "mails", tmp_path / "worker.log"
    box.mkdir()
    with worker(project.PERIODIC_QUEUE, log, concurrency=1, EMAIL_URL=f"filemail:///{box}"):
        for address in ("nobody@example.org", alice.email.upper()):
            answer = anonymous.post(f"{AUTH}/password/reset", {"email": address})
            assert (answer.status, answer.text) == (202, "")
        wait_until(lambda: any(file.stat().st_size for file in box.iterdir()), seconds=30)
    [file] = box.iterdir()
    sent = email.message_from_bytes(file.read_bytes().partition(b"\n------")[0], policy=modern)
    uid, token = re.findall(r"^(?:uid|token): (\S+)$", sent.get_content(), re.MULTILINE)

    assert (sent["to"], sent["from"]) == (alice.email, project.DEFAULT_FROM_EMAIL)
    assert alice.username in sent.get_content()
    assert log.stat().st_size
    for secret in (token, alice.email, alice.username):
        assert secret not in log.read_text()

    done = anonymous.post(f"{AUTH}/password/reset/confirm", confirm(uid, token))

    assert (done.status, done.text) == (204, "")
    assert alice.tokens(OTHER_PASSWORD)
    assert anonymous.get(f"{AUTH}/me", **bearer(tokens["access"])).status == 401
    assert anonymous.post(f"{AUTH}/token/refresh", {"refresh": tokens["refresh"]}).status == 401
    again = anonymous.post(f"{AUTH}/password/reset/confirm", confirm(uid, token, PASSWORD))
    assert_refused(again, problems.INVALID, pointer="/token")


def test_what_is_asked_of_the_worker_tells_no_address_and_no_token_and_is_asked_for_nobody_too(anonymous, alice):
    closed = make_user(f"closed{next(_numbers)}")
    User.objects.filter(pk=closed.pk).update(is_active=False)
    with current_app.connection_for_read() as broker:
        channel = broker.default_channel
        channel.queue_purge(project.PERIODIC_QUEUE)

        asked = []
        for address in (alice.email, "nobody@example.org", closed.email):
            anonymous.post(f"{AUTH}/password/reset", {"email": address})
            message = channel.basic_get(project.PERIODIC_QUEUE, no_ack=True)
            asked.append(
                (message.headers["task"], json.loads(message.body)[:2], message.headers["argsrepr"], message.properties["delivery_mode"])
            )

    for_alice, for_nobody = [[alice.user.pk]], [[]]
    assert asked == [
        ("mail.password_reset", [for_alice, {}], f"([{alice.user.pk}],)", 2),
        ("mail.password_reset", [for_nobody, {}], "([],)", 2),
        ("mail.password_reset", [for_nobody, {}], "([],)", 2),
    ]


def test_the_mail_goes_to_the_address_we_know_and_is_sent_again_when_the_task_runs_again(alice, mailoutbox, settings):
    settings.PASSWORD_RESET_URL = "https://vote.example.org/password?uid={uid}&token={token}"

    for _ in range(2):
        mail.mail_password_resets(json.loads(json.dumps([alice.user.pk, 0])))

    assert [sent.to for sent in mailoutbox] == [[alice.email]] * 2
    [link] = re.findall(r"^https://\S+$", mailoutbox[0].body, re.MULTILINE)
    assert urlsplit(link).path == "/password"
    uid, token = re.fullmatch(r"uid=([\w-]+)&token=([\w-]+)", urlsplit(link).query).groups()
    accounts.reset_password(uid, token, OTHER_PASSWORD)
    assert alice.tokens(OTHER_PASSWORD)


def test_nobody_without_an_address_or_a_password_of_ours_gets_a_mail(alice, mailoutbox):
    by_another_way = make_user(f"sso{next(_numbers)}")
    by_another_way.set_unusable_password()
    by_another_way.save()
    no_address = make_user(f"plain{next(_numbers)}")
    User.objects.filter(pk=no_address.pk).update(email="")

    assert accounts.ids_of_users_with(by_another_way.email) == []
    accounts.mail_password_reset(no_address.pk)
    User.objects.filter(username=alice.username).update(is_active=False)
    accounts.mail_password_reset(alice.user.pk)

    assert mailoutbox == []


def test_a_mail_server_that_is_away_is_logged_without_address_and_token(alice, settings, caplog):
    settings.EMAIL_BACKEND = "django.core.mail.backends.smtp.EmailBackend"
    settings.EMAIL_HOST, settings.EMAIL_PORT = "127.0.0.1", free_port()

    mail.mail_password_resets([alice.user.pk])

    assert [record.getMessage() for record in caplog.records] == [
        f"user {alice.user.pk}: the mail about the password could not be sent (ConnectionRefusedError)"
    ]


def test_where_no_mail_server_is_set_the_log_says_so(alice, settings, caplog):
    settings.EMAIL_BACKEND = "django.core.mail.backends.dummy.EmailBackend"
    mail.mail_password_resets([alice.user.pk])
    assert [(record.levelname, "EMAIL_URL names no mail server" in record.getMessage()) for record in caplog.records] == [("WARNING", True)]


@pytest.mark.parametrize(
    ("body", "pointer"),
    [({}, "/email"), ({"email": "alice"}, "/email"), ({"email": "a\x00@example.org"}, "/email"), ({"emial": "a@b.org"}, "/emial")],
)
def test_asking_for_a_mail_with_a_field_wrong(anonymous, body, pointer):
    answer = anonymous.post(f"{AUTH}/password/reset", body)
    assert answer.status == 400
    assert f"#{pointer}" in [error["pointer"] for error in answer.json["errors"]]


def test_a_wrong_token_changes_nothing_and_a_weak_password_leaves_the_token_good(anonymous, alice):
    (uid, token), (others_uid, others_token) = mail_of(alice.user), mail_of(make_user(f"bob{next(_numbers)}"))
    path = f"{AUTH}/password/reset/confirm"

    wrong = [(uid, others_token), (others_uid, token), (uid, token[:-1]), (uid, "x"), ("x", token), ("!!", token), ("4pml", token)]
    wrong += [("OTk5OTk5OTk5OTk5OTk5OTk5OTk5", token), ("LTE", token)]  # no such user's id, far too large; -1
    for wrong_uid, wrong_token in wrong:
        assert_refused(anonymous.post(path, confirm(wrong_uid, wrong_token)), problems.INVALID, pointer="/token")
    assert_refused(anonymous.post(path, confirm(uid, token, "12345678")), problems.INVALID, pointer="/new_password")
    assert_refused(anonymous.post(path, {**confirm(uid, token), "username": "root"}), problems.INVALID, pointer="/username")
    assert alice.tokens()

    assert anonymous.post(path, confirm(uid, token)).status == 204


def test_a_token_that_is_too_old_is_none(inside, alice, settings):
    uid, token = mail_of(alice.user)
    settings.PASSWORD_RESET_TIMEOUT = -1
    assert_refused(inside.post(f"{AUTH}/password/reset/confirm", confirm(uid, token)), problems.INVALID, pointer="/token")


def test_of_many_confirmations_at_once_with_one_token_one_wins(alice):
    uid, token = mail_of(alice.user)

    ended = at_once(lambda number: accounts.reset_password(uid, token, f"{OTHER_PASSWORD} {number}"), 6)

    [winner] = [number for number, result in enumerate(ended) if result is None]
    assert alice.tokens(f"{OTHER_PASSWORD} {winner}")


def test_without_a_broker_asking_for_a_mail_is_refused_soon_whoever_asks(inside, alice, broker_away):
    started = time.monotonic()
    for address in (alice.email, "nobody@example.org"):
        refused = inside.post(f"{AUTH}/password/reset", {"email": address})
        assert_refused(refused, problems.UNAVAILABLE)
        assert refused.headers["retry-after"] == "5"
    assert time.monotonic() - started < 2


def test_a_broker_that_says_nothing_is_waited_for_only_so_long(inside, alice, monkeypatch):
    monkeypatch.setattr(mail, "PATIENCE_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("CELERY_BROKER_WRITE_URL", f"amqp://guest:guest@127.0.0.1:{silent.getsockname()[1]}//")
        started = time.monotonic()
        assert_refused(inside.post(f"{AUTH}/password/reset", {"email": alice.email}), problems.UNAVAILABLE)
    assert time.monotonic() - started < 2


def test_a_broker_that_confirms_nothing_is_waited_for_only_so_long(inside, alice, broker, monkeypatch):
    """As with a memory alarm: it lets us in, and then reads no more."""
    monkeypatch.setattr(mail, "PATIENCE_SECONDS", 0.5)
    with deaf_to(b"mail.password_reset") as broker_url:
        monkeypatch.setenv("CELERY_BROKER_WRITE_URL", broker_url)
        started = time.monotonic()
        assert_refused(inside.post(f"{AUTH}/password/reset", {"email": alice.email}), problems.UNAVAILABLE)
        took = time.monotonic() - started
    assert 0.5 <= took < 1.4  # not once more for a polite goodbye


@contextmanager
def deaf_to(word):
    """A way to the broker that carries everything until we say this word, and nothing of ours from then on; its URL."""
    url, ended, sockets = urlsplit(project.CELERY_BROKER_URL), threading.Event(), []

    def carry(source, target, until):
        with suppress(OSError):
            while (heard := source.recv(65536)) and not (until and until in heard):
                target.sendall(heard)
            ended.wait(10)

    def let_in(door):
        with suppress(OSError):  # the door is closed in the end
            while True:
                client, server = door.accept()[0], socket.create_connection((url.hostname, url.port or 5672))
                sockets.extend([client, server])
                for source, target, until in ((client, server, word), (server, client, None)):
                    threading.Thread(target=carry, args=(source, target, until), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as door:
        threading.Thread(target=let_in, args=(door,), daemon=True).start()
        try:
            yield url._replace(netloc=f"{url.username}:{url.password}@127.0.0.1:{door.getsockname()[1]}").geturl()
        finally:
            ended.set()
            door.shutdown(socket.SHUT_RDWR)
            for each in sockets:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
                each.close()


def test_a_dump_does_not_tell_when_somebody_signed_in(pipeline):
    """By the second: a vote a moment later would be theirs."""
    person = make_user(f"quiet-{time.time_ns()}")
    accounts.refresh(accounts.sign_in(person.username, PASSWORD).refresh)

    rows = OutstandingToken.objects.filter(user=person)
    moments = [moment for row in rows for moment in (row.created_at, row.expires_at)]
    moments += BlacklistedToken.objects.filter(token__in=rows).values_list("blacklisted_at", flat=True)
    assert len(moments) == 5 and {(at.hour, at.minute, at.second, at.microsecond) for at in moments} == {(0, 0, 0, 0)}
    person.refresh_from_db()
    assert person.last_login is None
