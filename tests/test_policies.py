"""Who is one voter, over real HTTP: each policy's own way to tell, and limits per address and subnet on top."""

from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import pytest
from django.contrib.auth import get_user_model
from django.db import connection

from polls import codes, problems, voters
from polls.models import JournalEntry, NetworkCount, Vote, VoterCode
from tests.conftest import Api, answers, free_port, make_user, option, signed_in, standing, tallies, wait_until, web
from tests.test_intake import assert_refused


def ballot(poll, text="soup", **fields):
    return {"option": str(option(poll, text)), **fields}


def votes_path(poll):
    return f"/api/v1/polls/{poll.pk}/votes"


@pytest.fixture(scope="session")
def behind_a_proxy(pipeline, tmp_path_factory):
    """A web process that takes the client's address from X-Forwarded-For, one place from the right."""
    port = free_port()
    with web(port, tmp_path_factory.mktemp("proxied") / "web.log", TRUSTED_PROXIES="1"):
        anonymous = Api(port, {})
        wait_until(lambda: answers(port))
        yield anonymous


# --- session ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def anonymous(pipeline):
    return Api(pipeline, {})


def token_for(anonymous, poll):
    answer = anonymous.post("/api/v1/voters", {"poll": str(poll.pk)})
    assert answer.status == 201, answer.text
    return answer.json["token"]


def test_a_voter_token_is_one_voter_by_header_or_cookie(anonymous, make_poll):
    poll = make_poll(voter_policy="session")
    made = anonymous.post("/api/v1/voters", {"poll": str(poll.pk)})
    name, _, rest = made.headers["set-cookie"].partition("=")
    cookie, _, attributes = rest.partition("; ")
    assert (name, cookie) == ("voter_token", made.json["token"])
    assert attributes.startswith(f"Path=/api/v1/polls/{poll.pk}/;") and "HttpOnly" in attributes and "SameSite=Lax" in attributes

    by_header = anonymous.post(votes_path(poll), ballot(poll), voter_token=cookie, prefer="wait=10")
    by_cookie = anonymous.post(votes_path(poll), ballot(poll), cookie=f"theme=dark; voter_token={cookie}", prefer="wait=10")
    other = anonymous.post(votes_path(poll), ballot(poll), voter_token=token_for(anonymous, poll), prefer="wait=10")

    assert (by_header.status, other.status) == (201, 201)
    assert_refused(by_cookie, problems.DUPLICATE)
    assert tallies(poll) == {"soup": 2}


def forge(token):
    return token[:-1] + ("A" if token[-1] != "A" else "B")


@pytest.mark.parametrize("spoil", [lambda token: "", forge, lambda token: token + "=", lambda token: "x" * 38, lambda token: "é" * 10])
def test_a_voter_token_that_is_none(anonymous, make_poll, spoil):
    poll = make_poll(voter_policy="session")

    answer = anonymous.post(votes_path(poll), ballot(poll), voter_token=spoil(token_for(anonymous, poll)))

    assert_refused(answer, problems.UNAUTHENTICATED)


def test_a_voter_token_has_one_spelling_only():
    """base64 lets the last character differ in bits that carry nothing: 16 spellings would be 16 voters."""
    poll_id = uuid4()
    token = voters.new_voter_token(poll_id)

    valid = [
        token[:-1] + last for last in voters.string.ascii_letters + "0123456789-_" if voters.is_voter_token(poll_id, token[:-1] + last)
    ]

    assert valid == [token]


def test_a_voter_token_of_another_poll_is_none(anonymous, make_poll):
    poll, other = make_poll(voter_policy="session"), make_poll(voter_policy="session")

    assert_refused(anonymous.post(votes_path(poll), ballot(poll), voter_token=token_for(anonymous, other)), problems.UNAUTHENTICATED)


def test_voter_tokens_are_for_session_polls_only(anonymous, make_poll):
    assert_refused(anonymous.post("/api/v1/voters", {"poll": str(make_poll(voter_policy="ip").pk)}), problems.NOT_OFFERED)
    assert_refused(anonymous.post("/api/v1/voters", {"poll": "x"}), problems.UNKNOWN_POLL)
    assert_refused(anonymous.post("/api/v1/voters", {}), problems.INVALID, pointer="/poll")


# --- account ----------------------------------------------------------------------------------------------------------


def test_an_account_is_one_voter_whatever_token_it_has_at_the_moment(pipeline, make_poll):
    poll = make_poll(voter_policy="account")
    make_user("alice"), make_user("bob")

    first = signed_in(pipeline, "alice").post(votes_path(poll), ballot(poll), prefer="wait=10")
    second = signed_in(pipeline, "alice").post(votes_path(poll), ballot(poll, "salad"), prefer="wait=10")
    other = signed_in(pipeline, "bob").post(votes_path(poll), ballot(poll), prefer="wait=10")

    assert (first.status, other.status) == (201, 201)
    assert_refused(second, problems.DUPLICATE)
    assert tallies(poll) == {"soup": 2}


