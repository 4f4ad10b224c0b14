"""Replies, reports and errors as HTML and SVG.

Every text and every number that came from a server or a browser passes `_text` or `_number` here, so that an answer can hold no markup,
and every image is a data URL that this process made: nothing that these functions write makes a browser load anything.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava.serve.backend.chat_client import ChatError
from llava.serve.page.catalogue import ModelList
from llava.serve.page.sessions import ChatImage, Reply, Turn

MAX_LEVELS = 32
"""Most bars that are drawn."""
MAX_SIDE = 100_000
"""Longest side of a drawing, in its own pixels."""
MAX_CELLS = 256
"""Most grid lines per side that are drawn; 3 x 24 = 72 is the most of the published models."""


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _number(value: Any) -> float | None:
    """A finite number, or `None`: reports come from other servers."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def _count(value: Any) -> str:
    number = _number(value)
    return "-" if number is None else f"{number:,.0f}"


def duration(milliseconds: Any) -> str:
    """`84 ms`, `1.3 s`."""
    number = _number(milliseconds)
    if number is None:
        return "-"
    return f"{number:.0f} ms" if number < 1000 else f"{number / 1000:.1f} s"


def text_html(text: str) -> str:
    """A question or an answer for Gradio's chatbot, which reads even plain text as HTML."""
    return f'<div class="avg-said">{_text(text)}</div>'


def thumbnails_html(images: Sequence[ChatImage]) -> str:
    """The small copies beside a question."""
    thumbnails = "".join(
        f'<img src="{image.thumbnail}" alt="image {index + 1}, {image.size[0]} by {image.size[1]} pixels">'
        for index, image in enumerate(images)
    )
    return f'<div class="avg-thumbnails">{thumbnails}</div>'


def about_html(description: str) -> str:
    """A model's description."""
    return f'<p class="avg-small avg-about">{_text(description)}</p>' if description else ""


def error_html(error: ChatError) -> str:
    """One failure: the server's sentence, its code and the request id."""
    identity = f" · request {_text(error.request_id)}" if error.request_id else ""
    status = f" · HTTP {error.status}" if error.status else ""
    details = f"{_text(error.code)}{status}{identity}"
    return f'<div class="avg-error" role="alert"><p>{_text(error.text)}</p><p class="avg-small">{details}</p></div>'


def notice_html(models: ModelList, address: str, gone: Sequence[str] = ()) -> str:
    """The notice above the chat while no model can answer; empty when one can.

    Args:
        gone: models that are chosen and no longer served.
    """
    if models.models and gone:
        names = ", ".join(f"<b>{_text(name)}</b>" for name in gone)
        are = "is" if len(gone) == 1 else "are"
        message = f"<p>{names} {are} not being served now: the worker is gone.</p>"
        message += '<p class="avg-small">Choose another model, or wait: it stays chosen and answers again when it is back.</p>'
        return f'<div class="avg-notice" role="status">{message}</div>'
    if models.models:
        return ""
    if models.error is not None:
        message = (
            f"<p><b>The list of models could not be loaded.</b> {_text(models.error.text)}</p>"
            f'<p class="avg-small">{_text(models.error.code)}. This page keeps trying and goes on by itself.</p>'
        )
    else:
        message = (
            "<p><b>No model is being served now.</b> Start a worker, and it appears here by itself:</p>"
            f"<pre>python -m llava.serve.model_worker --controller {_text(address)} \\\n"
            "    --port 40000 --worker http://localhost:40000 --model-path …</pre>"
        )
    return f'<div class="avg-notice" role="status">{message}</div>'


def report_html(reply: Reply, images: Sequence[ChatImage]) -> str:
    """The cost of an answer: numbers, the router's probabilities, and the images with their token grids.

    Args:
        images: all that were sent, in order; the server reports one per image.
    """
    outcome = reply.outcome
    reports = outcome.images if outcome else ()
    parts = [f'<div class="avg-facts">{"".join(_facts(reply))}</div>']
    if reply.status == "stopped":
        parts.append('<p class="avg-small">Stopped before the end.</p>')
    elif outcome is not None and outcome.finish_reason == "length":
        parts.append('<p class="avg-small">Cut off: the most new tokens, or the context, were reached.</p>')
    drawn = list(zip(reports, images, strict=False))
    room = _room_of_each(reports, reply.settings.max_visual_tokens)
    for index, (report, image) in enumerate(drawn):
        name = f"<h4>Image {index + 1}</h4>" if len(drawn) > 1 else ""
        parts.append(f'<div class="avg-image">{name}{_bars(report, room[index])}{_views(report, image)}</div>')
    return f'<div class="avg-card">{"".join(parts)}</div>'


def _fact(value: str, name: str, strong: bool = False) -> str:
    return f'<span class="avg-fact{" avg-strong" if strong else ""}"><b>{value}</b> {name}</span>'


