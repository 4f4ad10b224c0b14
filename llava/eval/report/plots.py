"""The scatter plot of a report, drawn by matplotlib as SVG that lies in the page and takes its colours from the page's style."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib.style
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

POINTS_PER_INCH = 72
LEGEND_COLUMN = 250
"""Width in pixels of the longest line of the legend."""
COLOURS = {"#7b8a87": "grey", "#b42318": "bad", "#7c6cd0": "violet", "#3b82c4": "blue", "#e0a400": "gold", "#0f766e": "accent",
           "#5c6b68": "soft", "#dde3e1": "line", "#ffffff": "card"}  # fmt: skip
"""Placeholder colours given to matplotlib, and the variables of the page's style that replace them: light and dark pages share one."""
SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none", "font.size": 12.5, "text.parse_math": False, "legend.fontsize": 12,
    "axes.edgecolor": "none", "axes.facecolor": "none", "figure.facecolor": "none", "axes.labelcolor": "#5c6b68",
    "xtick.color": "#5c6b68", "ytick.color": "#5c6b68", "xtick.major.size": 0, "ytick.major.size": 0, "xtick.minor.size": 0,
    "grid.color": "#dde3e1", "axes.axisbelow": True,
}  # fmt: skip


class Mark(NamedTuple):
    """How a kind of policy is drawn: its name in the legend, marker, size in points and colour."""

    label: str
    marker: Any
    size: float
    colour: str


MARKS = {
    "fixed": Mark("one granularity for all", "o", 9, "#7b8a87"),
    "random": Mark("random at the cost of adaptive", "D", 8, "#b42318"),
    "bias": Mark("adaptive with a bias", "^", 10, "#7c6cd0"),
    "budget": Mark("adaptive within a budget", "s", 8, "#3b82c4"),
    "oracle": Mark("oracle: cheapest correct", "*", 15, "#e0a400"),
    "adaptive": Mark("adaptive", "o", 14, "#0f766e"),
}
"""Kinds of policies, in the order they are drawn: the last lies on top."""


def scatter(rows: Sequence[Mapping[str, Any]], width: int, height: int) -> Markup:
    """Accuracy against visual tokens, tokens on a logarithmic axis; whiskers are 95 % intervals.

    Args:
        rows: of the report. width, height: in pixels of the page.

    Returns:
        An `svg` element in which no text from outside is markup.
    """
    with matplotlib.style.context(["default", SETTINGS | {"svg.hashsalt": f"{width}x{height}"}]):
        figure = Figure(figsize=(width / POINTS_PER_INCH, height / POINTS_PER_INCH), layout="constrained")
        axes = figure.add_subplot()
        fixed = [row for row in rows if row["kind"] == "fixed"]
        axes.plot([row["tokens"] for row in fixed], [row["accuracy"] for row in fixed], linestyle="--", linewidth=1.5, color="#7b8a87")
        titles: dict[str, str] = {}
        for kind, mark in MARKS.items():
            for index, row in enumerate(row for row in rows if row["kind"] == kind):
                titles[f"{kind}-{index}-{width}"] = f"{row['name']}: {row['accuracy']:.1f} % at {row['tokens']:.0f} visual tokens"
                _draw(axes, row, mark, f"{kind}-{index}-{width}", mark.label if index == 0 else None)
        _lay_out(axes, rows, [row["tokens"] for row in fixed])
        columns = max(1, width // LEGEND_COLUMN)
        figure.legend(loc="outside lower left", ncols=columns, frameon=False, labelcolor="#5c6b68", handletextpad=0.2, columnspacing=1.0)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Creator": None, "Date": None, "Format": None, "Type": None})
    return _for_the_page(text.getvalue(), titles)


def _draw(axes: Any, row: Mapping[str, Any], mark: Mark, name: str, label: str | None) -> None:
    """A row's point, and its whisker where it has an interval."""
    if row["interval"] is not None:
        axes.vlines(row["tokens"], *row["interval"], color=mark.colour, alpha=0.55, linewidth=1.6)
    hollow = mark is MARKS["random"]
    face, edge, line = ("#ffffff", mark.colour, 2.0) if hollow else (mark.colour, "#ffffff", 1.4)
    axes.plot(
        [row["tokens"]], [row["accuracy"]], mark.marker, markersize=mark.size, markerfacecolor=face, markeredgecolor=edge,
        markeredgewidth=line, label=label, gid=name, clip_on=False,
    )  # fmt: skip


def _lay_out(axes: Any, rows: Sequence[Mapping[str, Any]], ticks: Sequence[float]) -> None:
    """Axes and grid: a tick at every fixed granularity."""
    tokens = [max(row["tokens"], 1) for row in rows]
    low = max(0.0, min((row["interval"] or [row["accuracy"]])[0] for row in rows) - 3)
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(tokens) / 1.23, max(tokens) * 1.23)
    axes.set_ylim(5 * (low // 5), 100)
    axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
    axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.set_xlabel("visual tokens per question (log scale)")
    axes.grid(True)


def _for_the_page(svg: str, titles: Mapping[str, str]) -> Markup:
    """A drawing as an element of the page: without the XML around it, in the page's colours, a title on every point."""
    svg = svg[svg.index("<svg") :]
    head = r'<svg class="plot" role="img" aria-label="Accuracy against visual tokens" \1>'
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', head, svg)
    for colour, name in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    for name, title in titles.items():
        svg = svg.replace(f'<g id="{name}">', f'<g id="{name}"><title>{escape(title)}</title>')
    return Markup(svg)
