"""API clients: programs that act for their owner, known by a key of which only the hash is stored."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from django.conf import settings
from django.contrib.auth.models import Group, User
from django.db import transaction
from django.db.models import Exists, OuterRef, Q

from polls import problems, voters
from polls.models import ApiClient, Poll

# How exact `last_used_at` is: a client that casts votes at full rate writes its row once in this time.
USE_IS_NOTED_EVERY = timedelta(minutes=1)


# Roles (polls/roles.py) that may have clients.
OWNER_ROLES = ("owner", "admin")


def find(key: str, at: datetime) -> ApiClient | None:
    """Return the client whose key this is, its owner with it; None for a wrong, revoked or replaced one, or an inactive owner's."""
    found = find_by_prefix(voters.key_prefix(key) or "", at)
    return found[0] if found and voters.is_key(key, found[1]) else None


def find_by_prefix(prefix: str, at: datetime) -> tuple[ApiClient, bytes] | None:
    """Return the client that a key's public part names, and the hash that the whole key must have; None where `find` has none."""
    mine = Q(prefix=prefix) | Q(previous_prefix=prefix, previous_until__gt=at)
    # A client never may more than its owner: when that one has the role no more, the keys rest.
    owner_may = Exists(Group.objects.filter(name__in=OWNER_ROLES, user=OuterRef("owner"))) | Q(owner__is_superuser=True)
    client = ApiClient.objects.select_related("owner").filter(mine, owner_may, revoked_at=None, owner__is_active=True).first()
    if client is None:
        return None
    return client, bytes((client.key_hash if client.prefix == prefix else client.previous_key_hash) or b"")


def note_use(client_id: int, at: datetime) -> None:
    """Write down that the client was used, about a minute exact. One statement, which mostly writes nothing."""
    stale = Q(last_used_at=None) | Q(last_used_at__lt=at - USE_IS_NOTED_EVERY)
    ApiClient.objects.filter(stale, pk=client_id).update(last_used_at=at)


def make_client(owner: User, fields: Mapping[str, Any], at: datetime) -> tuple[ApiClient, str]:
    """Store a client, `fields` as ClientSerializer validates them; return it with its key, which nobody can read again."""
    client = ApiClient(owner=owner, created_at=at)
    key = give_key(client)
    _write(client, fields)
    client.save()
    return client, key


def change_client(client: ApiClient, changes: Mapping[str, Any]) -> ApiClient:
    """Apply the changes and return the client as it is then; raises Refusal when it is revoked."""
    with transaction.atomic():
        client = _held(client)
        _write(client, changes)
        client.save(update_fields=list(changes))
    return client


def rotate(client: ApiClient, at: datetime, overlap: timedelta | None = None) -> tuple[ApiClient, str]:
    """Give the client another key and return both; the old one works for `overlap` more, and one from before it no longer.

    It stays the same client to every poll: no voter it speaks for can vote a second time. Raises Refusal when it is revoked.
    """
    overlap = timedelta(hours=settings.KEY_ROTATION_HOURS) if overlap is None else overlap
    with transaction.atomic():
        client = _held(client)
        if overlap:
            client.previous_prefix, client.previous_key_hash, client.previous_until = client.prefix, client.key_hash, at + overlap
        else:
            client.previous_prefix = client.previous_key_hash = client.previous_until = None
        key = give_key(client)
        client.save(update_fields=["prefix", "key_hash", "previous_prefix", "previous_key_hash", "previous_until"])
    return client, key


def revoke(client_ids: list[int], at: datetime) -> int:
    """End all keys of these clients, for good; return how many clients still had one. Every web process knows within two seconds."""
    return ApiClient.objects.filter(pk__in=client_ids, revoked_at=None).update(revoked_at=at)


def give_key(client: ApiClient) -> str:
    """Put a fresh key's hash into the client, which is not saved, and return the key."""
    key = voters.new_client_key()
    client.prefix, client.key_hash = voters.key_prefix(key) or "", voters.key_hash(key)
    return key


def check_poll(owner: User, poll_id: UUID | None) -> None:
    """Refuse a poll that is not the owner's; none is all of them."""
    if poll_id is not None and not Poll.objects.filter(pk=poll_id, owner=owner).exists():
        raise problems.INVALID.says("The client's owner has no such poll.", pointer="/poll")


def _held(client: ApiClient) -> ApiClient:
    client = ApiClient.objects.select_for_update(of=["self"]).select_related("owner").get(pk=client.pk)
    if client.revoked_at is not None:
        raise problems.CLIENT_REVOKED.says("The client is revoked, for good. Make another one.")
    return client


def _write(client: ApiClient, fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        if name == "poll_id":
            check_poll(client.owner, value)
        setattr(client, name, sorted(set(value)) if name == "scopes" else value)
