"""API clients: making them, their keys, what they may do."""

from datetime import timedelta
from typing import Any, cast

from django.contrib.auth.models import User
from django.db.models import QuerySet
from django.utils.timezone import now
from drf_spectacular.utils import OpenApiExample, OpenApiResponse, extend_schema
from rest_framework import generics, permissions, serializers, status
from rest_framework.request import Request
from rest_framework.response import Response

from polls import clients, problems
from polls.api.accounts import NOT_STORED
from polls.api.authentication import actor
from polls.api.pages import NewestFirst
from polls.api.schema import refuses
from polls.api.serializers import StrictSerializer, checked
from polls.models import ApiClient, Scope

MAX_OVERLAP_HOURS = 720


class ClientSerializer(StrictSerializer, serializers.ModelSerializer[ApiClient]):
    """A client as the API shows it and as a change is sent. Never a key, nor its hash."""

    id = serializers.CharField(read_only=True)
    owner = serializers.CharField(source="owner.username", read_only=True)
    scopes = serializers.ListField(
        child=serializers.ChoiceField(choices=Scope.choices), allow_empty=False, max_length=len(Scope), help_text="What it may do."
    )
    poll = serializers.UUIDField(
        source="poll_id", required=False, allow_null=True, help_text="The one poll of yours that it is for; none: all of them."
    )
    previous_until = serializers.DateTimeField(
        read_only=True, allow_null=True, help_text="Until when the key before the last rotation works."
    )

    class Meta:
        model = ApiClient
        fields = ["id", "name", "owner", "scopes", "poll", "prefix", "created_at", "last_used_at", "revoked_at", "previous_until"]
        read_only_fields = ["prefix", "created_at", "last_used_at", "revoked_at"]
        extra_kwargs = {
            "prefix": {"help_text": "The part of the key to know it by: `nxs_<prefix>_…`"},
            "last_used_at": {"help_text": "About a minute exact."},
        }


class ClientWithKeySerializer(ClientSerializer):
    """A client with its new key, shown this once."""

    key = serializers.CharField(read_only=True, help_text="Send it as `Authorization: Api-Key <key>`.")

    class Meta(ClientSerializer.Meta):
        fields = [*ClientSerializer.Meta.fields, "key"]


class RotationSerializer(StrictSerializer):
    overlap_hours = serializers.IntegerField(
        required=False,
        min_value=0,
        max_value=MAX_OVERLAP_HOURS,
        help_text="How long the old key works beside the new one; KEY_ROTATION_HOURS (24) if not said, 0: no longer.",
    )


class ClientsOnes(generics.GenericAPIView[ApiClient]):
    """Who sees which clients: one's own, or all of them (polls/roles.py). The others are not there (404)."""

    permission_classes = [permissions.IsAuthenticated]
    serializer_class = ClientSerializer
    lookup_url_kwarg = "client_id"
    queryset = ApiClient.objects.select_related("owner")

    def check_permissions(self, request: Request) -> None:
        super().check_permissions(request)
        asks = actor(request)
        if asks.client:
            raise problems.FORBIDDEN.says("An API key can't manage API clients.")
        if not (asks.manages_clients or (asks.audits and request.method in permissions.SAFE_METHODS)):
            raise problems.FORBIDDEN.says("Your account has no role that manages API clients.")

    def get_queryset(self) -> QuerySet[ApiClient]:
        return actor(self.request).visible_clients(super().get_queryset())

    def to_change(self) -> ApiClient:
        client = self.get_object()
        if not actor(self.request).changes_client(client):
            raise problems.FORBIDDEN.says("Only its owner may change an API client.")
        return client


class ClientPages(NewestFirst):
    page_size_query_description = f"Clients on a page; {NewestFirst.page_size} if not said, {NewestFirst.max_page_size} at most."


