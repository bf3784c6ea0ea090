"""Making, changing and deleting polls: what is allowed when, so that no accepted vote loses its meaning."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from ipaddress import ip_network
from typing import Any
from unicodedata import normalize
from uuid import UUID

from django.conf import settings
from django.contrib.auth.models import User
from django.db import IntegrityError, OperationalError, connection, transaction

from polls import disclosure, journal, networks, problems, results, voter_secrets
from polls.journal import Act, require_reason
from polls.models import Option, Poll, PollStatus, ResultsVisibility, VoterPolicy, VotingMethod
from polls.moments import iso

# A client that means "now" may have a slow clock or network.
CLOCK_TOLERANCE = timedelta(minutes=1)
# After this time every web process has read a change. So a poll that closes early still closes in the future, and no 202 comes
# after the end; and a poll that opens sooner is changed as if it were open, for it may be by the time the change is read.
SHORTEST_NOTICE = timedelta(seconds=2 * settings.POLL_SNAPSHOT_SECONDS + 1)

# What may only be loosened once the poll is open: whoever was refused may come again, but nobody who was let in is judged anew.
LIMITS = {"address_limit", "subnet_limit", "allowed_networks"}
# How suspicious votes are looked for. Once the poll is open, only towards the installation's way: else an owner who sees the tallies
# could have a rival's networks held.
VIGILANCE = {"auto_quarantine", "rule_parameters"}
# What may only grow then: who votes was told how many others they are shown with.
STEP = "results_step"
# Nothing else once the poll is open: votes say what they mean by its texts, whoever voted was told who will see the results, and the
# rest says who is one voter, which vote of theirs stands, and what a ballot holds.
CHANGEABLE_WHILE_OPEN = LIMITS | VIGILANCE | {"closes_at", STEP}
# How long an edit waits for another one of the same poll. It was judged by the moment it came in, and the shortest notice has a second
# for it to take effect in.
LOCK_MILLISECONDS = 500
# Of a poll, and characters of each. Chosen: everybody who reads the results reads them, too.
MAX_ERRATA = 20
LONGEST_ERRATUM = 300
_LOCK_NOT_AVAILABLE = "55P03"
_FROZEN = "open_polls_keep_their_terms"  # the constraint's name that triggers give


def create_poll(
    owner: User, fields: Mapping[str, Any], at: datetime, *, by: str = "", reason: str = "", duplicate_of: UUID | None = None
) -> Poll:
    """Store a poll and its options, `fields` as NewPollSerializer validates them; raises Refusal when they contradict each other.

    It is published at once, but where `fields` says `draft`. `by` is who makes it, if not the owner.
    """
    options = fields["options"]
    wanted = {"opens_at": at, **_all_choices(fields.get("method", VotingMethod.SINGLE), len(options)), **fields}
    wanted["published_at"] = None if wanted.pop("draft", False) else at
    del wanted["options"]
    poll = Poll(
        owner=owner,
        created_at=at,
        voter_secret=voter_secrets.current(),
        network_secret=networks.current_secret(at),
        network_secret_since=at,
        **wanted,
    )
    _check_start(poll.opens_at, at)
    _check_end(poll.opens_at, poll.closes_at, at)
    _check_settings(poll, len(options))
    _check_networks(poll.allowed_networks)
    if poll.status_at(at) == PollStatus.OPEN:
        poll.opened_at = at
    with transaction.atomic():
        poll.save(force_insert=True)
        _write_options(poll, options)
        changes = {"status": (None, poll.status_at(at))} | ({"duplicate_of": (None, duplicate_of)} if duplicate_of else {})
        journal.write(poll, Act(by or owner.get_username(), at, reason), "created", changes)
    return poll


def change_poll(poll_id: UUID, changes: Mapping[str, Any], act: Act) -> Poll:
    """Apply the changes, all or none, and return the poll as it is then; raises Refusal when the poll is too far on for one of them.

    What is so already is no change: without any, there is no new version and no entry in the journal.
    """
    with locked(poll_id, act) as poll:
        fields = {name: value for name, value in changes.items() if name != "options" and getattr(poll, name) != value}
        before = _options_of(poll)
        options = _changed_options(before, changes.get("options", before))
        _check_stage(poll, fields if options is None else {**fields, "options": options}, act.at)
        _check_networks(changes.get("allowed_networks", []), known=poll.allowed_networks)
        fields = _follow(poll, fields, len(before), len(before if options is None else options))

        if "opens_at" in fields:
            _check_start(fields["opens_at"], act.at)
        if fields.keys() & {"opens_at", "closes_at"}:
            notice = timedelta() if poll.published_at is None else SHORTEST_NOTICE
            _check_end(fields.get("opens_at", poll.opens_at), fields.get("closes_at", poll.closes_at), act.at + notice)
        if poll.published_at is not None and fields.get("closes_at", poll.closes_at) > poll.closes_at:
            check_still_sealed(poll, act.at)
        if STEP in fields and poll.status_at(act.at) == PollStatus.OPEN:  # what is shown now stays until so many more are in
            results.hold_back(poll.pk, results.tallies_now(poll.pk), fields[STEP], act.at)
        changed = _set(poll, fields)
        _check_settings(poll, len(before if options is None else options))
        if options is not None:
            _write_options(poll, options)
            changed["options"] = (before, _options_of(poll))
        if changed:
            save(poll, act, "changed", changed)
    return poll


def add_erratum(poll_id: UUID, act: Act, *, field: str, text: str, option: str | None = None) -> Poll:
    """Say what is wrong with a frozen text of the poll, or of an option; the text stays, and both are shown from now on.

    Repeatable: what is said already is not said again. Raises Refusal while the text itself can change, and beyond MAX_ERRATA.
    """
    require_reason(act)
    if field not in (("text", "description") if option else ("title", "description")):
        raise problems.INVALID.says("A poll has a `title`, an option a `text`, and both a `description`.", pointer="/field")
    # Nor what a reader does not see: line ends, signs that turn the direction of writing or have no width.
    if not text.strip() or len(text) > LONGEST_ERRATUM or not text.isprintable():
        raise problems.INVALID.says(f"Say what it should read, in at most {LONGEST_ERRATUM} printable characters.", pointer="/text")
    with locked(poll_id, act) as poll:
        if not is_frozen(poll, act.at):
            raise problems.POLL_IN_USE.says(f"The poll is {poll.status_at(act.at)}: its texts can still change themselves.")
        if option and option not in {known["id"] for known in _options_of(poll)}:
            raise problems.UNKNOWN_OPTION.says("The poll has no option with this id.", pointer="/option")
        if option and _alike(text) in _names_of_others(poll, option):
            raise problems.INVALID.says("Another option is called so.", pointer="/text")
        said = {"field": field, "option": option, "text": text}
        if any(said == {name: erratum[name] for name in said} for erratum in poll.errata):
            return poll
        if len(poll.errata) >= MAX_ERRATA:
            raise problems.POLL_IN_USE.says(f"A poll has at most {MAX_ERRATA} errata.")
        erratum = {**said, "at": iso(act.at)}
        poll.errata = [*poll.errata, erratum]
        poll.version += 1
        poll.save(update_fields=["errata", "version"])
        journal.write(poll, act, "erratum", {"erratum": (None, erratum)})
    return poll


def _names_of_others(poll: Poll, option: str) -> set[str]:
    """Return what the poll's other options are called, by their texts and by what was said of these."""
    names = [known["text"] for known in _options_of(poll) if known["id"] != option]
    names += [erratum["text"] for erratum in poll.errata if erratum["field"] == "text" and erratum["option"] != option]
    return {_alike(name) for name in names}


