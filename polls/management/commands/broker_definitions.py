"""manage.py broker_definitions: a broker's user for each kind of process."""

import json
import secrets
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from django.conf import settings
from django.core.management import BaseCommand, CommandError, CommandParser

from tasks import permissions


class Command(BaseCommand):
    help = (
        "Print RabbitMQ's definitions of a user for each kind of process, with what it needs and no more. "
        "Import them: rabbitmqctl import_definitions FILE, or `load_definitions` in rabbitmq.conf. Repeatable."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        users = ", ".join(permissions.rights())
        parser.add_argument("folder", type=Path, help=f"with a file for each user's password ({users}); those that are missing are made")

    def handle(self, *args: Any, folder: Path, **options: Any) -> None:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            passwords = {user: _password(folder / user) for user in permissions.rights()}
        except (OSError, UnicodeDecodeError) as exc:
            raise CommandError(f"The passwords in {folder} can't be read or made: {exc}") from exc
        if empty := [user for user, password in passwords.items() if not password]:
            raise CommandError(f"{folder / empty[0]} is empty; write a password into it, or remove it and one is made.")
        virtual_host = unquote(urlsplit(settings.CELERY_BROKER_URL.split(";")[0]).path[1:]) or "/"
        self.stdout.write(json.dumps(permissions.definitions(passwords, virtual_host), indent=1))


def _password(path: Path) -> str:
    if not path.exists():
        path.touch(mode=0o600)
        path.write_text(secrets.token_urlsafe(32))
    return path.read_text().strip()