@pytest.mark.parametrize("authorization", [None, "Bearer", "Bearer x", "Bearer a.b.c", "Basic b2xnYTp4", "refresh", "expired", "none"])
def test_an_access_token_that_is_none(pipeline, make_poll, owner, authorization):
    from datetime import timedelta

    import jwt
    from rest_framework_simplejwt.tokens import AccessToken, RefreshToken

    expired = AccessToken.for_user(owner)
    expired.set_exp(lifetime=timedelta(seconds=-1))
    made = {
        "refresh": f"Bearer {RefreshToken.for_user(owner)}",
        "expired": f"Bearer {expired}",
        "none": f"Bearer {jwt.encode(AccessToken.for_user(owner).payload, None, algorithm='none')}",
    }
    poll = make_poll(voter_policy="account")

    answer = Api(pipeline, {}).post(votes_path(poll), ballot(poll), authorization=made.get(authorization, authorization))

    assert_refused(answer, problems.UNAUTHENTICATED)
    assert answer.headers["www-authenticate"] == "Bearer"


# --- code -------------------------------------------------------------------------------------------------------------


def give_codes(poll, *texts):
    for text in texts:
        VoterCode.objects.create(poll=poll, voter_key=voters.VoterKeys(poll.pk, "code", poll.voter_salt).of(codes.normalise(text)))


def test_a_code_is_one_voter_however_it_is_typed(anonymous, make_poll):
    poll = make_poll(voter_policy="code")
    give_codes(poll, "7KXF-20PM-Q9RT", "8KXF-20PM-Q9RT")

    first = anonymous.post(votes_path(poll), ballot(poll, code="7KXF-20PM-Q9RT"), prefer="wait=10")
    second = anonymous.post(votes_path(poll), ballot(poll, "salad", code="7kxf 2opm q9rt"), prefer="wait=10")

    assert first.status == 201
    assert_refused(second, problems.DUPLICATE)
    assert tallies(poll) == {"soup": 1}


def test_a_code_of_another_poll_is_none(anonymous, make_poll):
    poll, other = make_poll(voter_policy="code"), make_poll(voter_policy="code")
    give_codes(other, "7KXF-20PM-Q9RT")

    assert_refused(anonymous.post(votes_path(poll), ballot(poll, code="7KXF-20PM-Q9RT")), problems.UNKNOWN_CODE)


@pytest.mark.parametrize("code", ["", "x", "0000-0000-0000", "\x00" * 12, "A" * 500])
def test_a_code_that_is_none(anonymous, make_poll, code):
    poll = make_poll(voter_policy="code")

    assert_refused(anonymous.post(votes_path(poll), ballot(poll, code=code)), problems.UNKNOWN_CODE)


def test_fields_of_other_policies_are_refused(anonymous, api, make_poll):
    for policy in ("ip", "session", "account"):
        poll = make_poll(voter_policy=policy)
        assert_refused(anonymous.post(votes_path(poll), ballot(poll, code="7KXF-20PM-Q9RT")), problems.INVALID, pointer="/code")
        assert_refused(anonymous.post(votes_path(poll), ballot(poll, voter="alice")), problems.INVALID, pointer="/voter")
    by_code, by_client = make_poll(voter_policy="code"), make_poll()
    assert_refused(anonymous.post(votes_path(by_code), ballot(by_code)), problems.INVALID, pointer="/code")
    assert_refused(api.post(votes_path(by_client), ballot(by_client, voter="a", code="b")), problems.INVALID, pointer="/code")


# --- Addresses --------------------------------------------------------------------------------------------------------


def test_a_forged_forwarded_for_changes_nothing(behind_a_proxy, make_poll):
    poll = make_poll(voter_policy="ip")

    for forged in ("203.0.113.1, ", "203.0.113.2, 10.0.0.1, ", "", "unknown, "):
        assert behind_a_proxy.post(votes_path(poll), ballot(poll), x_forwarded_for=forged + "192.0.2.1").status == 202

    wait_until(lambda: tallies(poll) == {"soup": 1})
    assert len(standing(poll)) == 1


def test_without_trusted_proxies_the_header_is_not_looked_at(anonymous, make_poll):
    poll = make_poll(voter_policy="ip")

    first = anonymous.post(votes_path(poll), ballot(poll), x_forwarded_for="192.0.2.1", prefer="wait=10")
    second = anonymous.post(votes_path(poll), ballot(poll), x_forwarded_for="192.0.2.2", prefer="wait=10")

    assert first.status == 201
    assert_refused(second, problems.DUPLICATE)


