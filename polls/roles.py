"""Who may do what: the roles of people (Django groups), the scopes of API clients, and what follows for a poll."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from django.contrib.auth.models import AnonymousUser, User
from django.db.models import Q, QuerySet

from polls import results
from polls.models import ApiClient, Poll, PollQuerySet, PollStatus, ResultsVisibility, Scope

# Names of Django groups. A superuser has them all.
OWNER = "owner"  # makes polls and looks after its own
OPERATOR = "operator"  # queues, dead letters, suspicious addresses
AUDITOR = "auditor"  # reads everything but secrets
ADMIN = "admin"  # everything
ROLES = (OWNER, OPERATOR, AUDITOR, ADMIN)


@dataclass(frozen=True)
class Actor:
    """Who asks: a user, an API client in its owner's name, or nobody in particular."""

    user: User | None
    client: ApiClient | None
    roles: frozenset[str]

    @property
    def name(self) -> str:
        """The name as the journal has it."""
        if self.client:
            return str(self.client)
        return self.user.get_username() if self.user else "anonymous"

    @property
    def audits(self) -> bool:
        return self.client is None and bool(self.roles & {AUDITOR, ADMIN})

    @property
    def operates(self) -> bool:
        return self.client is None and bool(self.roles & {OPERATOR, ADMIN})

    @property
    def makes_polls(self) -> bool:
        """Whether new polls are allowed; a client that was made for one poll makes no others."""
        return bool(self.roles & {OWNER, ADMIN}) and self._has_scope(Scope.POLLS_WRITE) and not (self.client and self.client.poll_id)

    @property
    def manages_clients(self) -> bool:
        """Whether API clients may be made: by people only, or a lost key could make itself others."""
        return self.client is None and bool(self.roles & {OWNER, ADMIN})

    def changes_client(self, client: ApiClient) -> bool:
        return self.manages_clients and self.user is not None and (ADMIN in self.roles or client.owner_id == self.user.pk)

    def visible_clients(self, clients: QuerySet[ApiClient]) -> QuerySet[ApiClient]:
        if self.audits:
            return clients
        return clients.filter(owner=self.user) if self.manages_clients else clients.none()

    def changes(self, poll: Poll) -> bool:
        return self._looks_after(poll) and self._has_scope(Scope.POLLS_WRITE)

    def chooses_readers(self, poll: Poll) -> bool:
        """Whether who reads the poll's results may be changed: a client that may not read them must not open them to everybody."""
        return self.changes(poll) and self._has_scope(Scope.RESULTS_READ)

    def reads_journal(self, poll: Poll) -> bool:
        """Whether what only the people behind a poll see is shown: its journal, its codes' labels, its limits."""
        return self.audits or self.changes(poll)

    def sees(self, poll: Poll, at: datetime) -> bool:
        return poll.status_at(at) != PollStatus.DRAFT or self.reads_journal(poll)

    def reads_results(self, poll: Poll, at: datetime, *, has_voted: bool = False) -> bool:
        """Whether the results are shown, or anything that tells a tally; `has_voted` says that a vote of theirs counted."""
        if results.are_sealed(poll.results_visibility, poll.closes_at, at):
            return False
        if self.audits or (self._looks_after(poll) and self._has_scope(Scope.RESULTS_READ)):
            return True
        if poll.status_at(at) == PollStatus.DRAFT:
            return False
        return results.are_public(poll.results_visibility, poll.closes_at, at, has_voted=has_voted)

    def with_readable_results(self, polls: PollQuerySet, at: datetime) -> PollQuerySet:
        """The polls of which `reads_results` is true."""
        polls = polls.exclude(results_visibility=ResultsVisibility.SEALED, closes_at__gt=at)
        if self.audits:
            return polls
        always, owner = ResultsVisibility.ALWAYS, ResultsVisibility.OWNER
        is_published = Q(published_at__isnull=False) | Q(archived_at__isnull=False)
        public = is_published & (Q(results_visibility=always) | (~Q(results_visibility=owner) & Q(closes_at__lte=at)))
        reads_own = self.user is not None and self.roles & {OWNER, ADMIN} and self._has_scope(Scope.RESULTS_READ)
        return polls.filter(public | self._own()) if reads_own else polls.filter(public)

    def visible(self, polls: PollQuerySet, at: datetime) -> PollQuerySet:
        """The polls that a list shows: the public ones, and in every status those that one may change, as an owner."""
        if self.audits:
            return polls
        public = Q(published_at__isnull=False, archived_at=None)
        is_behind_own = self.user is not None and self.roles & {OWNER, ADMIN} and self._has_scope(Scope.POLLS_WRITE)
        return polls.filter(public | self._own()) if is_behind_own else polls.filter(public)

    def own(self, polls: PollQuerySet) -> PollQuerySet:
        return polls.filter(self._own()) if self.user else polls.none()

    def _own(self) -> Q:
        own = Q(owner=self.user)
        return own & Q(pk=self.client.poll_id) if self.client and self.client.poll_id else own

    def _looks_after(self, poll: Poll) -> bool:
        if self.user is None:
            return False
        if self.client:
            # An API client never does more than its owner, and nothing outside its owner's polls, whoever the owner is.
            return bool(self.roles & {OWNER, ADMIN}) and poll.owner_id == self.user.pk and self.client.poll_id in (None, poll.pk)
        return ADMIN in self.roles or (OWNER in self.roles and poll.owner_id == self.user.pk)

    def _has_scope(self, scope: Scope) -> bool:
        return self.client is None or scope in self.client.scopes


def actor_of(user: User | AnonymousUser | None, client: ApiClient | None = None) -> Actor:
    """Return who asks. Costs one query for a user that is no superuser."""
    if not isinstance(user, User) or not user.is_active:
        return Actor(None, None, frozenset())
    roles = ROLES if user.is_superuser else user.groups.filter(name__in=ROLES).values_list("name", flat=True)
    return Actor(user, client, frozenset(roles))
