"""How much one document may ask for, judged before any of it is validated or answered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from graphql import (
    DocumentNode,
    FieldNode,
    FragmentDefinitionNode,
    GraphQLError,
    InlineFragmentNode,
    OperationDefinitionNode,
    SelectionSetNode,
    value_from_ast_untyped,
)
from strawberry.extensions import SchemaExtension

from polls.api.pages import NewestFirst

MAX_DOCUMENT_LENGTH = 8192  # characters, as many as a vote's body may have bytes
MAX_TOKENS = 1000
MAX_DEPTH = 8
MAX_ALIASES = 15
# Fields, those on a page as often as the page is long. Chosen: the longest page, with everything that there is on each poll, is within it.
MAX_COST = 6500
# What a poll costs beside the fields that are asked for: it is read and made ready as a whole.
POLL_COST = 5

PAGE_SIZE = NewestFirst.page_size
MAX_PAGE_SIZE = 100
MAX_RECEIPTS = 100


@dataclass(frozen=True)
class Extent:
    """How far a selection goes."""

    depth: int = 0
    aliases: int = 0
    cost: int = 0

    def beside(self, other: Extent) -> Extent:
        return Extent(max(self.depth, other.depth), self.aliases + other.aliases, self.cost + other.cost)


class Limits(SchemaExtension):
    """Refuses documents beyond the limits.

    Strawberry's own limiters walk a fragment as often as it is spread: 723 bytes of fragments that each spread the next one twice kept them
    busy for 4 s, and each 36 bytes more double that. Here each is measured once.
    """

    def on_validate(self) -> Iterator[None]:
        asked = self.execution_context
        if asked.graphql_document and (refused := refusal(asked.graphql_document, asked.variables or {})):
            asked.pre_execution_errors = [GraphQLError(refused)]  # nothing else is looked at then
        yield


def refusal(document: DocumentNode, variables: Mapping[str, Any]) -> str | None:
    """Return what of the document is too much, or None."""
    fragments = {found.name.value: found for found in document.definitions if isinstance(found, FragmentDefinitionNode)}
    for operation in document.definitions:
        if isinstance(operation, OperationDefinitionNode):
            found = _Measure(fragments, {**_defaults(operation), **variables}).extent(operation.selection_set)
            for name, value, limit in (
                ("depth", found.depth, MAX_DEPTH),
                ("number of aliases", found.aliases, MAX_ALIASES),
                ("cost", found.cost, MAX_COST),
            ):
                if value > limit:
                    return f"The document's {name} is over {limit}. Ask for less at a time."
    return None


class _Measure:
    """Measures one operation."""

    def __init__(self, fragments: Mapping[str, FragmentDefinitionNode], variables: dict[str, Any]) -> None:
        self._fragments = fragments
        self._variables = variables
        self._known: dict[str, Extent] = {}

    def extent(self, selections: SelectionSetNode | None) -> Extent:
        found = Extent()
        for selection in selections.selections if selections else ():
            if isinstance(selection, FieldNode):
                found = found.beside(self._of_field(selection))
            elif isinstance(selection, InlineFragmentNode):
                found = found.beside(self.extent(selection.selection_set))
            else:
                found = found.beside(self._of_fragment(selection.name.value))  # type: ignore[attr-defined] # a FragmentSpreadNode
        return found

    def _of_field(self, field: FieldNode) -> Extent:
        if field.name.value.startswith("__"):  # introspection has a limit of graphql-core's own
            return Extent(aliases=int(field.alias is not None))
        inner = self.extent(field.selection_set)
        each = inner.cost + (POLL_COST if field.name.value == "polls" else 0)
        return Extent(inner.depth + 1, inner.aliases + (field.alias is not None), 1 + each * self._length(field))

    def _of_fragment(self, name: str) -> Extent:
        if name not in self._known:
            self._known[name] = Extent()  # until it is measured: one that spreads itself is refused by the validation
            fragment = self._fragments.get(name)
            self._known[name] = self.extent(fragment.selection_set if fragment else None)
        return self._known[name]

    def _length(self, field: FieldNode) -> int:
        """Return how many of the field there are at most; the longest page where that can't be told."""
        given = {argument.name.value: value_from_ast_untyped(argument.value, self._variables) for argument in field.arguments or ()}
        if field.name.value == "polls":
            first = given.get("first", PAGE_SIZE)
            return first if isinstance(first, int) and 0 < first <= MAX_PAGE_SIZE else MAX_PAGE_SIZE
        if field.name.value == "votes":
            wanted = given.get("receipts")
            return min(len(wanted), MAX_RECEIPTS) if isinstance(wanted, list) else 1
        return 1


def _defaults(operation: OperationDefinitionNode) -> dict[str, Any]:
    return {
        definition.variable.name.value: value_from_ast_untyped(definition.default_value)
        for definition in operation.variable_definitions or ()
        if definition.default_value
    }
