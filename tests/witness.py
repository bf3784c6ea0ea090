"""The product, and a note of each request that reaches it and from which address: for tests/test_differential.py."""

import json
import os

from core.asgi import application as product
from polls import voters

NOTES = os.open(os.environ["WITNESS_NOTES"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


def note(method, path, headers, peer):
    lines = [value.decode("latin-1") for name, value in headers if name == b"x-forwarded-for"]
    ids = [value.decode("latin-1") for name, value in headers if name == b"x-request-id"]
    try:
        address = voters.client_address(peer, ",".join(lines), 1)
    except ValueError:
        address = "none"
    os.write(NOTES, json.dumps({"id": ids[-1] if ids else "", "method": method, "path": path, "address": address}).encode() + b"\n")


class Application:
    async def __call__(self, scope, receive, send):
        try:
            await product(scope, receive, send)
        finally:
            if scope["type"] == "http":
                note(scope["method"], scope["path"], scope["headers"], scope["client"][0])

    def answer_whole(self, method, path, headers, *others):
        answering = product.answer_whole(method, path, headers, *others)
        if answering is not None:
            note(method, path, headers, others[-1])
        return answering

    def refuse(self, refusal, headers):
        return product.refuse(refusal, headers)


application = Application()
