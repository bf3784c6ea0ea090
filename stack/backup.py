"""`make backup` and `make restore`: the database, and what the broker was told, in one folder.

    python -m stack.backup backup [--to FOLDER] [--wait SECONDS] [--with-secrets]
    python -m stack.backup restore FOLDER [--replace] [--other-voter-secret]

Both use the servers of DATABASE_URL and CELERY_BROKER_URL; `python -m stack run` names this checkout's. A backup is a folder:

    manifest.json   what is in it: versions, counts, checksums, which secrets belong to it
    database.dump   all tables at one moment (pg_dump's custom format)
    broker.json     the definitions of our queues; not there when the broker's management did not answer
    secrets.env     only with --with-secrets: SECRET_KEY and VOTER_SECRET

Votes that wait in the queue are in none of these: the queue holds them, and the manifest says how many bundles they were.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from base64 import b64encode
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urlsplit
from urllib.request import Request, urlopen

import psycopg2
from amqp.exceptions import AMQPError, NotFound
from environ import Env
from kombu.exceptions import KombuError
from kombu.utils.url import url_to_parts

from stack import postgres, rabbitmq
from stack.folder import ROOT, StackError

FORMAT = 1
MANIFEST, DATABASE, BROKER, SECRETS = "manifest.json", "database.dump", "broker.json", "secrets.env"
SECRET_NAMES = ("SECRET_KEY", "VOTER_SECRET")
# Whose rows are counted when a backup is made, and again when it was put back.
COUNTED = ("polls", "votes", "outcomes", "outbox")
VOTES_QUEUES = ("votes.even", "votes.odd")
QUEUES = (*VOTES_QUEUES, "votes.dead", "periodic")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m stack.backup", description="Copies the data of an installation, and puts them back.")
    commands = parser.add_subparsers(dest="command", required=True)
    back = commands.add_parser("backup", help="copy database and broker definitions, while everything runs")
    back.add_argument("--to", type=Path, default=ROOT / ".local" / "backups", help="where its folder goes (default: .local/backups)")
    back.add_argument("--wait", type=float, default=30, metavar="SECONDS", help="how long to wait for an empty queue (default: 30)")
    back.add_argument("--with-secrets", action="store_true", help="put SECRET_KEY and VOTER_SECRET beside the data")
    put = commands.add_parser("restore", help="put a backup back while web and workers are stopped")
    put.add_argument("backup", type=Path)
    put.add_argument("--replace", action="store_true", help="forget what the database holds now")
    put.add_argument("--other-voter-secret", action="store_true", help="the old one is lost: restore all the same")
    given = parser.parse_args()
    os.umask(0o077)  # of all that is written here
    try:
        if given.command == "backup":
            back_up(given.to, wait_seconds=given.wait, with_secrets=given.with_secrets)
        else:
            restore(given.backup, replace=given.replace, other_voter_secret=given.other_voter_secret)
    except (StackError, OSError) as exc:
        print(f"Failed: {exc}", file=sys.stderr)
        return 1
    except psycopg2.Error as exc:
        print(f"Failed: PostgreSQL says: {str(exc).strip().splitlines()[0]}", file=sys.stderr)
        return 1
    return 0


# --- Backup -----------------------------------------------------------------------------------------------------------


def back_up(to: Path, *, wait_seconds: float, with_secrets: bool) -> Path:
    """Make a backup in a new folder under `to`; return it. Voting goes on meanwhile."""
    began = time.monotonic()
    if with_secrets and (unset := [name for name in SECRET_NAMES if not os.environ.get(name)]):
        raise StackError(f"{' and '.join(unset)} can't be put beside the data: not set here.")
    folder = to / f"nexus-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    part = folder.with_name(folder.name + ".part")  # what bears the name without .part is complete
    if folder.exists():
        raise StackError(f"{folder} is there already.")
    part.mkdir(parents=True)
    try:
        manifest = copy_into(part, wait_seconds=wait_seconds, with_secrets=with_secrets)
        os.sync()  # before it gets its name
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}\n  {counts(manifest['rows'])}; {size:,} bytes, {time.monotonic() - began:.1f} s")
    if manifest["waiting_bundles"]:
        print(f"  Without the votes of {manifest['waiting_bundles']} bundles that waited in the queue: only the queue has them.")
    if manifest["dead_letters"]:
        print(f"  Without {manifest['dead_letters']} dead letters: replay them, and make another backup.")
    if BROKER not in manifest["files"]:
        print(f"  Without {BROKER}: the broker's management does not answer. `manage.py setup` makes the queues without it, too.")
    if not with_secrets:
        print("  Without SECRET_KEY and VOTER_SECRET: keep them elsewhere. Without VOTER_SECRET nobody is known to have voted.")
    return folder


def copy_into(folder: Path, *, wait_seconds: float, with_secrets: bool) -> dict[str, Any]:
    """Write all files of the backup; return its manifest."""
    waiting, dead_letters = wait_for_the_queue(wait_seconds)
    with closing(connect()) as connection:
        found = dump(connection, folder / DATABASE)
    definitions = fetch_definitions()
    if definitions:
        (folder / BROKER).write_text(json.dumps(definitions, indent=1))
    if with_secrets:
        names = [name for name in (*SECRET_NAMES, *map(fallbacks_of, SECRET_NAMES)) if os.environ.get(name)]
        (folder / SECRETS).write_text("".join(f"{name}={os.environ[name]}\n" for name in names))
    manifest = {
        "format": FORMAT,
        **found,
        "waiting_bundles": waiting,
        "dead_letters": dead_letters,
        "secrets": {name: fingerprint(os.environ.get(name, "")) for name in SECRET_NAMES},
        # Open polls may need these, too, while VOTER_SECRET is being changed.
        "voter_secret_fallbacks": [fingerprint(secret) for secret in values_of("VOTER_SECRET")[1:]],
        "files": {path.name: checksum(path) for path in sorted(folder.iterdir())},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def wait_for_the_queue(seconds: float) -> tuple[int, int]:
    """Wait until no bundle waits to be taken by a worker; return how many do, and how many dead letters there are."""
    give_up_at = time.monotonic() + seconds
    while (waiting := waiting_bundles()) and time.monotonic() < give_up_at:
        time.sleep(0.1)
    return waiting, depth("votes.dead")


def dump(connection: Any, path: Path) -> dict[str, Any]:
    """Write all tables as they are at one moment; return what the manifest says of them, of the same moment."""
    connection.set_session(isolation_level="REPEATABLE READ", readonly=True)
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_export_snapshot(), now()")
        snapshot, made_at = cursor.fetchone()
        if not has_tables(cursor):
            raise StackError("The database of DATABASE_URL has no tables of Nexus: there is nothing to back up.")
        rows = {table: count(cursor, table) for table in COUNTED}
        cursor.execute("SELECT name FROM django_migrations WHERE app = 'polls' ORDER BY name")
        migrations = [name for (name,) in cursor]
        tool = find_tools(connection.server_version) / "pg_dump"
        # UUIDs hardly compress: level 6 takes three times as long as 1 for 5 % less.
        run(tool, "--format=custom", "--compress=1", "--no-owner", "--no-privileges", f"--snapshot={snapshot}", f"--file={path}")
    return {
        "made_at": made_at.astimezone(UTC).isoformat(),
        "postgres": connection.server_version // 10_000,
        "migrations": migrations,
        "rows": rows,
    }


# --- Restore ----------------------------------------------------------------------------------------------------------


def restore(folder: Path, *, replace: bool, other_voter_secret: bool) -> None:
    """Put the backup back, all of it or nothing, and make database and queues fit this version."""
    began = time.monotonic()
    manifest = read_manifest(folder)
    check_secrets(folder, manifest, other_voter_secret=other_voter_secret)
    if missing := [name for name in manifest["migrations"] if not (ROOT / "polls" / "migrations" / f"{name}.py").exists()]:
        raise StackError(f"The backup is of a newer version of Nexus ({missing[-1]} is not known here): restore it with that one.")
    waiting_bundles()  # raises StackError while the broker is away: `setup` will need it
    with closing(connect()) as connection, connection.cursor() as cursor:
        if connection.server_version // 10_000 < manifest["postgres"]:
            raise StackError(f"The backup is of PostgreSQL {manifest['postgres']}: it needs that or a newer one.")
        check_place(cursor, replace=replace)
        tools = find_tools(connection.server_version)
        connection.rollback()
        load(tools, folder / DATABASE)
        found = {table: count(cursor, table) for table in COUNTED}
        if found != manifest["rows"]:
            raise StackError(f"Restored were {counts(found)}; the backup had {counts(manifest['rows'])}.")
    print(f"The database is back as of {manifest['made_at']}: {counts(found)}; {time.monotonic() - began:.1f} s", flush=True)
    if other_voter_secret:
        manage("migrate", "--skip-checks")
        manage("rotate_voter_secret", "--lost", "--skip-checks")
    manage("setup")
    if (folder / BROKER).exists():
        put_definitions(json.loads((folder / BROKER).read_text()))
    manage("audit")
    waiting = waiting_bundles()
    print(f"Done in {time.monotonic() - began:.1f} s. Start Nexus: it counts the {waiting} bundles in the queue, and no vote twice.")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return what the backup says of itself. Raises StackError when it is not whole."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            raise StackError(f"The backup has format {manifest['format']}; this version reads format {FORMAT}.")
        for name, expected in {DATABASE: "", **manifest["files"]}.items():
            if checksum(folder / name) != expected:
                raise StackError(f"{folder / name} is not what was backed up: its checksum differs. Take another backup.")
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError) as exc:
        raise StackError(f"{folder} holds no whole backup: {type(exc).__name__} on reading it.") from exc
    return manifest


def check_secrets(folder: Path, manifest: dict[str, Any], *, other_voter_secret: bool) -> None:
    here = {name: [fingerprint(secret) for secret in values_of(name)] for name in SECRET_NAMES}
    changed = [name for name in SECRET_NAMES if manifest["secrets"][name] not in here[name]]
    if missing := set(manifest.get("voter_secret_fallbacks", ())) - set(here["VOTER_SECRET"]):
        changed.append("VOTER_SECRET")
    cure = f"Put the lines of {folder / SECRETS} into .env" if (folder / SECRETS).exists() else "Set the old one"
    if "VOTER_SECRET" in changed and not other_voter_secret:
        raise StackError(
            f"VOTER_SECRET{' (a fallback)' if missing else ''} is not the one of the backup: everybody could vote again, and "
            "no receipt would be known. "
            f"{cure}, and try again. Is it lost? ARGS=--other-voter-secret."
        )
    if "SECRET_KEY" in changed:
        print(f"SECRET_KEY is not the one of the backup: everybody has to sign in again. {cure} if that matters.")


def check_place(cursor: Any, *, replace: bool) -> None:
    """Refuse while Nexus runs, or, without `replace`, a database that holds polls or votes."""
    if any(rabbitmq.consumers(os.environ["CELERY_BROKER_URL"], queue_name(queue)) for queue in VOTES_QUEUES):
        raise StackError("Workers take from the queues of votes: stop Nexus first (`make down`).")
    cursor.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() "
        "AND backend_type IS DISTINCT FROM 'autovacuum worker'"
    )
    [others] = cursor.fetchone()
    if others:
        raise StackError(f"{others} other connections to the database are open: stop Nexus first (`make down`), and whoever else uses it.")
    if not replace and has_tables(cursor):
        rows = {table: count(cursor, table) for table in COUNTED}
        if any(rows.values()):
            raise StackError(f"The database holds {counts(rows)}. ARGS=--replace forgets them.")


def load(tools: Path, path: Path) -> None:
    """Replace all there is in the database, in one transaction: whatever goes wrong, it stays as it was."""
    with tempfile.TemporaryFile() as errors:
        unpack: list[str | Path] = [tools / "pg_restore", "--no-owner", "--no-privileges", "--file=-", path]
        reader = subprocess.Popen(unpack, stdout=subprocess.PIPE, stderr=errors)
        psql: list[str | Path] = [tools / "psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-o", os.devnull]
        writer = subprocess.Popen(psql, stdin=subprocess.PIPE, stderr=errors, env=libpq_environment())
        assert reader.stdout is not None
        assert writer.stdin is not None
        try:
            with writer.stdin as sql:
                sql.write(b"BEGIN;\nSET LOCAL client_min_messages = warning;\nDROP SCHEMA public CASCADE;\nCREATE SCHEMA public;\n")
                shutil.copyfileobj(reader.stdout, sql)
                # Without its COMMIT nothing happened: a pg_restore that was killed looks to psql like the end of the data.
                if reader.wait() == 0:
                    sql.write(b"COMMIT;\n")
        except BrokenPipeError:  # psql has ended, and said why
            reader.kill()
        failed = [process.wait() for process in (reader, writer)] != [0, 0]
        errors.seek(0)
        told = errors.read().decode(errors="replace").strip()
    if failed:
        raise StackError(f"PostgreSQL did not take the backup, and is as it was before: {told[-1500:]}")


# --- PostgreSQL -------------------------------------------------------------------------------------------------------


def connect() -> Any:
    return psycopg2.connect(**connection_parameters())


def connection_parameters() -> dict[str, Any]:
    """Return what DATABASE_URL says, in libpq's words, without limits of time for what takes long here."""
    given = Env.db_url_config(os.environ["DATABASE_URL"])  # as the settings read it
    names = {"NAME": "dbname", "USER": "user", "PASSWORD": "password", "HOST": "host", "PORT": "port"}
    found = {name: given[key] for key, name in names.items() if given.get(key)}
    limits = "-c statement_timeout=0 -c lock_timeout=10s -c idle_in_transaction_session_timeout=0"
    return {**found, "connect_timeout": 5, **given.get("OPTIONS", {}), "options": limits}


