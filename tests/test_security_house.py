"""A production installation for real: every process as its own user, over TLS, its secrets in files; what works, and what is refused."""

import base64
import json
import os
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import Request, urlopen
from uuid import UUID, uuid4

import psycopg2
import pytest
from amqp.basic_message import Message
from amqp.exceptions import AccessRefused
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from polls import bundles
from polls.bundles import AcceptedVote
from stack import Stack
from stack.rabbitmq import connect
from stack.stack import OWN
from tests import conftest
from tests.conftest import ROOT, Api, free_port

wait_until = partial(conftest.wait_until, seconds=100)
pytestmark = pytest.mark.timeout(500)  # ten processes start
WEB = "core web --port {port}"
USERS = ("setup", "web", "worker", "beat", "flower", "monitor")


# --- Certificates -----------------------------------------------------------------------------------------------------


def make_certificates(folder):
    """ca.pem, which signed server.pem (with server.key) for 127.0.0.1 alone, and stranger.pem, which signed nothing."""
    keys = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("ca", "stranger", "server")}
    at = datetime.now(UTC)
    for name, key in keys.items():
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        is_ca = name != "server"
        issuer = subject if is_ca else x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ca")])
        made = x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
        made = made.not_valid_before(at - timedelta(days=1)).not_valid_after(at + timedelta(days=1))
        made = made.add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        if not is_ca:
            made = made.add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        certificate = made.sign(keys["ca"] if not is_ca else key, hashes.SHA256())
        (folder / f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_format = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "server.key").write_bytes(keys["server"].private_bytes(*key_format))


# --- The installation -------------------------------------------------------------------------------------------------


