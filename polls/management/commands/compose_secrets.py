"""manage.py compose_secrets: the files that docker-compose.yml gives to its containers."""

import json
import secrets
from pathlib import Path
from typing import Any

from django.core.management import BaseCommand, CommandError, CommandParser

from tasks import permissions

# Whoever logs in to PostgreSQL, and as what: docs/operations.md, "Logins".
_ROLES = {"setup": "nexus", "web": "nexus_web", "worker": "nexus_worker"}


class Command(BaseCommand):
    help = (
        "Make the secrets that docker-compose.yml mounts: for each kind of process its own logins. What is there already stays. "
        "The folder is for you alone; the files in it are not, because each container reads its own as another user."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("folder", type=Path, help="the folder `secrets` beside docker-compose.yml")

    def handle(self, *args: Any, folder: Path, **options: Any) -> None:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write_secrets(folder)
        except OSError as exc:
            raise CommandError(f"The secrets in {folder} can't be read or made: {exc}") from exc
        self.stdout.write(
            f"The secrets are in {folder}. Keep a copy of voter_secret in another place: without it everybody could vote again."
        )


def _write_secrets(folder: Path) -> None:
    def kept(name: str, size: int = 32) -> str:
        path = folder / name
        return path.read_text().strip() if path.exists() else write(name, secrets.token_urlsafe(size))

    def write(name: str, text: str) -> str:
        path = folder / name
        path.write_text(text)
        path.chmod(0o644)
        return text

    for name in ("secret_key", "voter_secret"):
        kept(name, size=50)
    kept("grafana_password")
    if not (folder / "flower_basic_auth").exists():
        write("flower_basic_auth", f"flower:{secrets.token_urlsafe(32)}")
    for process, role in _ROLES.items():
        write(f"database_url_{process}", f"postgres://{role}:{kept(f'postgres_password_{process}')}@postgres:5432/nexus")
    passwords = {user: kept(f"rabbitmq_password_{user}") for user in permissions.rights()}
    for user, password in passwords.items():
        if user == "monitor":
            write("broker_api_url", f"http://{user}:{password}@rabbitmq:15672/api/")
        else:
            write(f"broker_url_{user}", f"amqp://{user}:{password}@rabbitmq:5672//")
    # The hashes in it have another salt each time, and mean the same.
    write("rabbitmq_definitions.json", json.dumps(permissions.definitions(passwords, "/"), indent=1))
