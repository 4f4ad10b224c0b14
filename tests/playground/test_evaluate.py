"""The table's arithmetic on answers made up by hand, and logits of routers in batches."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from llava.eval.report.tasks import read_task
from llava.images import load_image
from llava.inference import MICRO_MODEL, Assistant, Options
from playground.evaluate import Record, Results, markdown, router_logits, summary, table
from playground.world import COARSE_FAMILIES, FAMILIES

EVALUATION = Path(__file__).parents[2] / "playground" / "eval"
LEVELS = [4, 64]
TOKENS = [24, 336]


def made_up() -> Results:
    """Two questions per family: coarse ones are right at both levels, fine ones at the fine level only."""
    records = []
    for family in FAMILIES:
        right = [True, True] if family in COARSE_FAMILIES else [False, True]
        records += [Record(len(records), "a.png", "?", "x", family, ["", ""], right, TOKENS) for _ in range(2)]
    return Results(records)


def ideal_logits(results: Results) -> np.ndarray:
    fine = ~np.isin(results.family, COARSE_FAMILIES)
    return np.stack([~fine, fine], axis=1).astype(float)


def test_fixed_levels_the_cheapest_right_and_the_line_between():
    results = made_up()
    assert [results.row(results.fixed(level))["accuracy"] for level in (0, 1)] == [60.0, 100.0]
    ideal = results.row(results.cheapest_right())
    assert ideal["accuracy"] == 100.0 and ideal["tokens"] == pytest.approx(0.6 * 24 + 0.4 * 336)
    assert results.interpolated(180) == pytest.approx(80.0)
    assert results.solving_levels("number") == [1] and results.solving_levels("arrow") == [0, 1]


def test_a_router_that_separates_is_told_from_one_that_does_not():
    results = made_up()
    good = summary(results, results.row(results.chosen(ideal_logits(results))))
    assert good["above interpolation"] == pytest.approx(100 - results.interpolated(148.8))
    assert (good["below best fixed"], good["coarse in two coarsest"], good["fine in solving levels"]) == (0.0, 100.0, 100.0)
    flat = summary(results, results.row(results.chosen(np.tile([1.0, 0.0], (len(results.family), 1)))))
    assert (flat["below best fixed"], flat["above interpolation"], flat["fine in solving levels"]) == (40.0, 0.0, 0.0)


def test_the_page_has_a_line_per_choice_and_seed():
    results = made_up()
    page = markdown(table(results, {"adaptive": [ideal_logits(results)] * 3}, LEVELS), LEVELS)
    assert page.count("| adaptive |") == 4 and "| fixed 64 | 336 | 0 % | 100.0 |" in page and "random at the tokens of adaptive" in page


def test_logits_of_a_batch_are_those_of_single_requests():
    """In the order of the questions, whatever the batches; a second router is asked with the first one's features."""
    micro = Assistant.load(str(MICRO_MODEL))
    other = copy.deepcopy(micro)
    with torch.no_grad():
        other.model.model.router.norm.bias.add_(torch.arange(5.0))
    task = read_task(EVALUATION / "test.jsonl")
    items = [*task.items[3:6], task.items[25], task.items[0]]
    found, shifted = router_logits([micro, other], items, task.folder, batch_size=2)
    for logits, item in zip(found, items, strict=True):
        report = micro.answer([load_image(task.folder / item.image)], item.text, Options(max_new_tokens=1)).reports[0]
        assert report.logits is not None and logits == pytest.approx(report.logits.numpy(), abs=1e-4)
    assert shifted == pytest.approx(found + np.arange(5), abs=1e-4)  # the last thing a router does is to add that bias


def test_logits_of_models_that_differ_elsewhere_are_not_compared():
    micro = Assistant.load(str(MICRO_MODEL))
    other = copy.deepcopy(micro)
    with torch.no_grad():
        other.model.lm_head.weight.add_(1.0)
    with pytest.raises(ValueError, match=r"Two models differ in lm_head.weight, not only in their routers"):
        router_logits([micro, other], [], Path("."))