def _alike(name: str) -> str:
    """Return the same for names that a reader takes for the same: of another case, width or spacing."""
    return " ".join(normalize("NFKC", normalize("NFKC", name).casefold()).split())


def delete_poll(poll_id: UUID, act: Act) -> None:
    """Delete a draft, its journal with it; raises Refusal for any other poll, for its votes may be on their way."""
    with locked(poll_id, act) as poll:
        if (status := poll.status_at(act.at)) != PollStatus.DRAFT:
            raise problems.POLL_IN_USE.says(f"Only a draft can be deleted, and this poll is {status}. Archive it.")
        with connection.cursor() as cursor:
            cursor.execute("SELECT delete_draft(%s)", [poll.pk])


def tag(poll: Poll, at: datetime) -> str:
    """Return what names this version of the poll (its ETag): another one after each change, by whomever, that can be seen."""
    return f'"{poll.version}-{poll.status_at(at)}"'


@contextmanager
def locked(poll_id: UUID, act: Act) -> Iterator[Poll]:
    """Give the poll, which nobody else changes until the end of the block's transaction; raises Refusal when it is not as `act` wants it.

    Also when somebody else has it for too long, and when it opens before the block is through.
    """
    try:
        with transaction.atomic():
            yield _lock(poll_id, act)
    except IntegrityError as exc:
        if getattr(getattr(exc.__cause__, "diag", None), "constraint_name", None) != _FROZEN:
            raise
        raise problems.POLL_IN_USE.says("The poll has opened or closed meanwhile. Read it again.") from None