def test_an_ipv6_network_of_64_bits_is_one_voter(behind_a_proxy, make_poll):
    poll = make_poll(voter_policy="ip")

    answers = [
        behind_a_proxy.post(votes_path(poll), ballot(poll), x_forwarded_for=address, prefer="wait=10").status
        for address in ("2001:db8:0:1::1", "2001:db8:0:1:ffff::2", "2001:db8:0:2::1", "::ffff:192.0.2.1", "192.0.2.1")
    ]

    assert answers == [201, 409, 201, 201, 409]


def test_no_address_where_a_proxy_promised_one(behind_a_proxy, make_poll):
    poll = make_poll(voter_policy="ip")

    assert_refused(behind_a_proxy.post(votes_path(poll), ballot(poll)), problems.INVALID)
    assert_refused(behind_a_proxy.post(votes_path(poll), ballot(poll), x_forwarded_for="somebody"), problems.INVALID)


def cast_from(api, poll, address, **headers):
    token = token_for_address(api, poll, address)
    return api.post(votes_path(poll), ballot(poll), x_forwarded_for=address, voter_token=token, prefer="wait=10", **headers)


def token_for_address(api, poll, address):
    return api.post("/api/v1/voters", {"poll": str(poll.pk)}, x_forwarded_for=address).json["token"]


def test_hard_limits_refuse_the_excess_but_for_allowed_networks(behind_a_proxy, make_poll):
    poll = make_poll(voter_policy="session", address_limit=2, subnet_limit=3, allowed_networks=["192.0.2.128/25", "2001:db8::/48"])

    same_address = [cast_from(behind_a_proxy, poll, "192.0.2.7") for _ in range(3)]
    same_subnet = [cast_from(behind_a_proxy, poll, f"192.0.2.{n}") for n in (8, 9)]
    allowed = [cast_from(behind_a_proxy, poll, address).status for address in ("192.0.2.200", "192.0.2.200", "192.0.2.200", "2001:db8::1")]

    assert [answer.status for answer in same_address] == [201, 201, 403]
    assert [answer.status for answer in same_subnet] == [201, 403]
    assert_refused(same_address[2], problems.LIMIT_REACHED)
    assert allowed == [201] * 4
    assert tallies(poll) == {"soup": 7}


def test_whoever_was_let_in_can_repeat_the_request_when_the_limit_is_reached(behind_a_proxy, make_poll):
    poll = make_poll(voter_policy="session", address_limit=1)
    token = token_for_address(behind_a_proxy, poll, "192.0.2.7")
    cast = {"x_forwarded_for": "192.0.2.7", "voter_token": token, "idempotency_key": "1", "prefer": "wait=10"}
    assert behind_a_proxy.post(votes_path(poll), ballot(poll), **cast).status == 201
    assert cast_from(behind_a_proxy, poll, "192.0.2.7").status == 403

    assert behind_a_proxy.post(votes_path(poll), ballot(poll), **cast).status == 201


def test_soft_limits_accept_the_excess_and_hold_it(behind_a_proxy, make_poll):
    poll = make_poll(voter_policy="session", address_limit=1, limit_mode="soft")

    first, second = cast_from(behind_a_proxy, poll, "192.0.2.7"), cast_from(behind_a_proxy, poll, "192.0.2.7")

    assert (first.status, first.json["status"]) == (201, "counted")
    assert (second.status, second.json["status"]) == (202, "quarantined")
    assert behind_a_proxy.get(second.json["links"]["self"], x_forwarded_for="192.0.2.7").json["reason"] == "address_limit"
    assert tallies(poll) == {"soup": 1}


def test_a_crowd_behind_one_address_gets_in_up_to_the_limit_and_not_one_more(behind_a_proxy, make_poll):
    poll = make_poll(voter_policy="session", address_limit=7)
    tokens = [token_for_address(behind_a_proxy, poll, "192.0.2.7") for _ in range(25)]

    def cast(token):
        return behind_a_proxy.post(votes_path(poll), ballot(poll), x_forwarded_for="192.0.2.7", voter_token=token, prefer="wait=10").status

    with ThreadPoolExecutor(25) as crowd:
        statuses = list(crowd.map(cast, tokens))

    assert sorted(statuses) == [201] * 7 + [403] * 18
    assert tallies(poll) == {"soup": 7}


FIREFOX = {"user_agent": "Firefox/145", "accept_language": "en", "sec_ch_ua_platform": '"Linux"'}


