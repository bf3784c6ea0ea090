"""manage.py seed_demo: something to look at in a fresh installation."""

import json
import sys
from datetime import timedelta
from typing import Any, TextIO

from django.contrib.auth import get_user_model
from django.core.management import BaseCommand, CommandError
from django.utils.timezone import now

from polls import editing, voters
from polls.models import ApiClient, Poll, Scope

TITLE = "What shall we have for lunch?"


class Command(BaseCommand):
    help = (
        'Read {"admin_user", "admin_password", "client_key"} from standard input; keep a superuser with this password, an API '
        'client with this key and a demo poll. Prints {"poll_id"}. Repeatable. For development only.'
    )

    def handle(self, *args: Any, **options: Any) -> None:
        wanted = read(sys.stdin)
        admin, _ = get_user_model().objects.get_or_create(username=wanted["admin_user"], defaults={"is_staff": True, "is_superuser": True})
        admin.set_password(wanted["admin_password"])
        admin.save()
        ApiClient.objects.update_or_create(
            prefix=voters.key_prefix(wanted["client_key"]),
            defaults={"owner": admin, "name": "Demo client", "scopes": Scope.values, "key_hash": voters.key_hash(wanted["client_key"])},
        )
        poll = Poll.objects.filter(title=TITLE, owner=admin, closes_at__gt=now()).order_by("created_at").first()
        if poll is None:
            choices = [{"text": text} for text in ("Soup", "Salad", "Noodles")]
            closes_at = now() + timedelta(days=365)
            fields = {"title": TITLE, "voter_policy": "ip", "closes_at": closes_at, "options": choices}
            poll = editing.create_poll(admin, fields, at=now())
        self.stdout.write(json.dumps({"poll_id": str(poll.pk)}))


def read(source: TextIO) -> dict[str, str]:
    """Return what is wanted. Raises CommandError, without repeating the secrets in it."""
    try:
        wanted = json.load(source)
    except ValueError:
        raise CommandError("Standard input is no JSON.") from None
    names = ("admin_user", "admin_password", "client_key")
    if not isinstance(wanted, dict) or not all(isinstance(wanted.get(name), str) and wanted[name] for name in names):
        raise CommandError(f"Standard input must be a JSON object with the texts {', '.join(names)}.")
    prefix = voters.key_prefix(wanted["client_key"])
    if prefix is None or len(prefix) > 16:
        raise CommandError("client_key must read nxs_<8 letters or digits>_<secret>, without another underscore.")
    return wanted
