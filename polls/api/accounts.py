"""Accounts: signing up and in, staying signed in, signing out, passwords."""

from typing import Any

from django.contrib.auth.models import User
from django.utils.timezone import now
from drf_spectacular.utils import OpenApiResponse, extend_schema
from rest_framework import permissions, serializers, status
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from polls import accounts, problems
from polls.api.authentication import actor
from polls.api.callers import ByAttempts
from polls.api.schema import refuses
from polls.api.serializers import StrictSerializer, checked
from polls.roles import ROLES
from tasks import mail

# What holds a secret is kept by no cache on the way (RFC 6749, 5.1).
NOT_STORED = {"Cache-Control": "no-store"}
# Long enough for every password manager; hashing has to read all of it.
MAX_PASSWORD_LENGTH = 200


def password_field() -> serializers.CharField:
    return serializers.CharField(max_length=MAX_PASSWORD_LENGTH, trim_whitespace=False, style={"input_type": "password"})


class NewAccountSerializer(StrictSerializer):
    username = serializers.CharField(max_length=150, help_text="Letters, digits and @.+-_")
    email = serializers.EmailField(max_length=254)
    password = password_field()


class AccountSerializer(serializers.Serializer[Any]):
    username = serializers.CharField()
    email = serializers.CharField()
    roles = serializers.ListField(child=serializers.ChoiceField(choices=ROLES))


class SignInSerializer(StrictSerializer):
    username = serializers.CharField(max_length=150)
    password = password_field()


class RefreshSerializer(StrictSerializer):
    refresh = serializers.CharField(max_length=4000)


class TokensSerializer(serializers.Serializer[Any]):
    access = serializers.CharField(help_text="Send it as `Authorization: Bearer <access>`.")
    refresh = serializers.CharField(help_text="Good once, for the next tokens.")


class NewPasswordSerializer(StrictSerializer):
    old_password = password_field()
    new_password = password_field()


class PasswordResetSerializer(StrictSerializer):
    email = serializers.EmailField(max_length=254)


class PasswordResetConfirmSerializer(StrictSerializer):
    uid = serializers.CharField(max_length=100)
    token = serializers.CharField(max_length=100)
    new_password = password_field()


# Open to everybody: who signs in is nobody yet, and a token that has expired must not be in the way.
class Door(APIView):
    authentication_classes = []
    permission_classes = [permissions.AllowAny]
    throttle_classes = [ByAttempts]


class RegisterView(Door):
    @refuses(problems.MALFORMED, problems.INVALID, problems.FORBIDDEN, problems.NOT_JSON)
    @extend_schema(
        operation_id="accounts_create",
        tags=["auth"],
        summary="Make an account",
        description="Where REGISTRATION_OPEN is on. The e-mail address is not verified; it gets the mail when the password is forgotten.",
        request=NewAccountSerializer,
        responses={201: OpenApiResponse(AccountSerializer, "The account. Sign in with `POST /api/v1/auth/token`.")},
        auth=[{}],  # type: ignore[list-item] # the way to say: nobody needs any
    )
    def post(self, request: Request) -> Response:
        wanted = checked(NewAccountSerializer, request.data)
        user = accounts.register(**wanted, at=now())
        return Response(shown(user), status.HTTP_201_CREATED, headers={"Location": "/api/v1/auth/me"})


class SignInView(Door):
    @refuses(problems.MALFORMED, problems.INVALID, problems.UNAUTHENTICATED, problems.NOT_JSON)
    @extend_schema(
        operation_id="token_obtain",
        tags=["auth"],
        summary="Sign in",
        description="`access` is good for ACCESS_TOKEN_MINUTES (5), `refresh` for REFRESH_TOKEN_DAYS (7), unless the password changes.",
        request=SignInSerializer,
        responses=OpenApiResponse(TokensSerializer, "Send `Authorization: Bearer <access>`."),
        auth=[{}],  # type: ignore[list-item]
    )
    def post(self, request: Request) -> Response:
        return Response(TokensSerializer(accounts.sign_in(**checked(SignInSerializer, request.data))).data, headers=NOT_STORED)


class RefreshView(Door):
    throttle_classes = []  # a token can't be guessed

    @refuses(problems.MALFORMED, problems.INVALID, problems.UNAUTHENTICATED, problems.NOT_JSON)
    @extend_schema(
        operation_id="token_refresh",
        tags=["auth"],
        summary="Stay signed in",
        description="Gives new tokens for a `refresh` token, which is good once: of two requests at once with one token, one is refused.",
        request=RefreshSerializer,
        responses=OpenApiResponse(TokensSerializer, "Send `Authorization: Bearer <access>`."),
        auth=[{}],  # type: ignore[list-item]
    )
    def post(self, request: Request) -> Response:
        tokens = accounts.refresh(checked(RefreshSerializer, request.data)["refresh"])
        return Response(TokensSerializer(tokens).data, headers=NOT_STORED)