def signatures(poll):
    """{option text: [browser signature]}"""
    texts = dict(poll.options.values_list("id", "text"))
    found = {}
    for [chosen], signature in Vote.objects.filter(poll_id=poll.pk).order_by("accepted_at").values_list("selection", "signature_key"):
        found.setdefault(texts[chosen], []).append(signature)
    return found


def test_a_vote_holds_what_its_browser_says_of_itself_as_a_keyed_hash(behind_a_proxy, make_poll):
    poll = make_poll(voter_policy="ip", options=[{"text": text} for text in ("firefox", "german", "long", "silent")])
    votes = [
        ("firefox", FIREFOX),
        ("firefox", {**FIREFOX, "cookie": "a=1", "x_request_id": "7", "authorization": "Bearer x", "referer": "https://example.org"}),
        ("german", {**FIREFOX, "accept_language": "de"}),
        ("long", {"user_agent": "x" * 700}),
        ("long", {"user_agent": "x" * 7000}),  # what is longer than any browser's is cut
        ("silent", {"accept_encoding": None}),
    ]
    for n, (text, said) in enumerate(votes):
        answer = behind_a_proxy.post(votes_path(poll), ballot(poll, text), x_forwarded_for=f"192.0.2.{n}", prefer="wait=10", **said)
        assert answer.status == 201, answer.text

    found = signatures(poll)
    assert found["firefox"][0] == found["firefox"][1]
    assert found["long"][0] == found["long"][1]
    assert len({each[0] for each in found.values()} - {None}) == 4


def test_graphql_sees_the_same_browser_and_the_same_network(behind_a_proxy, make_poll):
    poll = make_poll(voter_policy="session")
    document = "mutation($poll: ID!, $option: ID!) { castVote(pollId: $poll, option: $option, waitSeconds: 10) { status } }"
    variables = {"poll": str(poll.pk), "option": str(option(poll, "salad"))}
    here = {**FIREFOX, "x_forwarded_for": "192.0.2.7"}

    assert cast_from(behind_a_proxy, poll, "192.0.2.7", **FIREFOX).status == 201
    token = token_for_address(behind_a_proxy, poll, "192.0.2.7")
    answer = behind_a_proxy.post("/graphql", {"query": document, "variables": variables}, voter_token=token, **here)

    assert answer.json["data"]["castVote"]["status"] == "COUNTED", answer.text
    keys = [*Vote.objects.filter(poll_id=poll.pk).values_list("address_key", "subnet_key", "signature_key")]
    assert len(keys) == 2 and keys[0] == keys[1] and None not in keys[0]


def test_votes_from_allowed_networks_and_by_api_clients_hold_nothing_of_where_they_came_from(pipeline, make_poll, api, tmp_path):
    polls = {"of the poll": make_poll(voter_policy="ip", allowed_networks=["198.51.100.0/24"]), "of all": make_poll(voter_policy="ip")}
    by_client, port = make_poll(), free_port()
    with web(port, tmp_path / "web.log", TRUSTED_PROXIES="1", ALLOWED_NETWORKS="203.0.113.0/24, 2001:db8::/48"):
        wait_until(lambda: answers(port))
        campus = Api(port, {})
        for poll in polls.values():
            for address in ("192.0.2.7", "198.51.100.7", "203.0.113.7", "2001:db8:0:1::7"):
                assert campus.post(votes_path(poll), ballot(poll), x_forwarded_for=address, prefer="wait=10").status == 201
    assert api.cast(by_client, "alice", prefer="wait=10").status == 201

    holding = {name: Vote.objects.filter(poll_id=poll.pk, address_key__isnull=False).count() for name, poll in polls.items()}
    assert holding == {"of the poll": 1, "of all": 2}
    for vote in Vote.objects.filter(poll_id__in=[by_client.pk, *(poll.pk for poll in polls.values())]):
        assert (vote.address_key is None) == (vote.subnet_key is None) == (vote.signature_key is None)


def test_no_address_is_stored_as_it_is(behind_a_proxy, make_poll):
    poll = make_poll(voter_policy="session", address_limit=1)
    cast_from(behind_a_proxy, poll, "198.51.100.77")

    with connection.cursor() as cursor:
        cursor.execute("SELECT row_to_json(v)::text FROM votes v WHERE poll_id = %s", [poll.pk])
        (row,) = cursor.fetchone()

    assert "198.51.100" not in row and "address_key" in row
    assert NetworkCount.objects.filter(poll_id=poll.pk).count() == 2
    assert not JournalEntry.objects.filter(poll=poll, changes__icontains="198.51.100").exists()
    assert not get_user_model().objects.filter(username="198.51.100.77").exists()
