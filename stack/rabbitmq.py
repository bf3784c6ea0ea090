"""RabbitMQ: the one of CELERY_BROKER_URL, else a private node of an installed or an unpacked rabbitmq-server."""

import os
import re
import shutil
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from amqp.exceptions import AMQPError
from kombu import Connection
from kombu.exceptions import KombuError

from stack import packages
from stack.folder import Folder, StackError, write_private
from stack.program import Program, Server

# The raw scripts: Debian's /usr/sbin/rabbitmq-server refuses other users than rabbitmq.
SCRIPTS = [
    "/usr/lib/rabbitmq/bin/rabbitmq-server",  # Debian, Red Hat
    "/opt/rabbitmq/sbin/rabbitmq-server",  # the official image
    "/opt/homebrew/opt/rabbitmq/sbin/rabbitmq-server",
    "/usr/local/opt/rabbitmq/sbin/rabbitmq-server",
]
# Where Homebrew keeps Erlang when it is not linked.
ERLANG = ["/opt/homebrew/opt/erlang/bin", "/usr/local/opt/erlang/bin"]
INSTALL = (
    "Install RabbitMQ (apt install rabbitmq-server, brew install rabbitmq), "
    "or set CELERY_BROKER_URL to a running one (docker compose up -d rabbitmq)."
)


def resolve(folder: Folder, given_url: str | None, say: Callable[[str], None], nodes: int = 1) -> Server:
    if given_url:
        if not answers(given_url, seconds=5):
            message = f"CELERY_BROKER_URL is set, but no RabbitMQ at {urlsplit(given_url).hostname} lets us in with it."
            raise StackError(message + " Start it or correct the URL, or unset it to get a private node.")
        return Server(given_url, f"{urlsplit(given_url).hostname} (CELERY_BROKER_URL is set)")
    unpacked = folder / "packages"
    script = next((Path(path) for path in SCRIPTS if os.access(path, os.X_OK)), None)
    if script:
        erlang = search_path()
        env = {}
        found = f"scripts: {script.parent}"
    else:
        if not unpacked.exists():
            say("No RabbitMQ is installed: fetching its packages (35 MB) ...")
            unpack_packages(unpacked)
        script = unpacked / "usr/lib/rabbitmq/bin/rabbitmq-server"
        erlang = f"{unpacked}/usr/lib/erlang/bin:{search_path()}"
        env = {"ERL_ROOTDIR": f"{unpacked}/usr/lib/erlang"}
        found = f"none installed, packages unpacked in {unpacked}"
    script = script.resolve()
    epmd = shutil.which("epmd", path=erlang)
    if epmd is None:
        raise StackError(f"{script} was found, but not Erlang's epmd. {INSTALL}")
    return private_nodes(folder, script, epmd, env | {"PATH": erlang}, found, nodes)


def private_nodes(folder: Folder, script: Path, epmd: str, env: dict[str, str], found: str, count: int) -> Server:
    """Return a node of this stack's own, or a cluster of as many."""
    epmd_port, management_port = folder.port("epmd"), folder.port("rabbitmq_management")
    names = Program(
        name="epmd",  # Erlang's register of nodes. Without one of ours the node starts one that outlives it.
        command=[epmd, "-port", str(epmd_port), "-address", "127.0.0.1"],
        answers=lambda: accepts(epmd_port),
        stage=1,
    )
    programs = ["rabbitmq", *(f"rabbitmq{number}" for number in range(2, count + 1))]
    env |= {"ERL_EPMD_PORT": str(epmd_port), "ERL_EPMD_ADDRESS": "127.0.0.1"}
    nodes = [private_node(folder, name, programs, script, env) for name in programs]
    url = ";".join(node_url(folder, name) for name in programs)
    chosen = f"private, 127.0.0.1:{folder.port('rabbitmq')}, management {management_port} (CELERY_BROKER_URL is not set; {found})"
    password = folder.secret("rabbitmq_password")
    apis = ";".join(f"http://nexus:{password}@127.0.0.1:{folder.port(f'{name}_management')}/api/" for name in programs)
    return Server(url, chosen, (names, *nodes), env={"BROKER_API_URL": apis})


def node_url(folder: Folder, program: str) -> str:
    return f"amqp://nexus:{folder.secret('rabbitmq_password')}@127.0.0.1:{folder.port(program)}//"


def node_name(program: str) -> str:
    """Return what Erlang calls the node that the program runs."""
    return f"nexus{program.removeprefix('rabbitmq')}@localhost"


