"""manage.py cache_stats: how often the shared cache has what it is asked for."""

from typing import Any

from django.core.management import BaseCommand, CommandError
from redis.exceptions import RedisError

from polls import watching


class Command(BaseCommand):
    help = "Show how often Redis found the keys that it was asked for, since it was started (also by others who use it)."

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            hits, misses = watching.keyspace()
        except LookupError as exc:
            raise CommandError(str(exc)) from None
        except (RedisError, OSError) as exc:  # its text may hold the password
            raise CommandError(f"Redis does not answer ({type(exc).__name__}).") from None
        asked = hits + misses
        self.stdout.write(f"{hits} hits, {misses} misses, hit ratio {f'{hits / asked:.1%}' if asked else 'unknown: nobody has asked yet'}")
