"""Accounts: signing up and in, the tokens by which one stays signed in, and passwords."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, cast

from django.conf import settings
from django.contrib.auth import authenticate, password_validation
from django.contrib.auth.models import Group, User
from django.contrib.auth.tokens import default_token_generator
from django.core.exceptions import ValidationError
from django.core.mail import send_mail
from django.db import connection, transaction
from django.db.models import CharField
from django.template.loader import render_to_string
from django.utils.encoding import force_bytes
from django.utils.http import urlsafe_base64_decode, urlsafe_base64_encode
from rest_framework_simplejwt import tokens
from rest_framework_simplejwt.backends import TokenBackend
from rest_framework_simplejwt.exceptions import ExpiredTokenError, TokenBackendError, TokenBackendExpiredToken, TokenError
from rest_framework_simplejwt.settings import api_settings as jwt
from rest_framework_simplejwt.token_blacklist.models import BlacklistedToken, OutstandingToken
from rest_framework_simplejwt.tokens import Token
from rest_framework_simplejwt.utils import datetime_from_epoch, get_md5_hash_password

from polls import problems
from polls.problems import Refusal

logger = logging.getLogger(__name__)

# Any fixed number; it only keeps this lock apart from others.
_REGISTRATIONS = 7_301_944
# Expired tokens that are deleted in one transaction.
AT_ONCE = 5000


@dataclass(frozen=True)
class Tokens:
    """What a signed-in client holds: `access` for its requests, `refresh` for the next tokens, good once."""

    access: str
    refresh: str


class _Signing(TokenBackend):
    """Signs with SECRET_KEY, and knows what one of SECRET_KEY_FALLBACKS signed."""

    def decode(self, token: Token, verify: bool = True) -> dict[str, Any]:
        try:
            return super().decode(token, verify)
        except TokenBackendExpiredToken:
            raise
        except TokenBackendError:
            for key in settings.SECRET_KEY_FALLBACKS:
                with suppress(TokenBackendError):
                    return TokenBackend(self.algorithm, key).decode(token, verify)
            raise


_signing = _Signing(jwt.ALGORITHM, jwt.SIGNING_KEY)


class AccessToken(tokens.AccessToken):
    """What a signed-in client shows with each request."""

    _token_backend = _signing


class RefreshToken(tokens.RefreshToken):
    """A refresh token as it was signed. Whether it was used is for `_use_up`, which lets one of two requests at once win."""

    _token_backend = _signing
    access_token_class = AccessToken

    def check_blacklist(self) -> None:
        """Look nothing up."""


# --- Signing up, in and out -------------------------------------------------------------------------------------------


def register(username: str, email: str, password: str, at: datetime) -> User:
    """Store a new account, with the role that new ones get. Raises Refusal where that can't be."""
    if not settings.REGISTRATION_OPEN:
        raise problems.FORBIDDEN.says("Nobody can sign up here. Ask the people who run this service for an account.")
    user = User(username=User.normalize_username(username), email=User.objects.normalize_email(email), date_joined=at)
    for name in ("username", "email"):
        with _told_at(f"/{name}"):
            cast("CharField[str, str]", User._meta.get_field(name)).clean(getattr(user, name), user)
    with _told_at("/password"):
        password_validation.validate_password(password, user)
    user.set_password(password)
    with transaction.atomic():
        with connection.cursor() as cursor:
            # Django's table keeps neither names nor addresses apart by more than their case: one registration at a time looks.
            cursor.execute("SELECT pg_advisory_xact_lock(%s)", [_REGISTRATIONS])
        if User.objects.filter(username__iexact=user.username).exists():
            raise problems.INVALID.says("This name is taken.", pointer="/username")
        if User.objects.filter(email__iexact=user.email).exists():
            raise problems.INVALID.says("There is an account with this e-mail address.", pointer="/email")
        user.save()
        if settings.NEW_ACCOUNT_ROLE:
            user.groups.add(Group.objects.get_or_create(name=settings.NEW_ACCOUNT_ROLE)[0])
    return user


def sign_in(username: str, password: str) -> Tokens:
    """Return tokens for the account; raises Refusal, after the same time whether the name is known or not."""
    user = authenticate(username=User.normalize_username(username), password=password)
    if user is None:
        raise _unauthenticated("No active account has this name and this password.")
    return _issue_tokens(user)


def refresh(token: str) -> Tokens:
    """Use up a refresh token for new tokens. Raises Refusal on one that is wrong, expired, used, or older than the password."""
    try:
        used = RefreshToken(token)  # type: ignore[arg-type] # the library's hint is wrong: it takes text
    except TokenError as exc:
        raise _unauthenticated("This is no refresh token, or an expired one. Sign in again.") from exc
    with transaction.atomic():
        user = User.objects.filter(pk=used.get(jwt.USER_ID_CLAIM), is_active=True).first()
        if user is None or used.get(jwt.REVOKE_TOKEN_CLAIM) != get_md5_hash_password(user.password) or not _use_up(used, user):
            raise _unauthenticated("The refresh token is not good any more. Sign in again.")
        return _issue_tokens(user)


def sign_out(token: str) -> None:
    """End a refresh token. Repeatable; raises Refusal on what never was one."""
    try:
        _use_up(RefreshToken(token), None)  # type: ignore[arg-type]
    except ExpiredTokenError:
        return
    except TokenError as exc:
        raise problems.INVALID.says("This is no refresh token.", pointer="/refresh") from exc