def private_node(folder: Folder, program: str, cluster: list[str], script: Path, env: dict[str, str]) -> Program:
    """Return one node. Several find each other while they start, so they have to start together."""
    home = folder / "rabbitmq" if program == cluster[0] else folder / "rabbitmq" / program
    home.mkdir(mode=0o700, exist_ok=True)
    url = node_url(folder, program)
    cookie = home / ".erlang.cookie"
    if not cookie.exists():
        write_private(cookie, folder.secret("erlang_cookie"))
    (home / "enabled_plugins").write_text("[rabbitmq_management].\n")  # for Flower
    write_private(
        home / "rabbitmq.conf",
        f"listeners.tcp.default = 127.0.0.1:{folder.port(program)}\n"
        f"management.tcp.ip = 127.0.0.1\n"
        f"management.tcp.port = {folder.port(f'{program}_management')}\n"
        f"default_user = nexus\n"
        f"default_pass = {folder.secret('rabbitmq_password')}\n"
        # Chosen: enough to stop cleanly on a full disk. RabbitMQ's own limit would refuse to work on a small laptop.
        f"disk_free_limit.absolute = 50MB\n" + (clustered(cluster) if len(cluster) > 1 else ""),
    )
    return Program(
        name=program,
        command=[str(script)],
        # The scripts don't quote their own directory: they bear a path with a space only like this.
        directory=script.parent,
        answers=lambda: answers(url),
        stage=2,
        env=env
        | {
            "RABBITMQ_SCRIPTS_DIR": ".",
            "RUNNING_UNDER_SYSTEMD": "true",  # the script becomes the node, rather than its parent
            "HOME": str(home),  # where Erlang looks for the cookie
            "LANG": "C.UTF-8",
            "ERL_CRASH_DUMP": str(home / "erl_crash.dump"),
            "RABBITMQ_NODENAME": node_name(program),
            "RABBITMQ_DIST_PORT": str(folder.port(f"{program}_dist")),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",  # nothing from /etc
            "RABBITMQ_CONFIG_FILE": str(home / "rabbitmq.conf"),
            "RABBITMQ_CONFIG_FILES": str(home / "conf.d"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(home / "advanced.config"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(home / "enabled_plugins"),
            "RABBITMQ_PLUGINS_DIR": str(script.parent.parent / "plugins"),
            "RABBITMQ_MNESIA_BASE": str(home / "data"),
            "RABBITMQ_FEATURE_FLAGS_FILE": str(home / "feature_flags"),
            "RABBITMQ_GENERATED_CONFIG_DIR": str(home / "config"),
            "RABBITMQ_LOG_BASE": str(home / "log"),
            "RABBITMQ_LOGS": "-",
        },
    )


def clustered(programs: list[str]) -> str:
    """Return what makes the nodes one cluster, in which a minority that is cut off stops taking messages."""
    members = "".join(f"cluster_formation.classic_config.nodes.{n} = {node_name(name)}\n" for n, name in enumerate(programs, 1))
    return (
        f"cluster_formation.peer_discovery_backend = classic_config\n{members}"
        "cluster_formation.randomized_startup_delay_range.min = 0\n"
        "cluster_formation.randomized_startup_delay_range.max = 1\n"
        "cluster_partition_handling = pause_minority\n"
    )


def connect(url: str, seconds: float) -> Any:
    """Log in, once: Connection.connect() would try again after two seconds. At the first node of the URL's that lets us in."""
    *others, last = url.split(";")
    for node in others:
        with suppress(OSError, AMQPError, KombuError):
            return _connection(node, seconds).transport.establish_connection()
    return _connection(last, seconds).transport.establish_connection()


def _connection(url: str, seconds: float) -> Connection:
    verified = {"cert_reqs": ssl.CERT_REQUIRED, "server_hostname": None}  # by itself kombu takes one for any host
    return Connection(url, connect_timeout=seconds, ssl=verified if url.startswith("amqps:") else False)


def answers(url: str, seconds: float = 2) -> bool:
    """Whether we can log in."""
    try:
        connect(url, seconds).close()
    except (OSError, AMQPError, KombuError):
        return False
    return True


def consumers(url: str, queue: str) -> int:
    """How many consumers the queue has; 0 if there is no such queue."""
    try:
        with connect(url, 2) as connection:
            return int(connection.channel().queue_declare(queue, passive=True).consumer_count)
    except (OSError, AMQPError, KombuError):
        return 0


def accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def search_path() -> str:
    return os.pathsep.join([os.environ.get("PATH", os.defpath), *ERLANG])


def unpack_packages(place: Path) -> None:
    """Unpack Debian's rabbitmq-server and Erlang there."""
    try:
        packages.unpack(place, find_packages, heed_rootdir)
    except StackError as exc:
        raise StackError(f"No RabbitMQ is installed. {exc}\n{INSTALL}") from exc


def heed_rootdir(part: Path) -> None:
    """Debian's erl knows its place by heart and ignores ERL_ROOTDIR."""
    for erl in part.glob("usr/lib/erlang/**/bin/erl"):
        erl.write_text(erl.read_text().replace("ROOTDIR=/usr/lib/erlang", 'ROOTDIR="$ERL_ROOTDIR"'))


def find_packages(part: Path, options: list[str]) -> list[str]:
    unwanted = ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")
    listing = ["depends", "--recurse", *(f"--no-{relation}" for relation in unwanted), "rabbitmq-server"]
    listed = packages.run(part, "apt-cache", *options, *listing)
    return list(set(re.findall(r"^(?:rabbitmq-server|erlang-\S+)", listed, re.MULTILINE)))