class SignOutView(Door):
    throttle_classes = []  # a token can't be guessed

    @refuses(problems.MALFORMED, problems.INVALID, problems.NOT_JSON)
    @extend_schema(
        operation_id="token_revoke",
        tags=["auth"],
        summary="Sign out",
        description="Ends the `refresh` token. An `access` token given out with it runs out by itself, within ACCESS_TOKEN_MINUTES.",
        request=RefreshSerializer,
        responses={204: OpenApiResponse(None, "The token is none any more; the same for one that had ended.")},
        auth=[{}],  # type: ignore[list-item]
    )
    def post(self, request: Request) -> Response:
        accounts.sign_out(checked(RefreshSerializer, request.data)["refresh"])
        return Response(status=status.HTTP_204_NO_CONTENT)


class AccountView(APIView):
    permission_classes = [permissions.IsAuthenticated]

    @refuses(problems.UNAUTHENTICATED, problems.FORBIDDEN)
    @extend_schema(
        operation_id="accounts_read",
        tags=["auth"],
        summary="Read who you are",
        responses=OpenApiResponse(AccountSerializer, "Your account."),
    )
    def get(self, request: Request) -> Response:
        return Response(shown(person(request), actor(request).roles), headers=NOT_STORED)


class PasswordView(APIView):
    permission_classes = [permissions.IsAuthenticated]
    throttle_classes = [ByAttempts]

    @refuses(problems.MALFORMED, problems.INVALID, problems.UNAUTHENTICATED, problems.FORBIDDEN, problems.NOT_JSON)
    @extend_schema(
        operation_id="password_change",
        tags=["auth"],
        summary="Change your password",
        description="Ends every token of yours, the one of this request too: sign in again.",
        request=NewPasswordSerializer,
        responses={204: OpenApiResponse(None, "It is changed.")},
    )
    def post(self, request: Request) -> Response:
        user = person(request)
        accounts.change_password(user, **checked(NewPasswordSerializer, request.data))
        return Response(status=status.HTTP_204_NO_CONTENT)


class PasswordResetView(Door):
    @refuses(problems.MALFORMED, problems.INVALID, problems.NOT_JSON)
    @extend_schema(
        operation_id="password_reset",
        tags=["auth"],
        summary="Ask for a mail about a forgotten password",
        description="It goes to every account with this address, and holds a token that is good for an hour.",
        request=PasswordResetSerializer,
        responses={202: OpenApiResponse(None, "If there is an account with this address, it gets a mail. The answer never tells.")},
        auth=[{}],  # type: ignore[list-item]
    )
    def post(self, request: Request) -> Response:
        wanted = checked(PasswordResetSerializer, request.data)
        mail.order_password_resets(accounts.ids_of_users_with(wanted["email"]))
        return Response(status=status.HTTP_202_ACCEPTED)


class PasswordResetConfirmView(Door):
    @refuses(problems.MALFORMED, problems.INVALID, problems.NOT_JSON)
    @extend_schema(
        operation_id="password_reset_confirm",
        tags=["auth"],
        summary="Choose another password with the token of the mail",
        description="The token is good once, for an hour. Ends every token by which the account is signed in.",
        request=PasswordResetConfirmSerializer,
        responses={204: OpenApiResponse(None, "It is changed.")},
        auth=[{}],  # type: ignore[list-item]
    )
    def post(self, request: Request) -> Response:
        accounts.reset_password(**checked(PasswordResetConfirmSerializer, request.data))
        return Response(status=status.HTTP_204_NO_CONTENT)


def person(request: Request) -> User:
    """Return the signed-in user; raises Refusal for an API client, which acts for an account and is none."""
    asks = actor(request)
    if asks.user is None or asks.client is not None:
        raise problems.FORBIDDEN.says("An API key has no account. Sign in with a name and a password.")
    return asks.user


def shown(user: User, roles: frozenset[str] | None = None) -> dict[str, Any]:
    """Return the account as the API shows it; without `roles`, with those that it is given with."""
    named = frozenset(user.groups.values_list("name", flat=True)) if roles is None else roles
    return AccountSerializer({"username": user.username, "email": user.email, "roles": [role for role in ROLES if role in named]}).data
