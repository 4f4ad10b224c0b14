"""Pooling a patch grid to coarser ones."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from llava.model.granularity import Granularity, granularity_levels, halving_chain, pool, pool_all


@pytest.mark.parametrize(("key", "side"), [("pool", 12), ("pool_real", 24)])
def test_equals_the_recorded_pooling(oracle, key, side):
    recorded = load_file(oracle / "vision_and_pooling.safetensors")
    chain = {level.tokens: level for level in halving_chain((side, side))}
    outputs = {int(name.split("/")[1]): value for name, value in recorded.items() if name.startswith(f"{key}_out/")}
    assert len(outputs) == 5
    for tokens, expected in outputs.items():
        torch.testing.assert_close(pool(recorded[f"{key}_in"], (side, side), chain[tokens]), expected, atol=3e-5, rtol=0)


def test_a_grid_by_hand():
    features = torch.arange(8.0).reshape(1, 8, 1)  # 2 rows of 4
    level = granularity_levels((2, 4), [2], [[1, 2]])[0]
    assert level == Granularity((1, 2), (2, 2))
    assert pool(features, (2, 4), level).flatten().tolist() == [(0 + 1 + 4 + 5) / 4, (2 + 3 + 6 + 7) / 4]


def test_all_levels_are_pooled_in_their_order_each_with_its_grid():
    features = torch.arange(8.0).reshape(1, 8, 1)  # 2 rows of 4
    levels = granularity_levels((2, 4), [1, 2, 8], [[1, 1], [1, 2], [2, 4]])
    assert [pooled.flatten().tolist() for pooled in pool_all(features, (2, 4), levels)] == [[3.5], [2.5, 4.5], [*map(float, range(8))]]


def test_the_chain_halves_the_width_first_until_a_side_is_odd():
    assert [level.grid for level in halving_chain((24, 24))] == [(24, 24), (24, 12), (12, 12), (12, 6), (6, 6), (6, 3), (3, 3)]
    assert [level.grid for level in halving_chain((8, 8))][-1] == (1, 1)
    assert [level.kernel for level in halving_chain((8, 8))][:5] == [(1, 1), (1, 2), (2, 2), (2, 4), (4, 4)]


@pytest.mark.parametrize(
    ("tokens", "grids", "message"),
    [
        ([50], None, r"has \[50\], but halving a 12x12 grid gives"),
        ([24], [[5, 5]], "5x5 grid does not divide the 12x12"),
        ([10], [[3, 3]], "do not have the token counts"),
        ([144, 36], None, "expected distinct counts from coarse to fine"),
    ],
)
def test_refuses(tokens, grids, message):
    with pytest.raises(ValueError, match=message):
        granularity_levels((12, 12), tokens, grids)


def test_without_levels_the_full_grid_is_the_only_one():
    assert granularity_levels((2, 4), None) == (Granularity((2, 4), (1, 1)),)
    with pytest.raises(ValueError, match="A 2x3 grid does not divide the 2x4 patch grid; choose divisors"):
        granularity_levels((2, 4), [6], [[2, 3]])
