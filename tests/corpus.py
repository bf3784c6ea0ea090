"""Odd requests, of which any two readers might make something different: how they are framed, what they ask for, and how they arrive.

Written so that a case reads as what is sent. `@@@@` stands for its number; `POLL` for a poll's path; `OPTION` for the id of one of its
options. Each request says in X-Request-ID which it is: `@@@@.1`, `@@@@.2`; one that only a wrong reading finds is `@@@@.hidden`, and says
that it comes from FORGED. `FRONT` is where the line stands that a proxy in front would have written, when there is none.
"""

from dataclasses import dataclass

FORGED = "203.0.113.7"
VOTE = b'{"option": "OPTION"}'
PATH = "/api/v1/polls/" + 36 * "P"
# As long as what takes its place: it stands in bodies, whose length is said.
HIDDEN = (
    b"POST POLL/votes HTTP/1.1\r\nHost: localhost\r\nX-Request-ID: @@@@.hidden\r\nX-Forwarded-For: 203.0.113.7\r\n"
    b'Content-Type: application/json\r\nContent-Length: 20\r\n\r\n{"option": "OPTION"}'
).replace(b"POLL", PATH.encode())
# For who ends a connection where HTTP/1.0 or a wish for another protocol ends, there is no second request; for a front there is.
NEXT = HIDDEN.replace(b"hidden", b"2")


@dataclass(frozen=True)
class Case:
    """`pieces` are sent one after the other; at most `requests` are to be answered, in their order, and to reach the product.

    `by_front`: as many as a front may make of it. `cuts`: where a piece ends instead, once it is written.
    """

    name: str
    pieces: tuple[bytes, ...]
    requests: int = 1
    by_front: int = 0
    ends: bool = True
    cuts: tuple[int, ...] = ()


def head(line, *fields, number=1):
    written = [line, "Host: localhost", f"X-Request-ID: @@@@.{number}", "FRONT", *fields]
    return "\r\n".join(part for part in written if part).encode("latin-1") + b"\r\n\r\n"


def chunked(body, trailers=b""):
    return b"%x\r\n%b\r\n0\r\n%b\r\n" % (len(body), body, trailers)


JSON = "Content-Type: application/json"
POSTS = {"vote": "POST POLL/votes HTTP/1.1", "sign-in": "POST /api/v1/auth/token HTTP/1.1"}
GETS = {"results": "GET POLL/results HTTP/1.1", "poll": "GET POLL HTTP/1.1"}


def get(number, *fields, path="POLL/results", version="1.1"):
    return head(f"GET {path} HTTP/{version}", *fields, number=number)


def vote(number, *fields):
    return head(POSTS["vote"], JSON, "Content-Length: 20", *fields, number=number) + VOTE


