"""`make bench-report`: docs/performance.md and its plots, from `.local/bench.json`. The same input makes the same files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot

from bench.page import CONTESTANTS, LIMITS, page, points

ROOT = Path(__file__).parent.parent
BENCH, SCALE = ROOT / ".local" / "bench.json", ROOT / ".local" / "bench" / "scale.json"
PAGE = ROOT / "docs" / "performance.md"
PLOTS = ROOT / "docs" / "performance"

OURS, PEER, LIMIT = "#0b6e4f", "#8a8d91", "#c8553d"
SHADES = {
    "product_single": OURS,
    "product_single_64": "#4fa283",
    "task_per_vote": "#3d3f42",
    "sync_drf": "#8a8d91",
    "sync_drf_count": "#bcbec1",
}
PERCENTILES = {"p50": "50 %", "p75": "75 %", "p90": "90 %", "p95": "95 %", "p99": "99 %", "p999": "99.9 %"}
STYLE = {
    "svg.hashsalt": "nexus",
    "svg.fonttype": "none",  # text stays text: small files, and searchable
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8d91",
    "axes.grid": True,
    "grid.color": "#e6e7e8",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def plain(value: float, _: int = 0) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def plot_votes(summary: dict[str, Any]) -> Any:
    """A dot for each, and a line from its least to its most."""
    contestants, limits = summary.get("contestants", {}), summary.get("limits", {})
    found = [
        (words.replace("`", ""), contestants[name], "counted_per_s", OURS if name.startswith(("product", "policy")) else PEER)
        for name, words in CONTESTANTS.items()
        if name in contestants
    ]
    found += [(f"limit: {words}", limits, name, LIMIT) for name, words in LIMITS.items() if name in limits]
    if not found:
        return None
    figure, axes = pyplot.subplots(figsize=(7, 0.6 + 0.26 * len(found)))
    for place, (_, values, name, colour) in enumerate(found):
        axes.plot(values["range"][name], [place, place], color=colour, linewidth=2, alpha=0.5)
        axes.plot(values[name], place, "o", color=colour, markersize=5)
        axes.annotate(plain(values[name]), (values["range"][name][1], place), (6, 0), textcoords="offset points", va="center")
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.xaxis.set_major_formatter(plain)
    axes.set_yticks(range(len(found)), [words for words, *_ in found])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("a second (each line ten times the one before)")
    return figure


def plot_latency(summary: dict[str, Any]) -> Any:
    contestants = summary.get("contestants", {})
    names = [name for name in SHADES if name in contestants]
    if not names:
        return None
    figure, axes = pyplot.subplots(figsize=(7, 3.4))
    for name in names:
        axes.plot(
            [contestants[name][f"{share}_ms"] for share in PERCENTILES], "o-", color=SHADES[name], markersize=3, label=CONTESTANTS[name]
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(plain)
    axes.set_xticks(range(len(PERCENTILES)), PERCENTILES.values())
    axes.set_xlabel("of the requests are answered within")
    axes.set_ylabel("milliseconds")
    figure.legend(loc="outside upper left", ncols=2)
    return figure


def plot_lag(summary: dict[str, Any]) -> Any:
    lag = summary.get("series", {}).get("lag")
    if not lag:
        return None
    seconds, half, most = zip(*lag, strict=True)
    figure, axes = pyplot.subplots(figsize=(7, 2.4))
    axes.plot(seconds, most, color=OURS, linewidth=1.2, label="99 % of the votes")
    axes.plot(seconds, half, color=PEER, linewidth=1.2, label="50 %")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("second in which they were accepted")
    axes.set_ylabel("milliseconds")
    axes.legend()
    return figure


def plot_scale(scale: dict[str, Any]) -> Any:
    """One small plot for each value."""
    found = points(scale)
    rows, *names = found[0]
    figure, all_axes = pyplot.subplots(1, len(names), figsize=(2.4 * len(names), 2.2), squeeze=False)
    for axes, name in zip(all_axes[0], names, strict=True):
        axes.plot([point[rows] for point in found], [point[name] for point in found], "o-", color=OURS, markersize=3)
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.set_title(name.strip(), fontsize=8)
        axes.set_xlabel(rows)
        axes.xaxis.set_major_formatter(short)
        axes.yaxis.set_major_formatter(plain)
    return figure


def short(value: float, _: int = 0) -> str:
    """Return 10k, 1M, 1B."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def main() -> int:
    if not BENCH.exists():
        print("Nothing was measured yet: `make bench`.", file=sys.stderr)
        return 1
    summary = json.loads(BENCH.read_text())
    scale = json.loads(SCALE.read_text()) if SCALE.exists() else None
    mpl.use("svg")
    mpl.rcParams.update(STYLE)
    drawn = {
        "votes": plot_votes(summary),
        "latency": plot_latency(summary),
        "lag": plot_lag(summary),
        "scale": plot_scale(scale) if scale and scale.get("stored") else None,
    }
    PLOTS.mkdir(exist_ok=True)
    for name, figure in drawn.items():
        if figure:
            figure.savefig(PLOTS / f"{name}.svg", metadata={"Date": None})
    PAGE.write_text(page(summary, scale, [name for name, figure in drawn.items() if figure]))
    print(f"Written: {PAGE.relative_to(ROOT)} and {sum(map(bool, drawn.values()))} plots beside it.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