def _facts(reply: Reply) -> Iterable[str]:
    outcome = reply.outcome
    if outcome is not None:
        chosen = [_count(image.get("granularity")) for image in outcome.images]
        if chosen:
            yield _fact(", ".join(dict.fromkeys(chosen)), "tokens per view", strong=True)
        spent, full = _number(outcome.usage.get("visual_tokens")), _number(outcome.usage.get("full_visual_tokens"))
        if spent is not None and full:
            yield _fact(_count(spent), f"of {_count(full)} visual tokens")
            yield _fact(f"{100 * (1 - spent / full):.0f} %", "saved")
    yield _fact(duration(reply.first_ms), "to first word")
    yield _fact(duration(reply.total_ms), "in all")
    if outcome is not None and _number(outcome.usage.get("completion_tokens")) is not None:
        yield _fact(_count(outcome.usage["completion_tokens"]), "new tokens")
    if outcome is not None and any(image.get("cached") is True for image in outcome.images):
        yield _fact("✓", "image cached")


def _room_of_each(reports: Sequence[Mapping[str, Any]], budget: int | None) -> list[float]:
    """The most visual tokens that each image may cost, where the others take their cheapest level."""
    cheapest = [min(costs, default=0.0) for costs in map(_costs, reports)]
    return [math.inf if budget is None else budget - (sum(cheapest) - own) for own in cheapest]


def _costs(report: Mapping[str, Any]) -> list[float]:
    levels = report.get("tokens_per_level")
    return [_number(cost) or 0.0 for cost in levels.values()] if isinstance(levels, Mapping) else []


