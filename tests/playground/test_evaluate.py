"""The table's arithmetic on answers made up by hand."""

from __future__ import annotations

import numpy as np
import pytest

from playground.evaluate import Record, Results, markdown, summary, table
from playground.world import COARSE_FAMILIES, FAMILIES

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
