"""Charts as SVG, drawn by the server: no script runs in the admin that is not Django's."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from polls.cases import Bar

WIDTH, HEIGHT = 760, 150


def bars_of(step: timedelta, bars: Sequence[Bar]) -> dict[str, Any] | None:
    """Return what polls/chart.html draws: a bar for each step of time, its lower part the votes that count; None without votes."""
    if not bars:
        return None
    most = max(bar.votes for bar in bars)
    wide = WIDTH / len(bars)
    gap = 0.15 * wide

    def height_of(votes: int) -> float:
        return round(votes / most * HEIGHT, 1)

    drawn = [
        {
            "x": round(index * wide + gap / 2, 1),
            "width": round(wide - gap, 1),
            "counted_y": HEIGHT - height_of(bar.counted),
            "counted_height": height_of(bar.counted),
            "y": HEIGHT - height_of(bar.votes),
            "height": height_of(bar.votes - bar.counted),
            "bar": bar,
        }
        for index, bar in enumerate(bars)
    ]
    return {
        "bars": drawn,
        "most": most,
        "step": _in_words(step),
        "width": WIDTH,
        "height": HEIGHT,
        "begins_at": bars[0].begins_at,
        "ends_at": bars[-1].begins_at + step,
    }


def _in_words(step: timedelta) -> str:
    """Return "15 minutes", "1 hour", "7 days"."""
    seconds = int(step.total_seconds())
    for unit, name in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds % unit == 0:
            number = seconds // unit
            return f"{number} {name}" if number == 1 else f"{number} {name}s"
    return f"{seconds} seconds"