def _bars(report: Mapping[str, Any], room: float) -> str:
    """One row per granularity: its cost, and how likely the router found it, or its cost as a bar where no router was asked.

    Args:
        room: visual tokens; levels that cost more were forbidden by the caller's budget, and are struck out.
    """
    levels = report.get("tokens_per_level")
    if not isinstance(levels, Mapping) or not levels or len(levels) > MAX_LEVELS:
        return ""
    costs = _costs(report)
    probabilities = report.get("probabilities")
    values = [_number(value) or 0.0 for value in probabilities] if isinstance(probabilities, (list, tuple)) else []
    asked = len(values) == len(costs)
    shares = values if asked else [cost / (max(costs) or 1.0) for cost in costs]
    rows = []
    for name, cost, share in zip(levels, costs, shares, strict=True):
        kind = "avg-chosen" if str(name) == str(report.get("granularity")) else "avg-forbidden" if cost > room else ""
        hint = ' title="over the token budget"' if kind == "avg-forbidden" else ""
        label = f"{100 * share:.0f} %" if asked else f"{cost:,.0f}"
        width = 100 * min(max(share, 0.0), 1.0)
        rows.append(
            f'<tr class="{kind}"{hint}><th scope="row">{_text(name)}</th><td>{cost:,.0f}</td>'
            f'<td class="avg-bar"><i style="width:{width:.1f}%"></i></td><td>{label}</td></tr>'
        )
    title = "how likely" if asked else "cost"
    caption = "Router's choice among granularities" if asked else "Cost of each granularity (the router was not asked)"
    caption += "; struck out: over the token budget" if any("avg-forbidden" in row for row in rows) else ""
    return (
        f'<table class="avg-bars"><caption>{caption}</caption><thead><tr><th scope="col">per view</th><th scope="col">tokens</th>'
        f'<th scope="col">{title}</th><th></th></tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )


def _views(report: Mapping[str, Any], image: ChatImage) -> str:
    grid = report.get("grid")
    views = grid.get("views") if isinstance(grid, Mapping) else None
    drawn = [view_svg(view, image) for view in views[:2]] if isinstance(views, list) else []
    figures = [f"<figure>{svg}<figcaption>{caption}</figcaption></figure>" for svg, caption in (each for each in drawn if each is not None)]
    if not figures:
        return f'<div class="avg-views"><figure><img src="{image.thumbnail}" alt="the image"></figure></div>'
    return f'<div class="avg-views">{"".join(figures)}</div>'


def _integers(value: Any, count: int) -> tuple[int, ...] | None:
    if not isinstance(value, (list, tuple)) or len(value) != count:
        return None
    return tuple(int(each) for each in value) if all(_number(each) is not None for each in value) else None


@dataclass(frozen=True)
class _View:
    """A view of `llava.visualize.grid_of`, checked: sizes in pixels and cells that fit into one another."""

    canvas: tuple[int, int]
    grid: tuple[int, int]
    tiles: tuple[int, int]
    rows: tuple[int, int]
    columns: tuple[int, int]
    picture: tuple[int, int, int, int]
    newlines: int

    @property
    def is_sound(self) -> bool:
        width, height = self.canvas
        down, across = self.grid
        return (
            0 < width <= MAX_SIDE
            and 0 < height <= MAX_SIDE
            and 0 < self.tiles[0] <= down <= MAX_CELLS
            and 0 < self.tiles[1] <= across <= MAX_CELLS
            and 0 <= self.rows[0] <= self.rows[1] <= down
            and 0 <= self.columns[0] <= self.columns[1] <= across
            and all(abs(edge) <= MAX_SIDE for edge in self.picture)
        )

    @property
    def kept(self) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) of the cells that are kept, in pixels."""
        width, height = self.canvas[0] / self.grid[1], self.canvas[1] / self.grid[0]
        return self.columns[0] * width, self.rows[0] * height, self.columns[1] * width, self.rows[1] * height

    @property
    def caption(self) -> str:
        name = "whole view" if self.tiles == (1, 1) else f"{self.tiles[0] * self.tiles[1]} tiles"
        ends = f" + {self.newlines} row ends" if self.newlines else ""
        return f"{name}: {self.rows[1] - self.rows[0]} by {self.columns[1] - self.columns[0]}{ends}"


def _read_view(view: Any) -> _View | None:
    if not isinstance(view, Mapping):
        return None
    names = {"canvas": 2, "grid": 2, "tiles": 2, "rows": 2, "columns": 2, "picture": 4}
    read = {name: _integers(view.get(name), count) for name, count in names.items()}
    newlines = _number(view.get("newlines", 0))
    if newlines is None or None in read.values():
        return None
    found = _View(**read, newlines=int(newlines))  # type: ignore[arg-type]
    return found if found.is_sound else None


def view_svg(view: Any, image: ChatImage) -> tuple[str, str] | None:
    """One view of `llava.visualize.grid_of` as SVG, one red cell per visual token, and what it shows; `None` for anything else."""
    found = _read_view(view)
    if found is None:
        return None
    width, height = found.canvas
    x0, y0, x1, y1 = found.picture
    svg = (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{found.caption}">'
        f'<rect class="avg-canvas" width="{width}" height="{height}"/>'
        f'<image href="{image.thumbnail}" x="{x0}" y="{y0}" width="{x1 - x0}" height="{y1 - y0}" preserveAspectRatio="none"/>'
        f"{_cells(found)}{_tiles(found)}</svg>"
    )
    return svg, found.caption


def _cells(view: _View) -> str:
    """What is dropped in grey, and the lines around the cells that are kept."""
    (width, height), (down, across) = view.canvas, view.grid
    left, top, right, bottom = view.kept
    lines = "".join(f"M{left:.1f} {row * height / down:.1f}H{right:.1f}" for row in range(view.rows[0], view.rows[1] + 1))
    lines += "".join(f"M{column * width / across:.1f} {top:.1f}V{bottom:.1f}" for column in range(view.columns[0], view.columns[1] + 1))
    dropped = f"M0 0H{width}V{height}H0ZM{left:.1f} {top:.1f}V{bottom:.1f}H{right:.1f}V{top:.1f}Z"
    return f'<path class="avg-dropped" fill-rule="evenodd" d="{dropped}"/><path class="avg-grid" d="{lines}"/>'


def _tiles(view: _View) -> str:
    width, height = view.canvas[0] / view.tiles[1], view.canvas[1] / view.tiles[0]
    return "".join(
        f'<rect class="avg-tile" x="{column * width:.1f}" y="{row * height:.1f}" width="{width:.1f}" height="{height:.1f}"/>'
        for row in range(view.tiles[0])
        for column in range(view.tiles[1])
    )


def chat_messages(turns: Sequence[Turn], side: int, component: Any) -> list[dict[str, Any]]:
    """One side's conversation as messages of Gradio's chatbot.

    Args:
        component: makes a chatbot's component of HTML.
    """
    messages: list[dict[str, Any]] = []
    shown: list[ChatImage] = []
    for turn in turns:
        shown = shown + turn.images
        question = text_html(turn.question)
        messages.append({"role": "user", "content": component(thumbnails_html(turn.images) + question) if turn.images else question})
        reply = turn.reply(side)
        if reply is not None:
            messages.append({"role": "assistant", "content": _reply_content(reply, shown, component)})
    return messages


def _reply_content(reply: Reply, images: Sequence[ChatImage], component: Any) -> Any:
    """One component, because Gradio puts its buttons below each: text while it is being written, then text with its report."""
    text = reply.text.strip()
    if reply.status == "streaming":
        return text_html(text) if text else component(_WAITING)
    written = text_html(text or "(no answer)") if text or reply.error is None else ""
    return component(written + (error_html(reply.error) if reply.error is not None else report_html(reply, images)))


_WAITING = '<div class="avg-waiting" role="status" aria-label="waiting for the answer"><i></i><i></i><i></i></div>'


def heading_html(reply: Reply | None) -> str:
    """Which model at which granularity, over one side of a comparison."""
    if reply is None:
        return ""
    granularity = reply.settings.granularity
    return f"{_text(reply.settings.model)} · {'auto' if granularity is None else f'{granularity} per view'}"
