"""The ways of choosing a granularity that a report compares: what each asks of the model, and which level each question is at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
from PIL import Image

from llava.eval.checks import check_questions
from llava.eval.report.answers import Record
from llava.eval.report.outcomes import Outcomes
from llava.eval.report.tasks import Item, Task
from llava.images import load_image
from llava.inference import Assistant, Options, Question
from llava.messages import RoutingRequest

DEFAULT_BIASES = (-1.0, -0.5, 0.5, 1.0)
FLAGS = {"fixed": "--granularities", "bias": "--biases", "budget": "--budgets"}
"""Where a kind of row is asked for."""
Wishes = dict[str, tuple[str, RoutingRequest]]
"""Rows to be, by name: kind and request."""


@dataclass(frozen=True)
class Way:
    """One row to be: a name, its kind, what it asks of the model (`None` where no single request does it), and its weights (Q, G)."""

    name: str
    kind: str
    request: RoutingRequest | None
    weights: np.ndarray


def wishes_of(
    has_router: bool, granularities: Sequence[int] | None, biases: Sequence[float] | None, budgets: Sequence[int]
) -> Wishes:
    """The rows that a single request can do besides the fixed ones.

    Args:
        granularities: tokens per view that the choice is limited to, or `None`. biases: `None` takes `DEFAULT_BIASES` where there is a
            router. budgets: visual tokens.
    """
    wishes: Wishes = {}
    if has_router:
        wishes["adaptive"] = ("adaptive", RoutingRequest(granularities))
    biases = biases if biases is not None else DEFAULT_BIASES if has_router else ()
    for bias in biases:
        wishes[f"adaptive, bias {bias:+g}"] = ("bias", RoutingRequest(granularities, bias=bias))
    for budget in budgets:
        name = f"adaptive, at most {budget}" if has_router else f"finest within {budget}"
        wishes[name] = ("budget", RoutingRequest(granularities, max_visual_tokens=budget))
    return wishes


def check_wishes(assistant: Assistant, task: Task, names: Sequence[int], wishes: Wishes) -> None:
    """Let a row that cannot be made fail before anything is asked.

    Args:
        names: tokens per view of the fixed rows.

    Raises:
        ValueError: the row, the flag that it comes from, and why.
    """

    @lru_cache(maxsize=1)
    def image(name: str) -> Image.Image:
        return load_image(task.folder / name)

    questions = [(item.question_id, partial(_question, item, image)) for item in task.items]
    fixed = {f"fixed {name}": ("fixed", RoutingRequest(name)) for name in names}
    for name, (kind, request) in {**fixed, **wishes}.items():
        try:
            check_questions(assistant, questions, Options(routing=request))
        except ValueError as error:
            raise ValueError(f"The row '{name}' of {FLAGS.get(kind, 'the router')} cannot be. {error}") from error


def _question(item: Item, image: Callable[[str], Image.Image]) -> Question:
    return Question([image(item.image)], item.text)


def ways_of_choosing(
    outcomes: Outcomes,
    records: Sequence[Record],
    names: Sequence[int],
    wishes: Wishes,
) -> tuple[list[Way], list[str]]:
    """All rows, in the order of the table, and what is to be said about rows that are left out."""
    left_out: list[str] = []
    ways = [Way(f"fixed {name}", "fixed", RoutingRequest(name), outcomes.fixed(level)) for level, name in enumerate(names)]
    logits = [record.logits for record in records]
    for name, (kind, request) in wishes.items():
        try:
            weights = outcomes.wished(logits, names, request)
        except ValueError as error:
            left_out.append(f"the row '{name}' is left out: {error}")
            continue
        if kind == "adaptive":
            ways.append(Way("random at that cost", "random", None, outcomes.random_at(outcomes.mean_tokens(weights))))
        ways.append(Way(name, kind, request, weights))
    return [*ways, Way("oracle", "oracle", None, outcomes.cheapest_right())], left_out
