"""The shape of what the API takes and shows. The rules are in polls/editing.py."""

from ipaddress import IPv6Network, ip_network
from typing import Any

from drf_spectacular.utils import extend_schema_field
from rest_framework import serializers

from polls import disclosure, editing, fraud, journal
from polls.models import MAX_OPTIONS, JournalEntry, Option, Poll, PollStatus


class StrictSerializer(serializers.Serializer[Any]):
    """Refuses fields it does not know, and guesses no types: neither a misspelt field nor `"draft": "no"` may look like success."""

    def to_internal_value(self, data: Any) -> Any:
        if isinstance(data, dict):
            wrong = {name: why for name, value in data.items() if (why := self._wrong(name, value))}
            if wrong:
                raise serializers.ValidationError({name: [why] for name, why in wrong.items()})
        return super().to_internal_value(data)

    def _wrong(self, name: str, value: Any) -> str | None:
        field = self.fields.get(name)
        if field is None:
            return "There is no such field."
        if field.read_only:
            return "This field can't be set."
        for kind, wanted, sentence in _JSON_TYPES:
            if isinstance(field, kind) and value is not None and type(value) is not wanted:
                return sentence
        return None


def checked(shape: type[serializers.BaseSerializer[Any]], sent: Any, *, partial: bool = False) -> dict[str, Any]:
    """Return what was sent, in the serializer's shape; raises the REST framework's ValidationError when it has another."""
    serializer = shape(data=sent, partial=partial)
    serializer.is_valid(raise_exception=True)
    return dict(serializer.validated_data)


# What JSON must hold for a field; the REST framework would take "no" for false, 7 for "7".
_JSON_TYPES = (
    (serializers.BooleanField, bool, "This must be true or false."),
    (serializers.IntegerField, int, "This must be a whole number."),
    (serializers.CharField, str, "This must be a text."),
)


class OptionSerializer(StrictSerializer, serializers.ModelSerializer[Option]):
    """An option as the API shows it and as a change is sent."""

    id = serializers.CharField(
        required=False, help_text="Unique over all polls. In a change: the option to keep; leave it out for a new one."
    )
    text = serializers.CharField(max_length=200)
    description = serializers.CharField(max_length=2000, required=False, allow_blank=True)

    class Meta:
        model = Option
        fields = ["id", "text", "description", "position"]
        read_only_fields = ["position"]

    def validate(self, option: dict[str, str]) -> dict[str, str]:
        if "text" not in option:  # also in a change, where the poll's own fields may be left out
            raise serializers.ValidationError({"text": ["This field is required."]})
        return option


class NewOptionSerializer(StrictSerializer):
    """An option as it is created."""

    text = serializers.CharField(max_length=200)
    description = serializers.CharField(max_length=2000, required=False, allow_blank=True)


class ErratumSerializer(serializers.Serializer[Any]):
    """What was said about a text that is frozen. The text stays as it was."""

    field = serializers.ChoiceField(choices=["title", "description", "text"], help_text="Which text of the poll, or of the option.")
    option = serializers.CharField(allow_null=True, help_text="The option's id; null: the poll's own text.")
    text = serializers.CharField(help_text="What it should read.")
    at = serializers.DateTimeField()


class NetworkField(serializers.CharField):
    """An IPv4 or IPv6 network, in its shortest words: `198.51.100.7/24` is `198.51.100.0/24`."""

    def to_internal_value(self, data: Any) -> str:
        text = super().to_internal_value(data)
        try:
            if "%" in text:  # names a link of the machine that it was written on
                raise ValueError
            network = ip_network(text, strict=False)
        except ValueError:
            raise serializers.ValidationError("A network reads like 198.51.100.0/24 or 2001:db8::/48.") from None
        if isinstance(network, IPv6Network) and network.prefixlen >= 96 and (mapped := network.network_address.ipv4_mapped):
            return str(ip_network((mapped, network.prefixlen - 96)))  # the same network, as addresses of voters are written
        return str(network)