class ClientsView(ClientsOnes, generics.ListAPIView[ApiClient]):
    pagination_class = ClientPages

    @refuses(problems.INVALID, problems.UNAUTHENTICATED, problems.FORBIDDEN)
    @extend_schema(
        operation_id="clients_list",
        tags=["clients"],
        summary="List your API clients, newest first",
        description="Admins and auditors see everybody's.",
        responses=OpenApiResponse(ClientSerializer(many=True), "A page of clients, the revoked ones too."),
    )
    def get(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        return super().get(request, *args, **kwargs)

    @refuses(problems.MALFORMED, problems.INVALID, problems.UNAUTHENTICATED, problems.FORBIDDEN, problems.NOT_JSON)
    @extend_schema(
        operation_id="clients_create",
        tags=["clients"],
        summary="Make an API client",
        request=ClientSerializer,
        examples=[OpenApiExample("kiosk", {"name": "Kiosk", "scopes": ["votes:cast"]}, request_only=True)],
        responses={201: OpenApiResponse(ClientWithKeySerializer, "The client with its key, shown this once; `Location` names it.")},
    )
    def post(self, request: Request) -> Response:
        made = clients.make_client(cast(User, request.user), checked(ClientSerializer, request.data), at=now())
        return with_key(*made, status.HTTP_201_CREATED)


class ClientView(ClientsOnes):
    @refuses(problems.UNAUTHENTICATED, problems.FORBIDDEN, problems.NOT_FOUND)
    @extend_schema(
        operation_id="clients_read",
        tags=["clients"],
        summary="Read an API client",
        responses=OpenApiResponse(ClientSerializer, "The client."),
    )
    def get(self, request: Request, client_id: int) -> Response:
        return Response(ClientSerializer(self.get_object()).data)

    @refuses(
        problems.MALFORMED,
        problems.INVALID,
        problems.UNAUTHENTICATED,
        problems.FORBIDDEN,
        problems.NOT_FOUND,
        problems.CLIENT_REVOKED,
        problems.NOT_JSON,
    )
    @extend_schema(
        operation_id="clients_change",
        tags=["clients"],
        summary="Change an API client",
        description="In force in every web process within two seconds.",
        request=ClientSerializer,
        responses=OpenApiResponse(ClientSerializer, "The client as it is now."),
    )
    def patch(self, request: Request, client_id: int) -> Response:
        client = self.to_change()
        changes = checked(ClientSerializer, request.data, partial=True)
        return Response(ClientSerializer(clients.change_client(client, changes)).data)

    @refuses(problems.UNAUTHENTICATED, problems.FORBIDDEN, problems.NOT_FOUND)
    @extend_schema(
        operation_id="clients_revoke",
        tags=["clients"],
        summary="Revoke an API client",
        description="For good, and in force in every web process within two seconds. The client stays to be read.",
        responses={204: OpenApiResponse(None, "Its keys are none any more; the same for one that was revoked before.")},
    )
    def delete(self, request: Request, client_id: int) -> Response:
        clients.revoke([self.to_change().pk], at=now())
        return Response(status=status.HTTP_204_NO_CONTENT)


class RotateView(ClientsOnes):
    @refuses(
        problems.MALFORMED,
        problems.INVALID,
        problems.UNAUTHENTICATED,
        problems.FORBIDDEN,
        problems.NOT_FOUND,
        problems.CLIENT_REVOKED,
        problems.NOT_JSON,
    )
    @extend_schema(
        operation_id="clients_rotate",
        tags=["clients"],
        summary="Give an API client another key",
        description="The old key works on for a while, so that the program can change over; one from before it ends now.",
        request=RotationSerializer,
        responses=OpenApiResponse(ClientWithKeySerializer, "The client with its new key, which is shown this once."),
    )
    def post(self, request: Request, client_id: int) -> Response:
        client = self.to_change()
        hours = checked(RotationSerializer, request.data).get("overlap_hours")
        overlap = None if hours is None else timedelta(hours=hours)
        return with_key(*clients.rotate(client, at=now(), overlap=overlap), status.HTTP_200_OK)


def with_key(client: ApiClient, key: str, code: int) -> Response:
    shown = {**ClientSerializer(client).data, "key": key}
    return Response(shown, code, headers={**NOT_STORED, "Location": f"/api/v1/clients/{client.pk}"})
