"""What the broker lets each kind of process do: the users and permissions of RabbitMQ, as definitions that it imports."""

import base64
import hashlib
import re
import secrets
from collections.abc import Mapping
from typing import Any

from django.conf import settings

# To write to the exchange without a name, which takes messages for any queue.
_PUBLISH = r"^amq\.default$"
_NOTHING = "^$"
# Workers tell Flower what they do, and answer what it asks them: Celery's event and remote control exchanges and queues.
_EVENTS = r"celeryev|celeryev\..+"
_CONTROL = r"celery\.pidbox|.+\.celery\.pidbox|reply\.celery\.pidbox|.+\.reply\.celery\.pidbox"


def rights() -> dict[str, tuple[str, str, str]]:
    """Return {user: (configure, write, read)}, each a regular expression of names of queues and exchanges."""
    votes = "|".join(map(re.escape, settings.VOTES_QUEUES))
    dead, periodic = re.escape(settings.DEAD_LETTER_QUEUE), re.escape(settings.PERIODIC_QUEUE)
    ours = f"{votes}|{periodic}"
    return {
        # Declares the queues. A queue with dead letters takes the right to read it, and to write to where they go.
        "setup": (f"^({ours}|{dead})$", rf"^(amq\.default|{ours}|{dead})$", f"^({ours}|{dead})$"),
        # Publishes votes and mails; operators look at dead letters there and send them back. Celery declares the queue it sends to.
        "web": (f"^{periodic}$", _PUBLISH, f"^{dead}$"),
        # The workers of both queues.
        "worker": (f"^({ours}|{_EVENTS}|{_CONTROL})$", rf"^(amq\.default|{_EVENTS}|{_CONTROL})$", f"^({ours}|{_CONTROL})$"),
        "beat": (f"^{periodic}$", _PUBLISH, _NOTHING),
        "flower": (f"^({_EVENTS}|{_CONTROL})$", f"^({_EVENTS}|{_CONTROL})$", f"^({_EVENTS}|{_CONTROL})$"),
        # For BROKER_API_URL: sees figures, touches nothing.
        "monitor": (_NOTHING, _NOTHING, _NOTHING),
    }


def definitions(passwords: Mapping[str, str], virtual_host: str) -> dict[str, Any]:
    """Return the definitions of these users; `passwords` has one for each of `rights()`. They hold hashes, no password."""
    users, permissions = [], []
    for user, (configure, write, read) in rights().items():
        name = settings.QUEUE_PREFIX + user
        tags = ["management"] if user == "monitor" else []
        hashing = "rabbit_password_hashing_sha256"
        users.append({"name": name, "password_hash": _hash(passwords[user]), "hashing_algorithm": hashing, "tags": tags})
        permissions.append({"user": name, "vhost": virtual_host, "configure": configure, "write": write, "read": read})
    return {"vhosts": [{"name": virtual_host}], "users": users, "permissions": permissions}


def _hash(password: str) -> str:
    """Return the password as RabbitMQ stores it: a salt of four bytes, and SHA-256 of both."""
    salt = secrets.token_bytes(4)
    return base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode()