class PollSerializer(StrictSerializer, serializers.ModelSerializer[Poll]):
    """A poll as the API shows it."""

    # To show one, it wants `actor` and `at` in its context.
    # Only the people behind a poll see these: whoever knows a limit can stay just below it.
    INSIDE = ("address_limit", "subnet_limit", "limit_mode", "allowed_networks", "auto_quarantine", "rule_parameters", "version")

    id = serializers.CharField(read_only=True)
    options = OptionSerializer(many=True, min_length=2, max_length=MAX_OPTIONS)  # type: ignore[call-arg]
    status = serializers.SerializerMethodField()
    allowed_networks = serializers.ListField(
        child=NetworkField(),
        max_length=100,
        required=False,
        help_text="Networks that no limit applies to, such as `198.51.100.0/24`; a /16 at most, of IPv6 a /32.",
    )
    rule_parameters = serializers.JSONField(
        required=False, help_text="`{rule: {parameter: value}}` where the poll's are not the installation's: see `GET /api/v1/rules`."
    )
    errata = ErratumSerializer(many=True, read_only=True, help_text="What was said about its texts since they are frozen, oldest first.")
    links = serializers.SerializerMethodField()

    class Meta:
        model = Poll
        fields = [
            "id",
            "title",
            "description",
            "status",
            "options",
            "method",
            "min_choices",
            "max_choices",
            "voter_policy",
            "allow_change",
            "allow_withdrawal",
            "address_limit",
            "subnet_limit",
            "limit_mode",
            "allowed_networks",
            "auto_quarantine",
            "rule_parameters",
            "results_visibility",
            "results_step",
            "opens_at",
            "closes_at",
            "created_at",
            "errata",
            "version",
            "links",
        ]
        read_only_fields = ["created_at", "version"]
        extra_kwargs = {
            "method": {"help_text": "What a ballot holds: one option, or several that are worth one each."},
            "min_choices": {
                "min_value": 1,
                "max_value": MAX_OPTIONS,
                "help_text": "How many options a ballot holds at least; 1 by default.",
            },
            "max_choices": {
                "min_value": 1,
                "max_value": MAX_OPTIONS,
                "help_text": "How many at most. If not said: 1 with `single`, all with `approval`.",
            },
            "voter_policy": {"required": True, "help_text": "Who is one voter."},
            "allow_change": {"help_text": "True: a voter's last accepted vote stands. False: the first."},
            "allow_withdrawal": {"help_text": "Whether voters may take their vote back."},
            "address_limit": {"min_value": 1, "help_text": "Voters that may vote from one address; null: as many as there are."},
            "subnet_limit": {"min_value": 1, "help_text": "The same for its subnet (/24, IPv6: /64)."},
            "limit_mode": {"help_text": "What happens to votes beyond a limit."},
            "auto_quarantine": {
                "help_text": "Whether votes that a rule finds suspicious are held before anybody has looked; no rule about choices does."
            },
            "results_visibility": {"help_text": "Who reads the results, and when. The people behind the poll do always, unless `sealed`."},
            "results_step": {
                "min_value": 1,
                "max_value": 10_000,
                "help_text": "Until the poll is final its results change only once so many ballots more are in: with 10, nobody who stands "
                "beside a voter sees the choice in them. 1 by default; it only grows once the poll is open.",
            },
            "opens_at": {"help_text": "Default: now."},
        }

    @extend_schema_field(PollStatus)
    def get_status(self, poll: Poll) -> str:
        return poll.status_at(self.context["at"])

    @extend_schema_field(
        {
            "type": "object",
            "required": ["self", "votes", "results"],
            "properties": {name: {"type": "string"} for name in ("self", "votes", "results")},
        }
    )
    def get_links(self, poll: Poll) -> dict[str, str]:
        path = f"/api/v1/polls/{poll.pk}"
        return {"self": path, "votes": f"{path}/votes", "results": f"{path}/results"}

    def to_representation(self, poll: Poll) -> dict[str, Any]:
        shown = super().to_representation(poll)
        if not self.context["actor"].reads_journal(poll):
            for name in self.INSIDE:
                del shown[name]
        return shown

    def validate_options(self, options: list[dict[str, str]]) -> list[dict[str, str]]:
        texts = [option["text"] for option in options]
        if twice := next((text for text in texts if texts.count(text) > 1), None):
            raise serializers.ValidationError(f"Two options read {twice!r}.")
        ids = [option["id"] for option in options if "id" in option]
        if len(ids) != len(set(ids)):
            raise serializers.ValidationError("The same id stands twice.")
        return options

    def validate_allowed_networks(self, networks: list[str]) -> list[str]:
        return sorted(set(networks))

    def validate_rule_parameters(self, rule_parameters: object) -> object:
        fraud.check_parameters(rule_parameters, "/rule_parameters")
        return rule_parameters