class House:
    """A stack's private servers with TLS, and commands of the product as one user of them each."""

    def __init__(self, stack, folder):
        self.stack, self.folder, self.logs = stack, folder, folder / "logs"
        self.logs.mkdir()
        self.port, self.flower_port, self.amqps, self.https = (free_port() for _ in range(4))
        self.secrets = {name: uuid4().hex + uuid4().hex for name in ("SECRET_KEY", "VOTER_SECRET", "web", "worker", "flower", "admin")}
        self.database = urlsplit(stack.env["DATABASE_URL"])

    def database_url(self, role="nexus", ca="ca"):
        password = self.database.password if role == "nexus" else self.secrets[role.removeprefix("nexus_")]
        options = f"sslmode=verify-full&sslrootcert={self.folder / ca}.pem"
        return f"postgres://{role}:{password}@127.0.0.1:{self.database.port}/nexus?{options}"

    def broker_url(self, user):
        return f"amqps://{user}:{self.password(user)}@127.0.0.1:{self.amqps}//"

    def password(self, user):
        return (self.folder / "passwords" / user).read_text()

    def env(self, user, *, ca="ca", **more):
        """The environment of this user's processes: what is secret is named by its file only."""
        role = {"web": "nexus_web", "worker": "nexus_worker", "beat": "nexus_worker"}.get(user, "nexus")
        secret = {
            "SECRET_KEY": self.secrets["SECRET_KEY"],
            "VOTER_SECRET": self.secrets["VOTER_SECRET"],
            # Flower needs none.
            "DATABASE_URL": "postgres://nobody@127.0.0.1:1/nothing" if user == "flower" else self.database_url(role, ca),
            "CELERY_BROKER_URL": self.broker_url(user),
            "BROKER_API_URL": f"https://monitor:{self.password('monitor')}@127.0.0.1:{self.https}/api/",
            "FLOWER_BASIC_AUTH": f"flora:{self.secrets['flower']}",
        }
        kept = self.folder / f"secrets-{user}-{ca}"
        kept.mkdir(mode=0o700, exist_ok=True)
        for name, value in secret.items():
            (kept / name).write_text(value + "\n")
        around = {
            name: value for name, value in os.environ.items() if name not in (*OWN, *secret, "QUEUE_PREFIX", "DJANGO_SETTINGS_MODULE")
        }
        open_ = {"DEBUG": "false", "ALLOWED_HOSTS": "127.0.0.1", "TRUSTED_PROXIES": "1", "SSL_CERT_FILE": str(self.folder / f"{ca}.pem")}
        roles = {"WEB_DATABASE_ROLE": "nexus_web", "WORKER_DATABASE_ROLE": "nexus_worker"}
        return around | open_ | roles | {f"{name}_FILE": str(kept / name) for name in secret} | more

    def run(self, *command, user="setup", stdin="", **env):
        given = self.env(user, **env)
        return subprocess.run([sys.executable, *command], cwd=ROOT, env=given, input=stdin, capture_output=True, text=True, timeout=90)

    @contextmanager
    def running(self, user, command, name=None, **env):
        with (self.logs / f"{name or user}.log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *command.split()], cwd=ROOT, env=self.env(user, **env), stdout=log, stderr=log
            )
            try:
                yield process
            finally:
                process.terminate()
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    def log(self, name):
        return (self.logs / f"{name}.log").read_text()

    def manage(self, method, path, body=None):
        """Ask the broker's management, as its administrator."""
        at = urlsplit(self.stack.env["BROKER_API_URL"])
        login = base64.b64encode(f"{at.username}:{at.password}".encode()).decode()
        headers = {"Authorization": f"Basic {login}", "Content-Type": "application/json"}
        address = f"http://127.0.0.1:{at.port}/api/{path}"
        with urlopen(Request(address, body and body.encode(), headers, method=method), timeout=10) as answer:
            return json.loads(answer.read() or "null")

    def ask_database(self, statement, *values):
        """Run a statement as the owner of the database."""
        session = psycopg2.connect(self.database_url())
        try:
            with session, session.cursor() as cursor:
                cursor.execute(statement, values)
                return cursor.fetchall() if cursor.description else None
        finally:
            session.close()


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """PostgreSQL and RabbitMQ that take TLS, with a role and a user for each kind of process."""
    folder = tmp_path_factory.mktemp("house")
    make_certificates(folder)
    stack = Stack(folder / "stack", env=dict.fromkeys(OWN, ""), programs=lambda env: [])
    stack.claim()
    try:
        stack.prepare()
        house = House(stack, folder)
        data = (stack.folder / "postgres").resolve() / "data"
        for name in ("server.pem", "server.key"):
            (data / name).write_bytes((folder / name).read_bytes())
            (data / name).chmod(0o600)
            os.chown(data / name, data.stat().st_uid, data.stat().st_gid)
        with (data / "postgresql.conf").open("a") as conf:
            conf.write("ssl = on\nssl_cert_file = 'server.pem'\nssl_key_file = 'server.key'\n")
        (data / "pg_hba.conf").write_text("hostssl all all 127.0.0.1/32 scram-sha-256\n")
        more = stack.folder / "rabbitmq/conf.d"
        more.mkdir()
        tls = {"cacertfile": "ca.pem", "certfile": "server.pem", "keyfile": "server.key"}
        lines = [f"{key}.{name} = {folder / file}" for key in ("ssl_options", "management.ssl") for name, file in tls.items()]
        lines += [
            f"listeners.ssl.default = 127.0.0.1:{house.amqps}",
            f"management.ssl.port = {house.https}",
            "management.ssl.ip = 127.0.0.1",
        ]
        (more / "tls.conf").write_text("\n".join(lines) + "\n")
        stack.start_servers()

        for role in ("web", "worker"):
            house.ask_database(f"CREATE ROLE nexus_{role} LOGIN PASSWORD '{house.secrets[role]}'")
        (folder / "passwords").mkdir()
        (folder / "passwords/web").write_text("chosen-by-hand\n")
        made = subprocess.run(
            [sys.executable, "manage.py", "broker_definitions", str(folder / "passwords")],
            cwd=ROOT,
            env={**os.environ, "QUEUE_PREFIX": "", "CELERY_BROKER_URL": "amqps://127.0.0.1//"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert made.returncode == 0, made.stderr
        house.definitions = made.stdout
        house.manage("POST", "definitions", made.stdout)
        yield house
    finally:
        stack.close()
        stack.destroy()


@pytest.fixture(scope="module")
def trust(servers):
    """This process trusts the servers, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(servers.folder / "ca.pem"))
        yield


@pytest.fixture(scope="module")
def house(servers, trust):
    """All processes of the product, at work; its admin and an API client of its."""
    admin = {"admin_user": "otto", "admin_password": servers.secrets["admin"], "client_key": f"nxs_{uuid4().hex[:8]}_{uuid4().hex}"}
    setup = servers.run("manage.py", "setup")
    assert setup.returncode == 0, setup.stderr
    seeded = servers.run("manage.py", "seed_demo", stdin=json.dumps(admin))
    assert seeded.returncode == 0, seeded.stderr

    worker = "celery -A core worker -P prefork -O fair --without-gossip --without-mingle --loglevel INFO"
    flower = f"celery -A core flower --conf=core/flower_config.py --address=127.0.0.1 --port={servers.flower_port}"
    with ExitStack() as running:
        for user, command, name in (
            ("web", WEB.format(port=servers.port), "web"),
            ("worker", f"{worker} -c 2 -Q votes.even,votes.odd -n votes@house", "worker"),
            ("worker", f"{worker} -c 1 -Q periodic -n periodic@house", "periodic"),
            ("beat", "celery -A core beat --loglevel INFO --pidfile= ", "beat"),
            ("flower", flower, "flower"),
        ):
            running.enter_context(servers.running(user, command, name))
        servers.poll_id = json.loads(seeded.stdout)["poll_id"]
        behind_tls = {"x-forwarded-proto": "https", "x-forwarded-for": "192.0.2.1"}
        servers.api = Api(servers.port, behind_tls)
        servers.client = Api(servers.port, {**behind_tls, "authorization": f"Api-Key {admin['client_key']}"})

        tokens = []

        def signs_in():  # a password's hash takes a while on a busy machine
            try:
                answer = servers.api.post("/api/v1/auth/token", {"username": "otto", "password": servers.secrets["admin"]})
            except OSError:
                return False
            tokens.append(answer.json["access"])
            return True

        wait_until(signs_in)
        servers.desk = Api(servers.port, {**behind_tls, "authorization": f"Bearer {tokens[-1]}"})
        yield servers


def test_all_processes_do_their_work_with_the_rights_that_they_have(house):
    """The way of a vote, and all else that crosses the broker: one test, for each step needs those before it."""
    poll = house.desk.get(f"/api/v1/polls/{house.poll_id}").json
    soup = poll["options"][0]["id"]

    def votes():
        return house.api.get(f"/api/v1/polls/{house.poll_id}/results").json["total_votes"]

    cast = house.api.post(f"/api/v1/polls/{house.poll_id}/votes", {"option": soup}, prefer="wait=10")
    assert (cast.status, cast.json["status"]) == (201, "counted")
    assert "the broker takes no votes" not in house.log("web")

    # A mail that a worker is to send.
    assert house.api.post("/api/v1/auth/password/reset", {"email": "nobody@example.org"}).status < 300

    # A dead letter that the broker makes, looked at and sent back, from where it comes again.
    with connect(house.broker_url("web"), 5) as connection:
        connection.channel().basic_publish(_message(b"[]"), routing_key="votes.even")
    wait_until(lambda: house.desk.get("/api/v1/dead-letters").json["total"] == 1)
    assert house.desk.post("/api/v1/dead-letters/replay", {}).status == 200
    wait_until(lambda: house.desk.get("/api/v1/dead-letters").json["total"] == 1)

    # What the clock starts: a bundle in the outbox is counted, and the broker's figures are read.
    vote = AcceptedVote(uuid4(), poll_id=UUID(house.poll_id), voter_key=uuid4(), selection=(int(soup),), accepted_at=1_800_000_000_000_000)
    house.ask_database("INSERT INTO outbox (body, kept_at) VALUES (%s, now())", bundles.write([vote]))
    wait_until(lambda: votes() == 2)
    assert house.desk.get(f"/api/v1/polls/{house.poll_id}/integrity").status == 200

    # Flower sees both workers, their tasks and the queues.
    login = base64.b64encode(f"flora:{house.secrets['flower']}".encode()).decode()
    flower = Api(house.flower_port, {"authorization": f"Basic {login}"})
    wait_until(lambda: set(flower.get("/api/workers?refresh=1").json) == {"votes@house", "periodic@house"})
    wait_until(lambda: "votes.count" in flower.get("/api/tasks").text)
    assert "votes.even" in flower.get("/broker").text

    for name in ("web", "worker", "periodic", "beat", "flower"):
        for failure in ("permission denied", "ACCESS_REFUSED", "Traceback"):
            assert failure not in house.log(name), (name, house.log(name)[-3000:])


def _message(body):
    return Message(body, content_type="application/json", delivery_mode=2)


@pytest.mark.parametrize(
    ("user", "act", "queue"),
    [
        ("web", "get", "votes.even"),
        ("web", "purge", "votes.even"),
        ("web", "delete", "votes.even"),
        ("web", "declare", "anything"),
        ("worker", "get", "votes.dead"),
        ("worker", "delete", "votes.dead"),
        ("worker", "declare", "anything"),
        ("beat", "get", "periodic"),
        ("beat", "delete", "votes.even"),
        ("flower", "get", "votes.even"),
        ("flower", "put", "votes.even"),
        ("monitor", "get", "votes.dead"),
        ("monitor", "put", "votes.even"),
    ],
)
def test_what_each_user_of_the_broker_may_not(house, user, act, queue):
    connection = connect(house.broker_url(user), 5)
    channel = connection.channel()
    acts = {
        "get": channel.basic_get,
        "purge": channel.queue_purge,
        "delete": channel.queue_delete,
        "declare": channel.queue_declare,
        "put": lambda name: channel.basic_publish_confirm(_message(b"[]"), routing_key=name),
    }
    with pytest.raises(AccessRefused):
        acts[act](queue)
    connection.collect()


def test_what_the_broker_is_told_holds_no_password_and_takes_ours(house):
    assert not [user for user in USERS if house.password(user).strip() in house.definitions]
    assert house.password("web") == "chosen-by-hand\n"
    assert {user["name"]: user["tags"] for user in json.loads(house.definitions)["users"]} == {
        **{user: [] for user in USERS},
        "monitor": ["management"],
    }
    for user in USERS[1:]:
        assert (house.folder / "passwords" / user).stat().st_mode & 0o077 == 0 or user == "web"


def test_every_connection_is_by_tls(house):
    def by_tls():
        return {(each["user"], each["ssl"]) for each in house.manage("GET", "connections") if each["user"] in USERS}

    wait_until(lambda: {user for user, _ in by_tls()} >= {"web", "worker", "beat", "flower"})  # figures are some seconds old
    assert {tls for _, tls in by_tls()} == {True}
    found = house.ask_database(
        "SELECT usename, bool_and(ssl) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE usename IS NOT NULL GROUP BY 1"
    )
    assert {"nexus_web", "nexus_worker"} <= {role for role, _ in found}
    assert all(tls for _, tls in found)


def test_a_server_with_a_certificate_of_somebody_elses_is_refused(house):
    database = house.run("manage.py", "setup", ca="stranger")
    assert database.returncode == 1
    assert "CommandError: The database of DATABASE_URL does not let us in: " in database.stderr
    assert "certificate verify failed" in database.stderr

    broker = house.run("manage.py", "setup", SSL_CERT_FILE=str(house.folder / "stranger.pem"))
    assert broker.returncode == 1
    assert "CommandError: The broker of CELERY_BROKER_URL does not let us in: " in broker.stderr
    assert "CERTIFICATE_VERIFY_FAILED" in broker.stderr

    with house.running("web", WEB.format(port=free_port()), "stranger", SSL_CERT_FILE=str(house.folder / "stranger.pem")):
        wait_until(lambda: "the broker takes no votes (its certificate: self-signed" in house.log("stranger"))


def test_the_next_node_is_asked_for_a_certificate_of_its_own(house):
    """kombu would expect the first node's name of the second."""
    urls = f"{house.broker_url('setup').replace('127.0.0.1', '127.0.0.2').replace(str(house.amqps), '1')};{house.broker_url('setup')}"
    (house.folder / "two-nodes").write_text(urls)
    declared = house.run("manage.py", "setup", CELERY_BROKER_URL_FILE=str(house.folder / "two-nodes"))
    assert declared.returncode == 0, declared.stderr


def test_no_secret_is_in_a_log_or_in_an_argument(house):
    secret = {
        *house.secrets.values(),
        *map(house.password, USERS),
        house.database.password,
        *house.stack.folder._read()["secrets"].values(),
    }
    secret = {value.strip() for value in secret}
    texts = {str(path): path.read_text(errors="replace") for path in [*house.logs.glob("*.log"), *(house.stack.folder / "log").glob("*")]}
    for arguments in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            texts[str(arguments)] = arguments.read_text(errors="replace")
        except OSError:  # it has ended
            continue
    assert len(texts) > 10
    assert [(place, value) for place, text in texts.items() for value in secret if value in text] == []
