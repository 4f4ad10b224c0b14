"""The plots of a report as SVG and HTML made by hand: no plotting library, no script, sharp at any size, coloured by the page's style.

All texts that come from questions, models or files pass through `escape`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape as _escape
from typing import Any

from llava.eval.report.measure import PARTS


def escape(text: object) -> str:
    """Text that is safe between tags and inside quoted attributes."""
    return _escape(str(text), quote=True)


@dataclass(frozen=True)
class Mark:
    """How a kind of row is drawn: its name in the legend, and its shape around (x, y)."""

    label: str
    shape: Callable[[float, float], str]


def _circle(radius: float) -> Callable[[float, float], str]:
    return lambda x, y: f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>'


def _polygon(radius: float, corners: int, turn: float, inner: float = 1.0) -> Callable[[float, float], str]:
    def draw(x: float, y: float) -> str:
        count = corners * (1 if inner == 1.0 else 2)
        points = []
        for corner in range(count):
            reach = radius * (inner if inner != 1.0 and corner % 2 else 1.0)
            angle = turn + 2 * math.pi * corner / count
            points.append(f"{x + reach * math.sin(angle):.1f},{y - reach * math.cos(angle):.1f}")
        return f'<polygon points="{" ".join(points)}"/>'

    return draw


MARKS = {
    "fixed": Mark("one granularity for all", _circle(5)),
    "random": Mark("random at the cost of adaptive", _polygon(7, 4, 0)),
    "bias": Mark("adaptive with a bias", _polygon(6.5, 3, 0)),
    "budget": Mark("adaptive within a budget", _polygon(6.5, 4, math.pi / 4)),
    "oracle": Mark("oracle: cheapest correct", _polygon(9, 5, 0, 0.45)),
    "adaptive": Mark("adaptive", _circle(8)),
}
"""Kinds of rows, in the order they are drawn: the last lies on top."""


def legend(kinds: Sequence[str]) -> str:
    """A line per kind of row."""
    entries = [
        f'<li><svg class="key" viewBox="0 0 22 22" aria-hidden="true"><g class="mark {kind}">{mark.shape(11, 11)}</g></svg>'
        f"{escape(mark.label)}</li>"
        for kind, mark in MARKS.items()
        if kind in kinds
    ]
    return f'<ul class="legend">{"".join(entries)}</ul>'


def scatter(rows: Sequence[Mapping[str, Any]], width: int, height: int) -> str:
    """Accuracy against visual tokens, tokens on a logarithmic axis; whiskers are 95 % intervals."""
    left, right, top, bottom = 46, 14, 14, 44
    tokens = [row["tokens"] for row in rows]
    lows = [(row["interval"] or [row["accuracy"]])[0] for row in rows]
    low = max(0.0, min(lows) - 3)
    low, high = 5 * math.floor(low / 5), 100.0
    start, end = math.log2(max(min(tokens), 1)) - 0.3, math.log2(max(tokens)) + 0.3

    def x(value: float) -> float:
        return left + (math.log2(max(value, 1)) - start) / (end - start) * (width - left - right)

    def y(value: float) -> float:
        return top + (high - value) / (high - low) * (height - top - bottom)

    fixed = [row for row in rows if row["kind"] == "fixed"]
    parts = [f'<svg class="plot" viewBox="0 0 {width} {height}" role="img" aria-label="Accuracy against visual tokens">']
    step = next(step for step in (1, 2, 5, 10, 20, 25) if (high - low) / step <= 8)
    value = math.ceil(low / step) * step
    while value <= high:
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 7}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
        value += step
    for row in fixed:
        parts.append(f'<line class="grid" x1="{x(row["tokens"]):.1f}" x2="{x(row["tokens"]):.1f}" y1="{top}" y2="{height - bottom}"/>')
        parts.append(
            f'<text class="tick" x="{x(row["tokens"]):.1f}" y="{height - bottom + 17}" text-anchor="middle">{row["tokens"]:.0f}</text>'
        )
    middle = (left + width - right) / 2
    parts.append(
        f'<text class="axis" x="{middle:.0f}" y="{height - 7}" text-anchor="middle">visual tokens per question (log scale)</text>'
    )
    line = " ".join(f"{x(row['tokens']):.1f},{y(row['accuracy']):.1f}" for row in fixed)
    parts.append(f'<polyline class="line" points="{line}"/>')
    order = list(MARKS)
    for row in sorted(rows, key=lambda row: order.index(row["kind"])):
        parts.append(_point(row, x, y))
    return "".join([*parts, "</svg>"])


def _point(row: Mapping[str, Any], x: Callable[[float], float], y: Callable[[float], float]) -> str:
    across, up = x(row["tokens"]), y(row["accuracy"])
    title = f"{row['name']}: {row['accuracy']:.1f} % at {row['tokens']:.0f} visual tokens"
    whisker = ""
    if row["interval"] is not None:
        ends = [y(value) for value in row["interval"]]
        whisker = f'<line class="whisker" x1="{across:.1f}" x2="{across:.1f}" y1="{ends[0]:.1f}" y2="{ends[1]:.1f}"/>'
    shape = MARKS[row["kind"]].shape(across, up)
    return f'<g class="mark {escape(row["kind"])}">{whisker}{shape}<title>{escape(title)}</title></g>'


def choice_bars(choices: Mapping[str, Sequence[float]], levels: Sequence[int]) -> str:
    """A bar per family: the share of questions at each granularity."""
    lines = []
    for family, shares in choices.items():
        segments = "".join(
            f'<span class="level-{index}" style="width:{share:.2f}%" title="{escape(family)}: {share:.0f} % at {level} tokens per view">'
            f"{f'{share:.0f}' if share >= 9 else ''}</span>"
            for index, (share, level) in enumerate(zip(shares, levels, strict=True))
            if share > 0
        )
        lines.append(f'<div class="bar-row"><span class="bar-name">{escape(family)}</span><span class="bar">{segments}</span></div>')
    key = "".join(f'<li><span class="swatch level-{index}"></span>{level}</li>' for index, level in enumerate(levels))
    return f'<ul class="legend"><li>tokens per view:</li>{key}</ul><div class="bars">{"".join(lines)}</div>'


def time_bars(rows: Sequence[Mapping[str, Any]]) -> str:
    """A bar per row: where the time of an answer goes, on one scale."""
    longest = max(row["cost"]["total_ms"] for row in rows)
    lines = []
    for row in rows:
        parts = row["cost"]["milliseconds"]
        segments = "".join(
            f'<span class="part-{part}" style="width:{100 * parts[part] / longest:.2f}%" title="{part}: {parts[part]:.1f} ms"></span>'
            for part in PARTS
            if parts[part] > 0
        )
        lines.append(
            f'<div class="bar-row"><span class="bar-name">{escape(row["name"])}</span><span class="bar open">{segments}</span>'
            f'<span class="bar-value">{row["cost"]["total_ms"]:.1f} ms</span></div>'
        )
    key = "".join(f'<li><span class="swatch part-{part}"></span>{part}</li>' for part in PARTS)
    return f'<ul class="legend">{key}</ul><div class="bars timed">{"".join(lines)}</div>'
