"""Whose word counts: the router's, the caller's, the budget's."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llava.messages import RoutingRequest
from llava.model.routing import RoutingError, allowed_levels, choose_levels

LEVELS = [36, 72, 144]
COSTS = [40, 80, 160]


def choose(logits, request, costs=COSTS, has_router=True):
    allowed = allowed_levels(LEVELS, request, has_router)
    return choose_levels(logits, [costs] * len(logits), allowed, request)


def test_the_router_chooses_unless_told():
    assert choose([[0.1, 0.9, 0.5]], RoutingRequest()) == [1]
    assert choose([[0.1, 0.9, 0.5]], RoutingRequest(144)) == [2]
    assert choose([[0.1, 0.9, 0.5]], RoutingRequest([144, 36])) == [2]
    assert choose([None], RoutingRequest(), has_router=False) == [2]


def test_the_bias_counts_per_doubling_of_tokens():
    assert choose([[0.0, 0.9, 1.7]], RoutingRequest(bias=-0.85)) == [1]  # 0, 0.05, 0.0
    assert choose([[0.0, 0.9, 1.7]], RoutingRequest(bias=-1.0)) == [0]
    assert choose([[1.0, 0.9, 0.7]], RoutingRequest(bias=0.5)) == [2]


def test_a_budget_takes_the_best_level_that_fits():
    assert choose([[0.1, 0.0, 0.9]], RoutingRequest(max_visual_tokens=159)) == [0]
    assert choose([[0.1, 0.2, 0.9]], RoutingRequest(max_visual_tokens=80)) == [1]
    assert choose([[0.1, 0.2, 0.9]], RoutingRequest(max_visual_tokens=160)) == [2]
    assert choose([None], RoutingRequest(max_visual_tokens=100), has_router=False) == [1]


def test_a_budget_is_shared_by_the_images_of_a_prompt():
    logits = [[0.0, 0.5, 1.0], [0.0, 0.9, 1.0]]  # the second image loses less by stepping down
    assert choose(logits, RoutingRequest(max_visual_tokens=240)) == [2, 1]
    assert choose(logits, RoutingRequest(max_visual_tokens=160)) == [1, 1]


def test_details_choose_for_each_image_within_what_the_granularity_leaves_open():
    logits = [[0.1, 0.9, 0.5]] * 3
    details = ("low", "high", None)
    assert choose(logits, RoutingRequest(details=details)) == [0, 2, 1]
    assert choose(logits, RoutingRequest([72, 144], details=details)) == [1, 2, 1]
    assert choose(logits, RoutingRequest(72, details=details)) == [1, 1, 1]  # a number leaves nothing open
    assert choose([None] * 3, RoutingRequest(details=details), has_router=False) == [0, 2, 2]


def test_a_budget_holds_whatever_the_details_are():
    logits = [[0.1, 0.9, 0.8]] * 3
    details = ("high", None, "low")
    wish = {budget: choose(logits, RoutingRequest(max_visual_tokens=budget, details=details)) for budget in (280, 240, 160, 120)}
    assert wish == {280: [2, 1, 0], 240: [2, 0, 0], 160: [1, 0, 0], 120: [0, 0, 0]}  # the image that shall be high gives way last
    with pytest.raises(RoutingError, match="costs 120"):
        choose(logits, RoutingRequest(max_visual_tokens=119, details=details))


def test_there_is_one_detail_for_each_image_or_none():
    with pytest.raises(RoutingError, match="There are 1 details, but 2 images") as refused:
        choose([None] * 2, RoutingRequest(details=("low",)))
    assert refused.value.field == "details"


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (RoutingRequest(50), "granularity"),
        (RoutingRequest(max_visual_tokens=39), "max_visual_tokens"),
        (RoutingRequest(bias=math.inf), "bias"),
    ],
)
def test_refusals_name_the_field(request_, field):
    with pytest.raises(RoutingError) as refused:
        choose([[0.0, 0.0, 0.0]], request_)
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (RoutingRequest(50), "is 50, but this model has"),
        (RoutingRequest([36, 50]), r"is \[36, 50\], but this model has"),
        (RoutingRequest([]), r"is \[\], but this model has"),
        (RoutingRequest(max_visual_tokens=0), "is 0, expected 1 or more"),
        (RoutingRequest(max_visual_tokens=39), "is 39, but the coarsest granularity allowed costs 40"),
        (RoutingRequest(144, max_visual_tokens=80), "is 80, but the coarsest granularity allowed costs 160"),
    ],
)
def test_refusals_name_what_was_asked_and_what_there_is(request_, message):
    with pytest.raises(ValueError, match=message):
        choose([[0.0, 0.0, 0.0]], request_)


def test_a_bias_needs_a_router():
    with pytest.raises(ValueError, match="no router to bias"):
        choose([None], RoutingRequest(bias=1.0), has_router=False)


@pytest.mark.parametrize("bias", [float("nan"), float("inf"), float("-inf"), 10**400, 1.7e308, "0.5", [1], True, None])
def test_a_bias_is_a_finite_number(bias):
    with pytest.raises(ValueError, match="granularity_bias is .*expected a finite number"):
        choose([[0.0, 0.9, 1.7]], RoutingRequest(bias=bias))


@pytest.mark.parametrize("budget", ["5", 2.5, float("nan"), True, [24]])
def test_a_budget_is_a_whole_number(budget):
    with pytest.raises(ValueError, match="max_visual_tokens is .*expected 1 or more"):
        choose([[0.0, 0.9, 1.7]], RoutingRequest(max_visual_tokens=budget))


@pytest.mark.parametrize("granularity", [36.0, "36", True, [[36]], [None], np.array(36.0)])
def test_a_granularity_of_another_type_is_refused(granularity):
    with pytest.raises(ValueError, match="vis_token_granularity is .*choose from these"):
        choose([[0.0, 0.9, 1.7]], RoutingRequest(granularity))


def test_whole_numbers_of_numpy_are_whole_numbers():
    assert choose([[1.7, 0.9, 0.0]], RoutingRequest(np.int64(36), np.int32(500))) == choose([[1.7, 0.9, 0.0]], RoutingRequest(36))
    assert choose([[0.9, 0.1, 0.0]], RoutingRequest(bias=np.float32(9.0))) == [2]


def test_more_than_the_finest_is_the_finest_and_is_said(caplog):
    assert choose([[0.9, 0.1, 0.0]], RoutingRequest(576)) == [2]
    assert "vis_token_granularity is 576, more than this model has; its finest, 144, is used" in caplog.text
    with pytest.raises(ValueError, match="choose from these"):
        choose([[0.9, 0.1, 0.0]], RoutingRequest([36, 576]))