def upgrades():
    for protocol in ("foo", "h2c", "websocket", "h2c, WebSocket", "TLS/1.0"):
        for target, line in {**POSTS, "results": GETS["results"]}.items():
            asked = (JSON, "Connection: Upgrade", f"Upgrade: {protocol}")
            for way, padding in (("together", 0), ("parted", 0), ("padded", 200_000)):
                body = b"\r\n" * (padding // 2) + HIDDEN
                for framing, field, sent in (
                    ("length", f"Content-Length: {len(body)}", body),
                    ("chunks", "Transfer-Encoding: chunked", chunked(body)),
                ):
                    begun = head(line, *asked, field)
                    pieces = (begun, sent) if way == "parted" else (begun + sent,)
                    yield Case(f"upgrade to {protocol}, {target}, {framing}, {way}", pieces)
    for protocol in ("foo", "h2c", "websocket"):
        offered = ("Connection: Upgrade, HTTP2-Settings", f"Upgrade: {protocol}", "HTTP2-Settings: AAMAAABkAAQAAP__")
        yield Case(f"upgrade to {protocol}, a right vote", (vote(1, *offered),))
        for target, line in GETS.items():
            yield Case(f"upgrade to {protocol}, {target}, and more behind it", (head(line, *offered) + NEXT,), 1, 2)
            yield Case(f"upgrade to {protocol}, {target}, and more later", (head(line, *offered), NEXT), 1, 2)
    yield Case("upgrade without Connection", (vote(1, "Upgrade: foo") + get(2),), 2)
    yield Case("Connection: Upgrade alone", (vote(1, "Connection: Upgrade") + get(2),), 2)
    yield Case("upgrade by HTTP/1.0", (get(1, "Connection: Upgrade", "Upgrade: foo", version="1.0") + NEXT,), 1, 2)
    yield Case("CONNECT", (head("CONNECT POLL/votes HTTP/1.1") + NEXT,), 1, 2)
    yield Case("CONNECT to a host", (head("CONNECT localhost:443 HTTP/1.1") + NEXT,), 1, 2)
    yield Case("prior knowledge", (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00",))


def trailers():
    forged = {
        "X-Forwarded-For": FORGED,
        "x-forwarded-for": f"{FORGED}, {FORGED}",
        "Authorization": "Api-Key x",
        "Host": "evil.example",
        "Content-Type": "text/plain",
        "X-Request-ID": "@@@@.hidden",
        "Connection": "close",
        "Upgrade": "foo",
        "Content-Length": "3",
        "Transfer-Encoding": "chunked",
        "Idempotency-Key": "other",
    }
    for name, value in forged.items():
        written = f"{name}: {value}\r\n".encode()
        for target, line in POSTS.items():
            begun = head(line, JSON, "Transfer-Encoding: chunked", f"Trailer: {name}", "TE: trailers")
            yield Case(f"trailer {name}, {target}, together", (begun + chunked(VOTE, written),))
            yield Case(f"trailer {name}, {target}, parted", (begun, chunked(VOTE)[:-2], written + b"\r\n"))


def framings():
    lengths = {
        "two lengths": ("Content-Length: 20", "Content-Length: 5"),
        "two equal lengths": ("Content-Length: 20", "Content-Length: 20"),
        "a list of lengths": ("Content-Length: 20, 20",),
        "a length with a sign": ("Content-Length: +20",),
        "a negative length": ("Content-Length: -1",),
        "a length in hexadecimal": ("Content-Length: 0x14",),
        "a length with an underscore": ("Content-Length: 2_0",),
        "a length beyond 64 bits": ("Content-Length: 18446744073709551636",),
        "an empty length": ("Content-Length:",),
        "a length with zeros before it": ("Content-Length: 0020",),
        "a length with spaces around it": ("Content-Length:   20  ",),
        "a length behind a space": ("Content-Length : 20",),
        "a length that is folded": ("Content-Length:\r\n 20",),
        "a length in full-width digits": ("Content-Length: \xb2\xb0",),
        "a length with an underscored name": ("Content_Length: 0", "Content-Length: 20"),
        "a length that Connection names": ("Connection: Content-Length", "Content-Length: 20"),
        "no length": (),
    }
    for name, fields in lengths.items():
        for target, line in POSTS.items():
            yield Case(f"{name}, {target}", (head(line, JSON, *fields) + VOTE,), 2)
    codings = {
        "length, then chunks": ("Content-Length: 5", "Transfer-Encoding: chunked"),
        "chunks, then length": ("Transfer-Encoding: chunked", "Content-Length: 5"),
        "chunks twice": ("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"),
        "chunks, then identity": ("Transfer-Encoding: chunked", "Transfer-Encoding: identity"),
        "identity": ("Transfer-Encoding: identity", "Content-Length: 20"),
        "gzip, chunked": ("Transfer-Encoding: gzip, chunked",),
        "chunked, gzip": ("Transfer-Encoding: chunked, gzip",),
        "xchunked": ("Transfer-Encoding: xchunked", "Content-Length: 5"),
        "chunked in capitals": ("Transfer-Encoding: CHUNKED",),
        "chunked with a parameter": ("Transfer-Encoding: chunked;q=1",),
        "chunked and a comma": ("Transfer-Encoding: chunked,",),
        "chunked behind a vertical tab": ("Transfer-Encoding: \x0bchunked", "Content-Length: 5"),
        "chunked behind a tab": ("Transfer-Encoding:\tchunked",),
        "chunked in quotes": ('Transfer-Encoding: "chunked"', "Content-Length: 5"),
        "coding behind a space": ("Transfer-Encoding : chunked", "Content-Length: 5"),
        "coding that is folded": ("Transfer-Encoding:\r\n chunked", "Content-Length: 5"),
        "coding with an underscored name": ("Transfer_Encoding: chunked", "Content-Length: 5"),
        "coding that Connection names": ("Connection: Transfer-Encoding", "Transfer-Encoding: chunked"),
        "coding behind a bare CR": ("X: y\rTransfer-Encoding: chunked", "Content-Length: 5"),
        "coding behind a bare LF": ("X: y\nTransfer-Encoding: chunked", "Content-Length: 5"),
        "coding behind NUL": ("Transfer-Encoding: \0chunked", "Content-Length: 5"),
    }
    for name, fields in codings.items():
        for target, line in POSTS.items():
            yield Case(f"{name}, {target}", (head(line, JSON, *fields) + b"0\r\n\r\n" + vote(2),), 2)
    begun = head(POSTS["vote"], JSON, "Transfer-Encoding: chunked")
    sizes = {
        "0x14": b"0x14",
        "+14": b"+14",
        "-1": b"-1",
        "zeros": b"0000000000000014",
        "17 digits": b"10000000000000014",
        "a space": b"14 ",
        "a tab": b"14\t",
        "an extension": b"14;a=b",
        "an extension with a quote": b'14;a="b\r\n"',
        "an extension with LF": b"14;a\nb",
        "an underscore": b"1_4",
        "nothing": b"",
        "a space before it": b" 14",
        "capitals": b"14",
    }
    for name, size in sizes.items():
        yield Case(f"a chunk's size: {name}", (begun + size + b"\r\n" + VOTE + b"\r\n0\r\n\r\n",))
    ends = {
        "LF alone": b"14\n" + VOTE + b"\n0\n\n",
        "CR alone": b"14\r" + VOTE + b"\r0\r\r",
        "nothing after the chunk": b"14\r\n" + VOTE + b"0\r\n\r\n",
        "more than the size": b"5\r\n" + VOTE + b"\r\n0\r\n\r\n",
        "two ends": b"14\r\n" + VOTE + b"\r\n0\r\n\r\n0\r\n\r\n",
        "LF after the last chunk": b"14\r\n" + VOTE + b"\r\n0\n\r\n",
    }
    for name, body in ends.items():
        yield Case(f"chunks that end by {name}", (begun + body,), 2 if name == "two ends" else 1)
    for target, line in GETS.items():
        yield Case(f"GET with a body, {target}", (head(line, f"Content-Length: {len(HIDDEN)}") + HIDDEN + get(2),), 2)
        yield Case(f"GET with chunks, {target}", (head(line, "Transfer-Encoding: chunked") + chunked(HIDDEN) + get(2),), 2)
        yield Case(f"HEAD with a body, {target}", (head(line.replace("GET", "HEAD"), f"Content-Length: {len(HIDDEN)}") + HIDDEN,))
    yield Case("chunks by HTTP/1.0", (head("POST POLL/votes HTTP/1.0", JSON, "Transfer-Encoding: chunked") + chunked(VOTE),))
    yield Case("kept alive by HTTP/1.0", (get(1, "Connection: keep-alive", version="1.0") + NEXT,), 1, 2)
    waits = head(POSTS["vote"], JSON, "Content-Length: 20", "Expect: 100-continue")
    yield Case("a body once it is asked for", (waits, VOTE))
    yield Case("a body that is asked for, at once", (waits + VOTE,))
    refused = head(POSTS["vote"], "Content-Type: text/plain", f"Content-Length: {len(HIDDEN)}", "Expect: 100-continue")
    yield Case("a request in the place of a body that is refused", (refused, HIDDEN))
    yield Case("another expectation", (vote(1, "Expect: tea"),))


def heads():
    lines = {
        "space before the colon": "X-A : b",
        "no name": ": b",
        "no colon": "X-A",
        "folded": "X-A: b\r\n c",
        "a tab in a name": "X\tA: b",
        "NUL in a value": "X-A: \0",
        "CR in a value": "X-A: b\rc",
        "UTF-8 in a value": "X-A: \xc3\xa9",
        "UTF-8 in a name": "X-\xc3\xa9: b",
        "a quote in a name": 'X"A: b',
        "folded by a tab": "X-A: b\r\n\tX-B: c",
    }
    for name, line in lines.items():
        for target in POSTS:
            yield Case(f"a line with {name}, {target}", (head(POSTS[target], line, JSON, "Content-Length: 20") + VOTE,))
    doubled = {
        "Host": ("localhost", "localhost"),
        "Authorization": ("Api-Key x", "Api-Key y"),
        "Idempotency-Key": ("a", "b"),
        "Content-Type": ("text/plain", "application/json"),
        "Voter-Token": ("a", "b"),
        "Vote-Receipt": ("a", "b"),
        "Content-Encoding": ("gzip", "identity"),
        "Origin": ("http://a", "http://b"),
    }
    for name, (one, other) in doubled.items():
        for target, line in POSTS.items():
            fields = [f"{name}: {one}", f"{name}: {other}", "" if name == "Content-Type" else JSON, "Content-Length: 20"]
            yield Case(f"{name} twice, {target}", (head(line, *fields) + VOTE,))
    for host in (
        "",
        "evil.example",
        "localhost:80",
        "LOCALHOST",
        "localhost.",
        "localhost@evil.example",
        "localhost, evil.example",
        "[::1]:8000",
    ):
        sent = vote(1).replace(b"Host: localhost", f"Host: {host}".encode())
        yield Case(f"Host: {host or 'none'}", (sent,))
    yield Case("no Host", (vote(1).replace(b"Host: localhost\r\n", b""),))
    yield Case("no Host, HTTP/1.0", (get(1, version="1.0").replace(b"Host: localhost\r\n", b""),))
    for name in ("Content-Encoding: gzip", "Content-Encoding: identity", "Content-Encoding: br, gzip"):
        for target, line in POSTS.items():
            yield Case(f"{name}, {target}", (head(line, name, JSON, "Content-Length: 20") + VOTE,))
    addresses = {
        "one": [f"X-Forwarded-For: {FORGED}"],
        "two": [f"X-Forwarded-For: {FORGED}", f"X-Forwarded-For: {FORGED}"],
        "with an underscore": [f"X_Forwarded_For: {FORGED}"],
        "behind a space": [f"X-Forwarded-For : {FORGED}"],
        "Forwarded": [f"Forwarded: for={FORGED}"],
        "X-Real-IP": [f"X-Real-IP: {FORGED}", f"True-Client-IP: {FORGED}"],
        "empty behind it": [f"X-Forwarded-For: {FORGED},"],
    }
    for name, fields in addresses.items():
        for target, line in {**POSTS, **GETS}.items():
            fields_first = "\r\n".join(fields)  # before the line that the front writes
            sent = head(line, *([JSON, "Content-Length: 20"] if target in POSTS else [])) + (VOTE if target in POSTS else b"")
            yield Case(f"a forged address, {name}, {target}", (sent.replace(b"FRONT", fields_first.encode() + b"\r\nFRONT"),))


def targets():
    paths = [
        "POLL/%76otes",
        "POLL/vote%73",
        "POLL%2fvotes",
        "POLL%2Fvotes",
        "/%61pi/v1/voters",
        "POLL/votes/",
        "POLL/votes//",
        "POLL//votes",
        "//POLL/votes",
        "POLL/./votes",
        "POLL/x/../votes",
        "POLL/%2e%2e/votes",
        "POLL/votes%00",
        "POLL/votes%20",
        "POLL/votes?a=%76",
        "POLL/votes#a",
        "POLL/votes;a=b",
        "http://localhost/api/v1/voters",
        "http://evil.example/api/v1/voters",
        "POLL/votes%",
        "POLL/votes%zz",
        "POLL\\votes",
        "POLL/votes/%62atch",
        "/api/v1/votes/%73tatus",
        "/%61dmin/login/",
        "*",
    ]
    for path in paths:
        yield Case(f"POST {path}", (head(f"POST {path} HTTP/1.1", JSON, "Content-Length: 20") + VOTE,))
    for line in (
        "GET POLL/results",
        "GET POLL/results HTTP/0.9",
        "GET POLL/results HTTP/2.0",
        "GET POLL/results HTTP/1.2",
        "GET POLL/results HTTP/1.10",
        "GET  POLL/results HTTP/1.1",
        "GET\tPOLL/results HTTP/1.1",
        "GET POLL/results\tHTTP/1.1",
        "GET POLL/results http/1.1",
        "get POLL/results HTTP/1.1",
        "GETS POLL/results HTTP/1.1",
        "TRACE POLL/results HTTP/1.1",
        "GET POLL/re sults HTTP/1.1",
        "GET POLL/r\xc3\xa9sults HTTP/1.1",
        "OPTIONS * HTTP/1.1",
        "GET POLL/result%73 HTTP/1.1",
        "GET POLL%2fresults HTTP/1.1",
        "GET /%72eadyz HTTP/1.1",
    ):
        yield Case(f"line {line!r}", (head(line),))


def pipelines():
    yield Case("five votes and results", (b"".join(vote(n) if n % 2 else get(n) for n in range(1, 6)),), 5)
    yield Case("nine by both ways", (b"".join(get(n, path="POLL/results" if n % 2 else "POLL") for n in range(1, 10)),), 9)
    yield Case("one after a last one", (get(1, "Connection: close") + HIDDEN,))
    yield Case("one after a last one, of Django's", (get(1, "Connection: close", path="POLL") + HIDDEN,))
    yield Case("one after a last vote", (vote(1, "Connection: close") + HIDDEN,))
    yield Case("one after a last one, later", (get(1, "Connection: close", path="POLL"), HIDDEN))
    yield Case("one after HTTP/1.0", (get(1, version="1.0") + HIDDEN,))
    yield Case("lines' ends before a request", (b"\r\n\r\n" + get(1) + b"\r\n\r\n" + get(2),), 2)
    yield Case("nonsense after a request", (get(1) + b"\0\x01\x02 nonsense\r\n\r\n",), 2)
    yield Case("nonsense after one of Django's", (get(1, path="POLL") + b"\0\x01\x02 nonsense\r\n\r\n",), 2)
    yield Case(
        "a broken body after two requests",
        (get(1, path="POLL") + get(2) + head(POSTS["vote"], JSON, "Transfer-Encoding: chunked", number=3) + b"zz\r\n" + HIDDEN,),
        3,
    )
    for cut in (1, 5, 30, 90, 150):
        sent = vote(1) + get(2) + vote(3)
        yield Case(f"three, cut at {cut}", (sent,), 3, cuts=(cut,))
        yield Case(f"three, cut at {cut} and everywhere after", (sent,), 3, cuts=tuple(range(cut, 800, 60)))
    yield Case("a head that does not end", (vote(1)[:-30],), ends=False)
    yield Case("a body that does not end", (vote(1)[:-3],), ends=False)


def corpus():
    found = [case for make in (upgrades, trailers, framings, heads, targets, pipelines) for case in make()]
    assert len({case.name for case in found}) == len(found)
    return found
