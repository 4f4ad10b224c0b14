"""Rows of keys and values come and go, and what stays is untouched."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from llava.serve.slots import SlotCache

HEADS, WIDTH, LAYERS = 2, 3, 2


def prefilled(*rows: tuple[float, int]) -> DynamicCache:
    """A cache whose rows hold one value each, over so many positions, padded on the right with -1."""
    longest = max(length for _, length in rows)
    keys = torch.full((len(rows), HEADS, longest, WIDTH), -1.0)
    for row, (value, length) in enumerate(rows):
        keys[row, :, :length] = value
    cache = DynamicCache()
    for layer in range(LAYERS):
        cache.update(keys + 100 * layer, -keys - 100 * layer, layer)
    return cache


def step(slots: SlotCache, *values: float) -> list[tuple[torch.Tensor, torch.Tensor]]:
    slots.begin_step(torch.float32, torch.device("cpu"))
    new = torch.tensor(values, dtype=torch.float32)[:, None, None, None].expand(-1, HEADS, 1, WIDTH)
    read = [slots.update(new + 100 * layer, -new - 100 * layer, layer) for layer in range(LAYERS)]
    slots.end_step()
    return read


def row_values(slots: SlotCache, row: int, layer: int = 1) -> list[float]:
    keys, values = slots._keys[layer], slots._values[layer]
    assert torch.equal(keys[: slots.rows], -values[: slots.rows])
    return (keys[row, 0, : slots.lengths[row], 0] - 100 * layer).tolist()


def test_rows_join_grow_and_leave():
    slots = SlotCache(max_rows=4, max_positions=4096)
    slots.join(prefilled((1, 2), (2, 3)), [2, 3], rows=2, positions=8)
    step(slots, 10, 20)
    assert row_values(slots, 0) == [1, 1, 10]
    assert row_values(slots, 1) == [2, 2, 2, 20]
    slots.join(prefilled((3, 70)), [70], rows=3, positions=100)  # the storage grows
    step(slots, 11, 21, 31)
    assert row_values(slots, 0) == [1, 1, 10, 11]
    assert slots.leave(0) == 2  # the last row takes its place
    assert slots.lengths == [71, 5]
    assert row_values(slots, 0) == [3] * 70 + [31]
    assert slots.leave(1) == 1
    step(slots, 32)
    assert row_values(slots, 0)[-2:] == [31, 32]
    assert slots.leave(0) == 0
    assert slots.rows == 0


def test_a_step_sees_each_rows_own_positions_and_nothing_behind():
    slots = SlotCache(2, 4096)
    slots.join(prefilled((1, 2), (2, 4)), [2, 4], rows=2, positions=8)
    places, mask = slots.begin_step(torch.float32, torch.device("cpu"))
    assert places.tolist() == [[2], [4]]
    assert mask.shape == (2, 1, 1, 5)
    assert (mask[0, 0, 0] == 0).tolist() == [True, True, True, False, False]
    assert (mask[1, 0, 0] == 0).all()
    keys, values = slots.update(torch.ones(2, HEADS, 1, WIDTH), torch.ones(2, HEADS, 1, WIDTH), 0)
    assert keys.shape == values.shape == (2, HEADS, 5, WIDTH)
    slots.lengths = [2, 4]  # the step failed: nothing of it counts
    assert slots.get_seq_length() == 4


@pytest.mark.parametrize(
    ("rows", "positions", "capacity"),
    [(1, 10, (8, 64)), (3, 100, (8, 128)), (1, 900, (1, 960)), (2, 900, (2, 960))],
)
def test_the_storage_takes_as_many_rows_as_the_budget_allows(rows, positions, capacity):
    slots = SlotCache(max_rows=8, max_positions=1024)
    slots.join(prefilled((1, 5)), [5], rows, positions)
    assert slots.capacity == capacity


def test_the_storage_is_replaced_when_it_is_empty_and_too_narrow():
    slots = SlotCache(8, 1024)
    slots.join(prefilled((1, 5)), [5], 1, 900)
    slots.leave(0)
    slots.join(prefilled((2, 5), (3, 5)), [5, 5], 2, 64)
    assert slots.capacity == (8, 128) or slots.capacity == (8, 64)
    assert row_values(slots, 1) == [3] * 5
    slots.clear()
    assert slots.capacity == (0, 0)