def _lock(poll_id: UUID, act: Act) -> Poll:
    with connection.cursor() as cursor:
        cursor.execute("SELECT set_config('lock_timeout', %s, true)", [f"{LOCK_MILLISECONDS}ms"])
    try:
        poll = Poll.objects.select_for_update(no_key=True).filter(pk=poll_id).first()
    except OperationalError as exc:
        if getattr(exc.__cause__, "pgcode", None) != _LOCK_NOT_AVAILABLE:
            raise
        raise problems.UNAVAILABLE.says("Somebody else is changing the poll. Try again.", headers={"Retry-After": "1"}) from None
    with connection.cursor() as cursor:
        cursor.execute("SET LOCAL lock_timeout TO DEFAULT")
    if poll is None:
        raise problems.UNKNOWN_POLL.says("No poll has this id.")
    if act.only_if is not None and not act.only_if & {"*", tag(poll, act.at)}:
        raise problems.CHANGED_MEANWHILE.says(f"The poll's ETag is {tag(poll, act.at)} now. Read it again, and decide anew.")
    return poll


def move(poll: Poll, act: Act, action: str, fields: Mapping[str, Any]) -> None:
    """Set fields of a locked poll, as a new version, with an entry in the journal."""
    before = poll.status_at(act.at)
    changed = _set(poll, fields)
    if (after := poll.status_at(act.at)) != before:
        changed["status"] = (before, after)
    save(poll, act, action, changed)


def save(poll: Poll, act: Act, action: str, changed: Mapping[str, tuple[Any, Any]]) -> None:
    """Write what was changed, as a new version, with an entry in the journal."""
    poll.version += 1
    poll.save(update_fields=["version", *(changed.keys() - {"options", "status"})])
    journal.write(poll, act, action, changed)


def check_still_sealed(poll: Poll, at: datetime) -> None:
    """Refuse a later end for a poll whose sealed results somebody may have read: who reads them votes no more."""
    if poll.results_visibility == ResultsVisibility.SEALED and poll.closes_at <= at + SHORTEST_NOTICE:
        ended = "has ended" if poll.closes_at <= at else "is about to end"
        raise problems.POLL_IN_USE.says(f"Its results are sealed until its end, and the poll {ended}.")


