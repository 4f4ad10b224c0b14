"""From router logits to a granularity per image: the caller's wishes, the budget, and the report of what was decided."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RoutingRequest:
    """What a caller asks of one call.

    granularity: `None` lets the router choose (full granularity where the model has none), a number fixes the tokens per view (any
        number above the finest level means the finest: scripts ask every LLaVA for 576), a list limits the choice.
    max_visual_tokens: a budget for all images of one prompt together.
    bias: added to the router's logits per log2 of an image's tokens over its coarsest level's; negative is cheaper.
    """

    granularity: int | Sequence[int] | None = None
    max_visual_tokens: int | None = None
    bias: float = 0.0


@dataclass(frozen=True)
class RoutingReport:
    """What was decided for one image.

    logits: (G,) of the router, coarse to fine, before any bias; `None` where no router was asked.
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
        ValueError: a level the model does not have, an empty list, a budget below 1, or a bias that is not finite or without a router.
    """
    if request.max_visual_tokens is not None and request.max_visual_tokens < 1:
        raise ValueError(f"max_visual_tokens is {request.max_visual_tokens}, expected 1 or more.")
    if not math.isfinite(request.bias):
        raise ValueError(f"granularity_bias is {request.bias}, expected a finite number.")
    if request.bias and not has_router:
        raise ValueError(f"granularity_bias is {request.bias}, but this model has no router to bias; choose vis_token_granularity instead.")
    wanted = request.granularity
    if wanted is None:
        return list(range(len(levels)))
    if isinstance(wanted, int) and wanted > levels[-1]:
        logger.warning("vis_token_granularity is %d, more than this model has; its finest, %d, is used", wanted, levels[-1])
        return [len(levels) - 1]
    names = [wanted] if isinstance(wanted, int) else list(wanted)
    unknown = [name for name in names if name not in levels]
    if unknown or not names:
        raise ValueError(f"vis_token_granularity is {wanted}, but this model has {list(levels)} tokens per view; choose from these.")
    return sorted(levels.index(name) for name in set(names))


def choose_levels(
    logits: Sequence[Sequence[float] | None], costs: Sequence[Sequence[int]], allowed: Sequence[int], request: RoutingRequest
) -> list[int]:
    """Choose a level for every image of one prompt.

    Each image takes its highest biased logit among the allowed levels (the finest where there is no router). While the images
    together exceed the budget, the step to a cheaper level that loses the least logit is taken; for one image that ends at its
    best level within the budget.

    Args:
        logits: (G,) per image, or `None` without a router.
        costs: visual tokens of each image at each level.

    Returns:
        A level index per image.

    Raises:
        ValueError: a budget below the coarsest allowed choice, see `check_budget`.
    """
    scores = [_scores(image_logits, image_costs, request.bias) for image_logits, image_costs in zip(logits, costs, strict=True)]
    choice = [max(allowed, key=lambda level, s=image_scores: s[level]) for image_scores in scores]  # type: ignore[misc]
    budget = request.max_visual_tokens
    if budget is None:
        return choice
    check_budget(costs, allowed, request)
    while sum(image_costs[level] for image_costs, level in zip(costs, choice, strict=True)) > budget:
        steps = [
            (image, level)
            for image, chosen in enumerate(choice)
            for level in allowed
            if costs[image][level] < costs[image][chosen]
        ]
        image, level = max(steps, key=lambda step: scores[step[0]][step[1]] - scores[step[0]][choice[step[0]]])
        choice[image] = level
    return choice


def check_budget(costs: Sequence[Sequence[int]], allowed: Sequence[int], request: RoutingRequest) -> None:
    """Refuse a budget below the coarsest allowed choice of one prompt's images.

    Args:
        costs: visual tokens of each image at each level.

    Raises:
        ValueError: naming the budget and that cost.
    """
    if request.max_visual_tokens is None:
        return
    cheapest = sum(min(image_costs[level] for level in allowed) for image_costs in costs)
    if cheapest > request.max_visual_tokens:
        raise ValueError(
            f"max_visual_tokens is {request.max_visual_tokens}, but the coarsest granularity allowed costs {cheapest} visual tokens here; "
            "raise the budget."
        )


def _scores(logits: Sequence[float] | None, costs: Sequence[int], bias: float) -> list[float]:
    if logits is None:
        return [math.log2(cost) for cost in costs]
    return [logit + bias * math.log2(cost / costs[0]) for logit, cost in zip(logits, costs, strict=True)]
