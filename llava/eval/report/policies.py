"""The policies that a report compares: rules that pick a granularity for every question."""

from __future__ import annotations

from collections.abc import Sequence
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
"""The flag that asks for a kind of policy."""


@dataclass(frozen=True)
class Policy:
    """A rule that picks a granularity: its name in the table, its kind, and the request that makes the model follow it.

    kind: `fixed`, `adaptive`, `bias` or `budget`; for policies computed from the fixed ones, whose request is `None`, `random` or `oracle`.
    """

    name: str
    kind: str
    request: RoutingRequest | None


@dataclass(frozen=True)
class AppliedPolicy(Policy):
    """A policy and what it picked: (Q, G) weights, the probability that each question is answered at each granularity."""

    weights: np.ndarray


def fixed_policies(granularities: Sequence[int]) -> list[Policy]:
    """One granularity for every question, for each of some."""
    return [Policy(f"fixed {tokens}", "fixed", RoutingRequest(tokens)) for tokens in granularities]


def routed_policies(
    has_router: bool, granularities: Sequence[int] | None, biases: Sequence[float] | None, budgets: Sequence[int]
) -> list[Policy]:
    """The policies whose choice depends on the question.

    Args:
        granularities: tokens per view that the choice is limited to, or `None`. biases: `None` takes `DEFAULT_BIASES` where there is a
            router. budgets: visual tokens.
    """
    policies = [Policy("adaptive", "adaptive", RoutingRequest(granularities))] if has_router else []
    for bias in biases if biases is not None else DEFAULT_BIASES if has_router else ():
        policies.append(Policy(f"adaptive, bias {bias:+g}", "bias", RoutingRequest(granularities, bias=bias)))
    for budget in budgets:
        name = f"adaptive, at most {budget}" if has_router else f"finest within {budget}"
        policies.append(Policy(name, "budget", RoutingRequest(granularities, max_visual_tokens=budget)))
    return policies


def check_policies(assistant: Assistant, task: Task, policies: Sequence[Policy]) -> None:
    """Refuse a policy that the model cannot follow before any question is asked.

    Raises:
        ValueError: the policy, the flag that asked for it, and why.
    """

    @lru_cache(maxsize=1)
    def image(name: str) -> Image.Image:
        return load_image(task.folder / name)

    def question(item: Item) -> Question:
        return Question([image(item.image)], item.text)

    questions = [(item.question_id, partial(question, item)) for item in task.items]
    for policy in policies:
        assert policy.request is not None, f"the policy {policy.name} is computed, not asked for"
        try:
            check_questions(assistant, questions, Options(routing=policy.request))
        except ValueError as error:
            flag = FLAGS.get(policy.kind)
            raise ValueError(f"The policy '{policy.name}'{f' of {flag}' if flag else ''} cannot be used. {error}") from error


def apply_policies(
    outcomes: Outcomes, records: Sequence[Record], granularities: Sequence[int], routed: Sequence[Policy]
) -> tuple[list[AppliedPolicy], list[str]]:
    """What every policy picks for every question, in the order of the table.

    Args:
        granularities: tokens per view of the answers. routed: see `routed_policies`.

    Returns:
        The policies, with random choice and the oracle among them, and why some were left out.
    """
    left_out: list[str] = []
    applied = [
        AppliedPolicy(policy.name, policy.kind, policy.request, outcomes.fixed(level))
        for level, policy in enumerate(fixed_policies(granularities))
    ]
    logits = [record.logits for record in records]
    for policy in routed:
        assert policy.request is not None, f"the policy {policy.name} is computed, not asked for"
        try:
            weights = outcomes.routed(logits, granularities, policy.request)
        except ValueError as error:
            left_out.append(f"the policy '{policy.name}' is left out: {error}")
            continue
        if policy.kind == "adaptive":
            applied.append(AppliedPolicy("random at that cost", "random", None, outcomes.random_at(outcomes.mean_tokens(weights))))
        applied.append(AppliedPolicy(policy.name, policy.kind, policy.request, weights))
    return [*applied, AppliedPolicy("oracle", "oracle", None, outcomes.cheapest_right())], left_out