def purge_expired_tokens(at: datetime) -> int:
    """Delete what is known of refresh tokens that have expired; return how many. Repeatable."""
    expired = OutstandingToken.objects.filter(expires_at__lte=at).order_by("pk").values_list("pk", flat=True)
    purged = 0
    while some := list(expired[:AT_ONCE]):
        OutstandingToken.objects.filter(pk__in=some).delete()
        purged += len(some)
    return purged


def _issue_tokens(user: User) -> Tokens:
    token = RefreshToken()
    token[jwt.USER_ID_CLAIM] = str(user.pk)
    token[jwt.REVOKE_TOKEN_CLAIM] = get_md5_hash_password(user.password)
    _known(token, user)
    return Tokens(access=str(token.access_token), refresh=str(token))


def _known(token: RefreshToken, user: User | None) -> OutstandingToken:
    """Return the token's row. It holds the id and not the token, so that who reads the database can't sign in.

    And days instead of moments: who signs in and votes a moment later would be known by both moments.
    """
    return OutstandingToken.objects.get_or_create(
        jti=token[jwt.JTI_CLAIM],
        defaults={
            "user": user,
            "token": "",
            "created_at": _day(token.current_time),
            "expires_at": _day(datetime_from_epoch(token["exp"])) + timedelta(days=1),
        },
    )[0]


def _use_up(token: RefreshToken, user: User | None) -> bool:
    """Return whether the token was good until now. The table's unique key decides between requests at once."""
    used, is_new = BlacklistedToken.objects.get_or_create(token=_known(token, user))
    if is_new:
        BlacklistedToken.objects.filter(pk=used.pk).update(blacklisted_at=_day(used.blacklisted_at))
    return is_new


def _day(moment: datetime) -> datetime:
    return moment.replace(hour=0, minute=0, second=0, microsecond=0)


def _unauthenticated(detail: str) -> Refusal:
    return problems.UNAUTHENTICATED.says(detail, headers={"WWW-Authenticate": "Bearer"})


# --- Passwords --------------------------------------------------------------------------------------------------------


def change_password(user: User, old_password: str, new_password: str) -> None:
    """Give the account another password and end all its tokens; raises Refusal when the old one is wrong or the new one weak."""
    with transaction.atomic():
        user = User.objects.select_for_update().get(pk=user.pk)
        if not user.check_password(old_password):
            raise problems.INVALID.says("This is not your password.", pointer="/old_password")
        _set_password(user, new_password)


def ids_of_users_with(email: str) -> list[int]:
    """Return who may be sent a mail about a forgotten password at this address: one, none, or several of older accounts."""
    users = User.objects.filter(email__iexact=email, is_active=True).order_by("pk")
    return [user.pk for user in users if user.has_usable_password()]


def mail_password_reset(user_id: int) -> None:
    """Send the user a mail with a fresh token for another password. Neither token nor address comes into the log.

    A mail that can't be sent is logged and given up: whoever waits for it asks again.
    """
    user = User.objects.filter(pk=user_id, is_active=True).exclude(email="").first()
    if user is None:
        return
    uid, token = urlsafe_base64_encode(force_bytes(user.pk)), default_token_generator.make_token(user)
    link = settings.PASSWORD_RESET_URL.replace("{uid}", uid).replace("{token}", token)
    minutes = settings.PASSWORD_RESET_TIMEOUT // 60
    text = render_to_string("polls/password_reset.txt", {"user": user, "uid": uid, "token": token, "link": link, "minutes": minutes})
    try:
        # To the address as we know it, never as it was asked for: the two may only look alike.
        send_mail("Another password for Nexus", text, None, [user.email])
    except (OSError, ValueError) as exc:  # smtplib's are OSErrors; their texts hold the address
        logger.error("user %d: the mail about the password could not be sent (%s)", user.pk, type(exc).__name__)
    else:
        if settings.EMAIL_BACKEND.endswith("dummy.EmailBackend"):
            logger.warning("user %d: no mail about the password was sent, for EMAIL_URL names no mail server", user.pk)


def reset_password(uid: str, token: str, new_password: str) -> None:
    """Give the account that the mail was for another password, and end all its tokens. Raises Refusal; a mail's token is good once."""
    with transaction.atomic():
        user = _user_of(uid)
        if user is None or not default_token_generator.check_token(user, token):
            raise problems.INVALID.says("The token is wrong, used or too old. Ask for another mail.", pointer="/token")
        _set_password(user, new_password)


def _user_of(uid: str) -> User | None:
    """Return the user of a mail's `uid`, held against another change of the password."""
    try:
        user_id = int(urlsafe_base64_decode(uid).decode())
    except ValueError:
        return None
    return User.objects.select_for_update().filter(pk=user_id, is_active=True).first()


def _set_password(user: User, password: str) -> None:
    with _told_at("/new_password"):
        password_validation.validate_password(password, user)
    user.set_password(password)
    user.save(update_fields=["password"])
    unused = OutstandingToken.objects.filter(user=user, blacklistedtoken=None)
    BlacklistedToken.objects.bulk_create([BlacklistedToken(token=token) for token in unused], ignore_conflicts=True)


@contextmanager
def _told_at(pointer: str) -> Iterator[None]:
    try:
        yield
    except ValidationError as exc:
        raise problems.INVALID.says(" ".join(exc.messages), pointer=pointer) from exc