def libpq_environment() -> dict[str, str]:
    """Return the environment in which PostgreSQL's programs find the database; on their command line others would read the password."""
    others = {"dbname": "PGDATABASE", "target_session_attrs": "PGTARGETSESSIONATTRS"}
    variables = {others.get(name, f"PG{name.upper()}"): str(value) for name, value in connection_parameters().items()}
    return {**os.environ, **variables}


def find_tools(server_version: int) -> Path:
    """Return where the newest pg_dump, pg_restore and psql are: they must not be older than the server."""
    places = [path for pattern in postgres.PLACES for path in Path("/").glob(pattern)]
    if found := shutil.which("pg_dump"):
        places.append(Path(found).resolve().parent)
    versions = {place: major for place in places if (major := tools_version(place))}
    if not versions:
        place = postgres.install_wheel(None, print)
        versions = {place: tools_version(place)}
    place, newest = max(versions.items(), key=lambda item: item[1])
    if newest < (wanted := server_version // 10_000):
        raise StackError(f"PostgreSQL is version {wanted}, and no pg_dump, pg_restore and psql of that version are here. Install them.")
    return place


def tools_version(directory: Path) -> int:
    """Return the major version of PostgreSQL's client programs there; 0 when one of them is missing."""
    if not all(os.access(directory / name, os.X_OK) for name in ("pg_dump", "pg_restore", "psql")):
        return 0
    shown = subprocess.run([directory / "pg_dump", "--version"], capture_output=True, text=True).stdout
    match = re.search(r"(\d+)", shown)
    return int(match[1]) if match else 0


def has_tables(cursor: Any) -> bool:
    cursor.execute("SELECT to_regclass('django_migrations') IS NOT NULL AND to_regclass('votes') IS NOT NULL")
    return bool(cursor.fetchone()[0])


def count(cursor: Any, table: str) -> int:
    cursor.execute(f"SELECT count(*) FROM {table}")
    return int(cursor.fetchone()[0])


def run(*command: object) -> None:
    done = subprocess.run([str(word) for word in command], env=libpq_environment(), capture_output=True, text=True)
    if done.returncode:
        raise StackError(f"{Path(str(command[0])).name} failed: {done.stderr.strip()[-1500:]}")


def manage(*command: str) -> None:
    if subprocess.run([sys.executable, "manage.py", *command], cwd=ROOT).returncode:
        raise StackError(f"The database is restored, but `manage.py {' '.join(command)}` failed. Cure that, and run it again.")


# --- RabbitMQ ---------------------------------------------------------------------------------------------------------


def queue_name(queue: str) -> str:
    return os.environ.get("QUEUE_PREFIX", "") + queue


def depth(queue: str) -> int:
    """Return how many messages of the queue no worker has taken; 0 when there is no such queue."""
    try:
        with rabbitmq.connect(os.environ["CELERY_BROKER_URL"], 5) as connection:
            return int(connection.channel().queue_declare(queue_name(queue), passive=True).message_count)
    except NotFound:
        return 0
    except (OSError, AMQPError, KombuError) as exc:
        raise StackError(f"The broker of CELERY_BROKER_URL does not let us in: {type(exc).__name__}.") from exc


def waiting_bundles() -> int:
    return sum(depth(queue) for queue in VOTES_QUEUES)


def fetch_definitions() -> dict[str, Any] | None:
    """Return the definitions of our queues and of the policies that match them; None when the broker's management does not tell.

    Not the whole broker's: others may share it, and its users' password hashes are in there.
    """
    try:
        told = ask_management("GET")
    except (URLError, OSError, ValueError):
        return None
    names = [queue_name(queue) for queue in QUEUES]
    return {
        "rabbit_version": told.get("rabbit_version", told.get("rabbitmq_version")),
        "queues": [queue for queue in told.get("queues", []) if queue["name"] in names],
        "policies": [policy for policy in told.get("policies", []) if any(re.search(policy["pattern"], name) for name in names)],
    }


def put_definitions(definitions: dict[str, Any]) -> None:
    """Make what is missing; queues that are there stay as they are."""
    try:
        ask_management("POST", {name: definitions[name] for name in ("queues", "policies")})
    except HTTPError as exc:
        print(f"The broker did not take {BROKER} ({exc.code}). The queues are there all the same; its policies may not be.")
    except (URLError, OSError):
        print(f"The broker's management does not answer, so {BROKER} was not used. The queues are there all the same.")


def ask_management(method: str, body: object = None) -> Any:
    """Ask the broker's management for the definitions of our virtual host, or (POST) to take some."""
    broker = url_to_parts(os.environ["CELERY_BROKER_URL"].split(";")[0])
    api = urlsplit((os.environ.get("BROKER_API_URL") or f"http://{broker.hostname}:15672/api/").split(";")[0])
    given = f"{api.username}:{api.password}" if api.username else f"{quote(broker.username or 'guest')}:{quote(broker.password or 'guest')}"
    host = api.netloc.rpartition("@")[2]
    where = f"{api.scheme}://{host}{api.path.rstrip('/')}/definitions/{quote(broker.path or '/', safe='')}"
    headers = {"content-type": "application/json", "authorization": f"Basic {b64encode(unquote(given).encode()).decode()}"}
    content = None if body is None else json.dumps(body).encode()
    with urlopen(Request(where, content, headers, method=method), timeout=10) as answer:
        text = answer.read()
    return json.loads(text) if text else None


# --- Files ------------------------------------------------------------------------------------------------------------


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fallbacks_of(name: str) -> str:
    return f"{name}_FALLBACKS"


def values_of(name: str) -> list[str]:
    """Return the secret of this name, and those before it (core/settings.py)."""
    before = os.environ.get(fallbacks_of(name), "").split(",")
    return [os.environ.get(name, ""), *(secret.strip() for secret in before if secret.strip())]


def fingerprint(secret: str) -> str:
    """Return what tells whether a secret is the same one, and nothing else of it: it is long and random."""
    return hashlib.blake2b(secret.encode(), person=b"backup", digest_size=16).hexdigest()


def counts(rows: dict[str, int]) -> str:
    return ", ".join(f"{number:,} {table}" for table, number in rows.items())


if __name__ == "__main__":
    sys.exit(main())
