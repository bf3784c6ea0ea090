"""The shape of what the API takes and shows. The rules are in polls/editing.py."""

from typing import Any

from drf_spectacular.utils import extend_schema_field
from rest_framework import serializers

from polls.models import MAX_OPTIONS, Option, Poll


class StrictSerializer(serializers.Serializer[Any]):
    """Refuses fields it does not know: a misspelt one must not be ignored in silence."""

    def to_internal_value(self, data: Any) -> Any:
        if isinstance(data, dict):
            unknown = {name: ["There is no such field."] for name in data if name not in self.fields}
            read_only = {name: ["This field can't be set."] for name, field in self.fields.items() if name in data and field.read_only}
            if unknown or read_only:
                raise serializers.ValidationError({**unknown, **read_only})
        return super().to_internal_value(data)


class OptionSerializer(StrictSerializer, serializers.ModelSerializer[Option]):
    """An option as the API shows it and as a change is sent."""

    id = serializers.CharField(
        required=False, help_text="Unique over all polls. In a change: the option to keep; leave it out for a new one."
    )
    text = serializers.CharField(max_length=200)

    class Meta:
        model = Option
        fields = ["id", "text", "position"]
        read_only_fields = ["position"]


class NewOptionSerializer(StrictSerializer):
    """An option as it is created."""

    text = serializers.CharField(max_length=200)


class PollSerializer(StrictSerializer, serializers.ModelSerializer[Poll]):
    """A poll as the API shows it and as a change is sent."""

    id = serializers.CharField(read_only=True)
    options = OptionSerializer(many=True, min_length=2, max_length=MAX_OPTIONS)  # type: ignore[call-arg]
    status = serializers.ChoiceField(choices=["scheduled", "open", "closed"], read_only=True)
    links = serializers.SerializerMethodField()

    class Meta:
        model = Poll
        fields = [
            "id",
            "title",
            "description",
            "status",
            "options",
            "voter_policy",
            "allow_change",
            "opens_at",
            "closes_at",
            "created_at",
            "links",
        ]
        read_only_fields = ["created_at"]
        extra_kwargs = {
            "voter_policy": {"required": True, "help_text": "Who is one voter."},
            "allow_change": {"help_text": "True: a voter's last accepted vote stands. False: the first."},
            "opens_at": {"help_text": "Default: now."},
        }

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

    def validate_options(self, options: list[dict[str, str]]) -> list[dict[str, str]]:
        texts = [option["text"] for option in options]
        if twice := next((text for text in texts if texts.count(text) > 1), None):
            raise serializers.ValidationError(f"Two options read {twice!r}.")
        ids = [option["id"] for option in options if "id" in option]
        if len(ids) != len(set(ids)):
            raise serializers.ValidationError("The same id stands twice.")
        return options


class NewPollSerializer(PollSerializer):
    """A poll as it is created."""

    options = NewOptionSerializer(many=True, min_length=2, max_length=MAX_OPTIONS)  # type: ignore[call-arg, assignment]
