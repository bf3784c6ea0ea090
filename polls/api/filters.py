"""What lists can be asked for. Anything else is refused: a misspelt filter must not look like an answer."""

from datetime import UTC, datetime
from typing import Any

from django.core.exceptions import ValidationError
from django.db.models import Q, QuerySet
from django.utils.timezone import now
from django_filters import rest_framework as filters
from django_filters.fields import IsoDateTimeField
from rest_framework.request import Request
from rest_framework.views import APIView

from polls import fraud, problems
from polls.api.authentication import actor
from polls.models import CaseState, NetworkKind, Poll, PollQuerySet, PollStatus, SuspiciousIP, VoterPolicy, VotingMethod

ORDERS = ("created_at", "opens_at", "closes_at", "title")
# Not of the filters: the page, and the REST framework's own choice of a format.
_OF_PAGES = {"cursor", "page_size", "format"}


class Statuses(filters.BaseInFilter, filters.ChoiceFilter):
    """Several of PollStatus, parted by commas."""


class MomentField(IsoDateTimeField):
    """A moment in UTC: PostgreSQL takes no offset of 16 hours and more, which ISO 8601 allows."""

    def to_python(self, value: Any) -> datetime | None:
        moment: datetime | None = super().to_python(value)
        try:
            return moment and moment.astimezone(UTC)
        except OverflowError:  # in the first or last hours that dates go to
            raise ValidationError(self.error_messages["invalid"], code="invalid") from None


class Moment(filters.IsoDateTimeFilter):
    field_class = MomentField


class PollFilters(filters.FilterSet):
    status = Statuses(method="in_statuses", choices=PollStatus.choices, help_text="One status or several, parted by commas.")
    voter_policy = filters.ChoiceFilter(choices=VoterPolicy.choices)
    method = filters.ChoiceFilter(choices=VotingMethod.choices)
    mine = filters.ChoiceFilter(method="of_mine", choices=[("true", "true"), ("false", "false")], help_text="true: one's own polls only.")
    opens_after = Moment("opens_at", "gte")
    opens_before = Moment("opens_at", "lt")
    closes_after = Moment("closes_at", "gte")
    closes_before = Moment("closes_at", "lt")
    search = filters.CharFilter(method="with_words", max_length=200, help_text="Text in title or description.")
    ordering = filters.ChoiceFilter(
        method="in_order",
        choices=[(order, order) for name in ORDERS for order in (name, f"-{name}")],
        help_text="`-` for descending; `-created_at` if not said.",
    )

    class Meta:
        model = Poll
        fields: list[str] = []

    def in_statuses(self, polls: PollQuerySet, name: str, statuses: list[str]) -> PollQuerySet:
        found = Poll.objects.none()
        for status in statuses:
            found |= Poll.objects.in_status(status, now())
        return polls & found

    def of_mine(self, polls: PollQuerySet, name: str, mine: str) -> PollQuerySet:
        return actor(self.request).own(polls) if mine == "true" else polls

    def with_words(self, polls: PollQuerySet, name: str, words: str) -> PollQuerySet:
        return polls.filter(Q(title__icontains=words) | Q(description__icontains=words))

    def in_order(self, polls: PollQuerySet, name: str, order: str) -> PollQuerySet:
        return polls.order_by(order, "-id" if order.startswith("-") else "id")


class CaseFilters(filters.FilterSet):
    poll = filters.UUIDFilter("poll_id", help_text="Only the cases of this poll.")
    rule = filters.ChoiceFilter(choices=[(rule, rule) for rule in fraud.RULES])
    state = filters.ChoiceFilter(choices=CaseState.choices)
    kind = filters.ChoiceFilter(choices=NetworkKind.choices)

    class Meta:
        model = SuspiciousIP
        fields: list[str] = []


class StrictFilters(filters.DjangoFilterBackend):
    """Refuses parameters that are unknown, empty, or said twice."""

    def filter_queryset(self, request: Request, queryset: QuerySet[Any], view: APIView) -> QuerySet[Any]:
        known = {*self.get_filterset_class(view).base_filters, *_OF_PAGES}
        for name, values in request.query_params.lists():
            if name not in known:
                raise problems.INVALID.says(f"There is no such parameter; there are {', '.join(sorted(known))}.", pointer=f"/{name}")
            if "" in values and name != "search":
                raise problems.INVALID.says(f"`{name}` is empty. Leave it out instead.", pointer=f"/{name}")
            if len(values) > 1:
                raise problems.INVALID.says(f"`{name}` stands twice.", pointer=f"/{name}")
        found: QuerySet[Any] = super().filter_queryset(request, queryset, view)
        return found
