"""From router logits to a granularity per image: the caller's request, the budget, and the report of the choice."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence, Set
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, TypeGuard

from torch import Tensor

from llava.messages import Detail, RoutingRequest
from llava.rules import shown

logger = logging.getLogger(__name__)

_LARGEST_BIAS = 1e30
"""Times a logarithm it is still a number, in every dtype of 32 bits too."""


class RoutingError(ValueError):
    """A routing request that cannot be met.

    Args:
        field: of `RoutingRequest`, that is at fault. least: the smallest value of it that would work, where there is one.
    """

    def __init__(self, message: str, field: str, least: int | None = None) -> None:
        super().__init__(message)
        self.field, self.least = field, least


@dataclass(frozen=True)
class RoutingReport:
    """The granularity chosen for one image, and why.

    logits: (G,) of the router, coarse to fine, before any bias; `None` where the router was not run.
    probabilities: (G,) softmax of the logits, or `None`.
    granularity: tokens per view of the chosen level.
    num_visual_tokens: what the image costs at it, newlines included.
    full_visual_tokens: what it would cost at the finest level.
    tokens_per_level: what it would cost at each level, by tokens per view.
    """

    logits: Tensor | None
    probabilities: Tensor | None
    granularity: int
    num_visual_tokens: int
    full_visual_tokens: int
    tokens_per_level: dict[int, int]


def allowed_levels(levels: Sequence[int], request: RoutingRequest, has_router: bool) -> list[int]:
    """Indices of the levels that a request leaves open, coarse to fine.

    Args:
        levels: tokens per view of each level of the model.
        has_router: without one, only the finest level is open unless a budget or list says otherwise.

    Raises:
        RoutingError: a level the model does not have, an empty list, a budget that is no whole number from 1 on, or a bias that is not
            finite or without a router.
    """
    budget = request.max_visual_tokens
    if budget is not None and not (_is_whole(budget) and budget >= 1):
        raise RoutingError(f"max_visual_tokens is {shown(budget)}, expected 1 or more.", "max_visual_tokens")
    if not _is_finite(request.bias):
        raise RoutingError(f"granularity_bias is {shown(request.bias)}, expected a finite number.", "bias")
    if request.bias and not has_router:
        raise RoutingError(
            f"granularity_bias is {request.bias}, but this model has no router to bias; choose vis_token_granularity instead.", "bias"
        )
    wanted = request.granularity
    if wanted is None:
        return list(range(len(levels)))
    if _is_whole(wanted) and wanted > levels[-1]:
        logger.warning("vis_token_granularity is %d, more than this model has; its finest, %d, is used", wanted, levels[-1])
        return [len(levels) - 1]
    names = list(wanted) if isinstance(wanted, (Sequence, Set)) else [wanted]
    if not names or not all(_is_whole(name) and name in levels for name in names):
        raise RoutingError(
            f"vis_token_granularity is {shown(wanted)}, but this model has {list(levels)} tokens per view; choose from these.",
            "granularity",
        )
    return sorted(levels.index(name) for name in set(names))


def _is_whole(value: Any) -> TypeGuard[int]:
    """Whether a value is a whole number, of any library's; callers of `generate` write what they like."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    """Whether a value is a number that the logits' own arithmetic can hold."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    return is_number and bool(-_LARGEST_BIAS <= value <= _LARGEST_BIAS)


def levels_per_image(allowed: Sequence[int], request: RoutingRequest, num_images: int) -> list[Sequence[int]]:
    """The levels that each image of a prompt may get, after its own detail.

    Args:
        allowed: from `allowed_levels`.

    Raises:
        RoutingError: another number of details than of images.
    """
    if request.details and len(request.details) != num_images:
        raise RoutingError(f"There are {len(request.details)} details, but {num_images} images; give one for each.", "details")
    finest = allowed[-1:] if request.max_visual_tokens is None else allowed
    open_to: dict[Detail | None, Sequence[int]] = {"low": allowed[:1], "high": finest, None: allowed}
    return [open_to[request.detail_of(image)] for image in range(num_images)]


def choose_levels(
    logits: Sequence[Sequence[float] | None], costs: Sequence[Sequence[int]], allowed: Sequence[int], request: RoutingRequest
) -> list[int]:
    """Choose a level for every image of one prompt.

    Each image takes its highest biased logit among the levels it may get (the finest where there is no router, or where its detail is
    `high`). While the images together exceed the budget, the step to a cheaper level that loses the least logit is taken, of images whose
    detail is `high` only when no other is left; for one image that ends at its best level within the budget.

    Args:
        logits: (G,) per image, or `None` without a router.
        costs: visual tokens of each image at each level.

    Returns:
        A level index per image.

    Raises:
        RoutingError: a budget below the coarsest allowed choice, see `check_budget`.
    """
    levels = levels_per_image(allowed, request, len(costs))
    is_high = [request.detail_of(image) == "high" for image in range(len(costs))]
    scores = [
        _scores(None if high else image_logits, image_costs, request.bias)
        for image_logits, image_costs, high in zip(logits, costs, is_high, strict=True)
    ]
    choice = [max(own, key=image_scores.__getitem__) for own, image_scores in zip(levels, scores, strict=True)]
    budget = request.max_visual_tokens
    if budget is None:
        return choice
    check_budget(costs, allowed, request)
    while sum(image_costs[level] for image_costs, level in zip(costs, choice, strict=True)) > budget:
        steps = [
            (image, level)
            for image, chosen in enumerate(choice)
            for level in levels[image]
            if costs[image][level] < costs[image][chosen]
        ]
        image, level = max(steps, key=lambda step: (not is_high[step[0]], scores[step[0]][step[1]] - scores[step[0]][choice[step[0]]]))
        choice[image] = level
    return choice


def check_budget(costs: Sequence[Sequence[int]], allowed: Sequence[int], request: RoutingRequest) -> None:
    """Refuse a budget below the coarsest allowed choice of one prompt's images.

    Args:
        costs: visual tokens of each image at each level.

    Raises:
        RoutingError: naming the budget and that cost.
    """
    if request.max_visual_tokens is None:
        return
    levels = levels_per_image(allowed, request, len(costs))
    cheapest = sum(min(image_costs[level] for level in own) for image_costs, own in zip(costs, levels, strict=True))
    if cheapest > request.max_visual_tokens:
        raise RoutingError(
            f"max_visual_tokens is {request.max_visual_tokens}, but the coarsest granularity allowed costs {cheapest} visual tokens here; "
            "raise the budget.",
            "max_visual_tokens",
            least=cheapest,
        )


def _scores(logits: Sequence[float] | None, costs: Sequence[int], bias: float) -> list[float]:
    if logits is None:
        return [math.log2(cost) for cost in costs]
    return [logit + bias * math.log2(cost / costs[0]) for logit, cost in zip(logits, costs, strict=True)]
