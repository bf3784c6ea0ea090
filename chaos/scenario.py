"""What a scenario is, and all of them by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from chaos.stage import Edit, Stage


@dataclass(frozen=True)
class Scenario:
    """What goes wrong. `happen` runs while votes are cast."""

    name: str
    what: str
    happen: Callable[[Stage], None]
    edits: tuple[Edit, ...] = ()
    # What it is played on.
    on: type[Stage] = Stage
    # The rest of what a stage is told: see stage.Stage.
    stage: Mapping[str, Any] = field(default_factory=dict)
    # What is done before anybody votes.
    before: Callable[[Stage], None] | None = None
    # What is done, and looked at, once the load has ended and all is counted.
    after: Callable[[Stage], None] | None = None
    # See clients.Crowd.
    crowd: Mapping[str, Any] = field(default_factory=dict)
    # Part of what it complains of when it is a control, and the oracle can't see: that a poll was final too early, or never.
    finds: str = ""
    # Dead letters that it leaves.
    dead_letters: int = 0


ALL: dict[str, Scenario] = {}


def scenario(what: str, **rest: Any) -> Callable[[Callable[[Stage], None]], Callable[[Stage], None]]:
    """Make a scenario of what is to happen; its name is the function's."""

    def add(happen: Callable[[Stage], None]) -> Callable[[Stage], None]:
        name = happen.__name__.replace("_", "-")
        ALL[name] = Scenario(name, what, happen, **rest)
        return happen

    return add