class NewPollSerializer(PollSerializer):
    """A poll as it is created."""

    options = NewOptionSerializer(many=True, min_length=2, max_length=MAX_OPTIONS)  # type: ignore[call-arg, assignment]
    draft = serializers.BooleanField(default=False, help_text="True: nobody else sees it until it is published.")

    class Meta(PollSerializer.Meta):
        fields = [*PollSerializer.Meta.fields, "draft"]


class ReasonSerializer(StrictSerializer):
    """A move to another stage."""

    reason = serializers.CharField(required=False, default="", max_length=500, allow_blank=True, help_text="For the journal.")


class WhySerializer(StrictSerializer):
    """What a decision takes that nobody can change afterwards."""

    reason = serializers.CharField(max_length=500, help_text="For the record.")


class NewErratumSerializer(WhySerializer):
    """What is wrong with a frozen text."""

    field = serializers.ChoiceField(choices=["title", "description", "text"], help_text="`text` and `description` of an option.")
    option = serializers.CharField(required=False, help_text="The option's id; left out: the poll's own title or description.")
    text = serializers.CharField(max_length=editing.LONGEST_ERRATUM, help_text="What it should read.")


class ClosingSerializer(ReasonSerializer):
    """The end of a poll, earlier than planned."""

    closes_at = serializers.DateTimeField(required=False, help_text="Default: as soon as every web process knows, in seconds.")


class ExtensionSerializer(ReasonSerializer):
    """Another end of a poll."""

    closes_at = serializers.DateTimeField()


class DuplicateSerializer(ReasonSerializer):
    """The times of a poll's duplicate."""

    opens_at = serializers.DateTimeField(required=False, help_text="Default: now.")
    closes_at = serializers.DateTimeField(required=False, help_text="Default: after as long as the poll took.")


class PollChangeSerializer(PollSerializer):
    """A change of a poll."""

    reason = serializers.CharField(required=False, max_length=500, allow_blank=True, write_only=True, help_text="For the journal.")

    class Meta(PollSerializer.Meta):
        fields = [*PollSerializer.Meta.fields, "reason"]


class HistoryEntrySerializer(serializers.ModelSerializer[JournalEntry]):
    """A change of a poll, as everybody may know it."""

    # It takes what `journal.history` returns.
    id = serializers.CharField()
    changed = serializers.SerializerMethodField(help_text="The names of the fields that changed.")
    changes = serializers.SerializerMethodField()

    class Meta:
        model = JournalEntry
        fields = ["id", "at", "action", "changed", "changes"]

    @extend_schema_field({"type": "array", "items": {"type": "string"}})
    def get_changed(self, entry: Any) -> list[str]:
        return ["results"] if journal.tells_tallies(entry.action, entry.changed) else sorted(entry.changed)

    @extend_schema_field(
        {
            "type": ["object", "null"],
            "additionalProperties": {"type": "array", "items": {}, "minItems": 2, "maxItems": 2},
            "description": "{field: [before, after]} of the fields that everybody sees in the poll; null where they are very long.",
        }
    )
    def get_changes(self, entry: Any) -> dict[str, Any] | None:
        public: dict[str, Any] | None = entry.public
        return None if public is None else {name: change for name, change in public.items() if name in journal.PUBLIC_FIELDS}


class JournalEntrySerializer(serializers.ModelSerializer[JournalEntry]):
    """A change of a poll, as it is remembered."""

    # It wants `reads_results` in its context.
    id = serializers.CharField()
    changes = serializers.SerializerMethodField()

    class Meta:
        model = JournalEntry
        fields = ["id", "at", "actor", "action", "reason", "changes"]

    @extend_schema_field(
        {
            "type": "object",
            "additionalProperties": {"type": "array", "items": {}, "minItems": 2, "maxItems": 2},
            "description": "{field: [before, after]}; tallies for who may read the results, and where they tell of enough voters.",
        }
    )
    def get_changes(self, entry: JournalEntry) -> dict[str, Any]:
        # Wants `reads_tallies` in its context.
        return disclosure.journal_of(entry, reads_tallies=self.context["reads_tallies"])