def _set(poll: Poll, fields: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Set the fields; return {field: (before, after)} of those that were different."""
    changed = {name: (getattr(poll, name), value) for name, value in fields.items() if getattr(poll, name) != value}
    for name, (_, value) in changed.items():
        setattr(poll, name, value)
    return changed


def is_frozen(poll: Poll, at: datetime) -> bool:
    """Return whether the poll's texts and rules are what votes mean: it is open, was, or may be by the time a change is read."""
    status = poll.status_at(at)
    return status != PollStatus.DRAFT and not (status == PollStatus.SCHEDULED and poll.opens_at > at + SHORTEST_NOTICE)


def _check_stage(poll: Poll, changes: Mapping[str, Any], at: datetime) -> None:
    """Refuse what can't change any more."""
    if not is_frozen(poll, at):
        return
    status = poll.status_at(at)
    stage = "about to open" if status == PollStatus.SCHEDULED else status
    in_use = status in (PollStatus.SCHEDULED, PollStatus.OPEN)
    if refused := sorted(changes.keys() - (CHANGEABLE_WHILE_OPEN if in_use else set())):
        instead = " Say what is wrong with a text in an erratum." if refused[0] in ("title", "description", "options") else ""
        raise problems.POLL_IN_USE.says(f"`{refused[0]}` can't change any more: the poll is {stage}.{instead}", pointer=f"/{refused[0]}")
    for name in sorted(changes.keys() & LIMITS):
        if not _is_looser(getattr(poll, name), changes[name]):
            raise problems.POLL_IN_USE.says(f"`{name}` can only be loosened any more: the poll is {stage}.", pointer=f"/{name}")
    if changes.get(STEP, poll.results_step) < poll.results_step:
        raise problems.POLL_IN_USE.says(f"`{STEP}` can only grow any more: the poll is {stage}.", pointer=f"/{STEP}")
    for name in sorted(changes.keys() & VIGILANCE):
        if not _is_towards_installation(getattr(poll, name), changes[name]):
            raise problems.POLL_IN_USE.says(
                f"`{name}` can only become the installation's any more (the quarantine off, a rule's parameters left out, all of "
                f"them): the poll is {stage}.",
                pointer=f"/{name}",
            )


def _is_towards_installation(before: Any, after: Any) -> bool:
    """Whether automatic quarantine goes off, or each rule's parameters stay as they are or become the installation's.

    All of a rule's at once: what is left of them, beside the installation's, could find what neither found before.
    """
    if isinstance(after, bool):
        return not after
    return all(before.get(rule) == parameters for rule, parameters in after.items() if parameters)


def _is_looser(before: Any, after: Any) -> bool:
    """Whether a limit lets in everybody whom it let in before."""
    if isinstance(before, list):
        return set(before) <= set(after)
    return after is None or (before is not None and after > before)


def _all_choices(method: str, options: int) -> dict[str, int]:
    """Return how many options a ballot holds where nobody says it."""
    return {"min_choices": 1, "max_choices": options if method == VotingMethod.APPROVAL else 1}


def _follow(poll: Poll, fields: Mapping[str, Any], options_before: int, options: int) -> dict[str, Any]:
    """Return the fields with what follows from them: another method has other choices, "all options" stays all; it will close again."""
    if "closes_at" in fields:
        fields = {**fields, "closed_at": None}
    if "method" in fields:
        return {**_all_choices(fields["method"], options), **fields}
    if poll.method == VotingMethod.APPROVAL and poll.max_choices == options_before != options:
        return {"max_choices": options, **fields}
    return dict(fields)


def _check_settings(poll: Poll, options: int) -> None:
    """Refuse settings that contradict each other."""
    if poll.method == VotingMethod.SINGLE:
        for name in ("min_choices", "max_choices"):
            if getattr(poll, name) != 1:
                raise problems.INVALID.says("With the method `single` a ballot holds one option.", pointer=f"/{name}")
    if poll.max_choices > options:
        raise problems.INVALID.says(f"A ballot can't hold {poll.max_choices} of {options} options.", pointer="/max_choices")
    if poll.min_choices > poll.max_choices:
        raise problems.INVALID.says("`min_choices` is more than `max_choices`.", pointer="/min_choices")
    if 1 < poll.results_step < disclosure.LEAST_VOTERS:
        raise problems.INVALID.says(f"It is 1, or {disclosure.LEAST_VOTERS} at least.", pointer="/results_step")
    for name in ("address_limit", "subnet_limit"):
        if getattr(poll, name) is not None and poll.voter_policy == VoterPolicy.CLIENT:
            raise problems.INVALID.says("With voter_policy `client` votes come from the client's address, no voter's.", pointer=f"/{name}")


def _check_networks(wanted: Sequence[str], *, known: Sequence[str] = ()) -> None:
    """Refuse networks that are too wide, but those that the poll has from before there was a bound."""
    for index, network in enumerate(wanted):
        parsed = ip_network(network)
        if parsed.prefixlen < networks.WIDEST[parsed.version] and network not in known:
            widest = f"a /{networks.WIDEST[4]} at most, of IPv6 a /{networks.WIDEST[6]}"
            raise problems.INVALID.says(f"An allowed network is {widest}.", pointer=f"/allowed_networks/{index}")


def _check_start(opens_at: datetime, at: datetime) -> None:
    if opens_at < at - CLOCK_TOLERANCE:
        raise problems.INVALID.says(f"It is {iso(at)}: a poll can't open in the past.", pointer="/opens_at")


def _check_end(opens_at: datetime, closes_at: datetime, earliest: datetime) -> None:
    if closes_at <= opens_at:
        raise problems.INVALID.says(f"A poll must close after it opens ({iso(opens_at)}).", pointer="/closes_at")
    if closes_at <= earliest:
        raise problems.INVALID.says(f"A poll must close in the future; the earliest moment is {iso(earliest)}.", pointer="/closes_at")


def _options_of(poll: Poll) -> list[dict[str, str]]:
    """Return `[{"id", "text", "description"}]`, in order."""
    return [{"id": str(option.pk), "text": option.text, "description": option.description} for option in Option.objects.filter(poll=poll)]


def _changed_options(before: list[dict[str, str]], wanted: list[dict[str, str]]) -> list[dict[str, str]] | None:
    """Return the options that are wanted, what is not said of a known one as it was; None when that is how they are."""
    known = {option["id"]: option for option in before}
    options = [{**known.get(option.get("id", ""), {}), **option} for option in wanted]
    return None if options == before else options


def _write_options(poll: Poll, options: list[dict[str, str]]) -> None:
    """Make these the poll's options, in this order. One with an `id` keeps it, one that is not listed goes."""
    existing = {str(option.pk): option for option in poll.options.all()}
    written = []
    for position, wanted in enumerate(options, start=1):
        if "id" in wanted and wanted["id"] not in existing:
            raise problems.UNKNOWN_OPTION.says(
                "The poll has no option with this id; leave `id` out for a new one.", pointer=f"/options/{position - 1}/id"
            )
        option = existing.pop(wanted["id"]) if "id" in wanted else Option(poll=poll)
        option.text, option.description, option.position = wanted["text"], wanted.get("description", ""), position
        written.append(option)
    Option.objects.filter(pk__in=[option.pk for option in existing.values()]).delete()
    for option in written:
        option.save()
