"""manage.py write_api_docs: what describes the API to programs, as files that are read without running it."""

import json
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import yaml
from django.conf import settings
from django.core.management import BaseCommand, CommandError
from drf_spectacular.generators import SchemaGenerator

from polls.api import postman

FOLDER = settings.BASE_DIR / "docs"


class Command(BaseCommand):
    help = "Write docs/openapi.yaml and docs/postman.json. With --check, only say whether they are what would be written."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--check", action="store_true", help="write nothing; fail when a file differs")

    def handle(self, *args: Any, **options: Any) -> None:
        texts = made()
        different = [path for path, text in texts.items() if not path.exists() or path.read_text() != text]
        if options["check"] and different:
            raise CommandError(
                f"{', '.join(path.name for path in different)} differ from the code. Run `make api-docs` and commit what it writes."
            )
        for path in [] if options["check"] else different:
            path.write_text(texts[path])
            self.stdout.write(f"{path.name} is written.")


def made() -> dict[Path, str]:
    """Return {path: text} of what the code describes."""
    schema = SchemaGenerator().get_schema(request=None, public=True)  # type: ignore[no-untyped-call]
    schema = json.loads(json.dumps(schema, default=str))  # plain: YAML has no words for lazy texts
    return {
        FOLDER / "openapi.yaml": yaml.safe_dump(schema, sort_keys=False, allow_unicode=True, width=140),
        FOLDER / "postman.json": json.dumps(postman.collection(schema), indent=1, ensure_ascii=False) + "\n",
    }
