"""Rows of keys and values come and go, and what stays is untouched."""

from __future__ import annotations

import pytest
import torch

from llava.serve.engine.slots import SlotCache

HEADS, WIDTH, LAYERS = 2, 3, 2
LIKE = torch.zeros(1)


def write(slots: SlotCache, first: int, known: list[int], *rows: list[float]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A pass that writes these values into rows from `first` on; what a row lacks is padding of -1."""
    new = max(len(row) for row in rows)
    slots.begin(first, known, new, LIKE)
    padded = torch.tensor([row + [-1.0] * (new - len(row)) for row in rows])
    states = padded[:, None, :, None].expand(-1, HEADS, -1, WIDTH)
    read = [slots.update(states + 100 * layer, -states - 100 * layer, layer) for layer in range(LAYERS)]
    slots.end([before + len(row) for before, row in zip(known, rows, strict=True)])
    return read


def values_of(slots: SlotCache, row: int, layer: int = 1) -> list[float]:
    length = slots.lengths[row]
    keys, values = slots._keys[layer][row, 0, :length, 0], slots._values[layer][row, 0, :length, 0]
    assert torch.equal(keys, -values)
    return (keys - 100 * layer).tolist()


def test_rows_join_grow_and_leave():
    slots = SlotCache(max_rows=4, max_positions=4096)
    slots.reserve(2, 8)
    write(slots, 0, [0, 0], [1.0, 2.0], [3.0, 4.0, 5.0])
    write(slots, 0, slots.lengths, [10.0], [20.0])
    assert values_of(slots, 0) == [1, 2, 10]
    assert values_of(slots, 1) == [3, 4, 5, 20]
    slots.reserve(3, 100)  # the storage grows
    write(slots, 2, [0], [7.0] * 70)
    write(slots, 0, slots.lengths, [11.0], [21.0], [31.0])
    assert values_of(slots, 0) == [1, 2, 10, 11]
    assert slots.leave(0) == 2  # the last row takes its place
    assert slots.lengths == [71, 5]
    assert values_of(slots, 0) == [7] * 70 + [31]
    assert values_of(slots, 1) == [3, 4, 5, 20, 21]
    assert slots.leave(1) == 1
    assert slots.leave(0) == 0
    assert slots.rows == 0


def test_a_step_sees_each_rows_own_positions_and_nothing_behind():
    slots = SlotCache(2, 4096)
    slots.reserve(2, 8)
    write(slots, 0, [0, 0], [1.0] * 2, [2.0] * 4)
    positions, mask = slots.begin(0, slots.lengths, 1, LIKE)
    assert positions.tolist() == [[2], [4]]
    assert mask is not None and mask.shape == (2, 1, 1, 5)
    assert (mask[0, 0, 0] == 0).tolist() == [True, True, True, False, False]
    assert (mask[1, 0, 0] == 0).all()
    keys, values = slots.update(torch.ones(2, HEADS, 1, WIDTH), torch.ones(2, HEADS, 1, WIDTH), 0)
    assert keys.shape == values.shape == (2, HEADS, 5, WIDTH)


def test_plain_prompts_need_no_mask():
    slots = SlotCache(2, 4096)
    slots.reserve(2, 8)
    positions, mask = slots.begin(0, [0, 0], 3, LIKE)
    assert mask is None
    assert positions.tolist() == [[0, 1, 2]] * 2
    [(keys, _), _] = write(slots, 0, [0, 0], [1.0], [2.0, 3.0, 4.0])
    assert keys.shape == (2, HEADS, 3, WIDTH)


def test_rows_of_one_length_take_a_step_without_a_mask():
    """And what transformers asks for, to build a mask of its own where its attention needs one, is of this pass, whatever else runs."""
    slots = SlotCache(4, 4096)
    slots.reserve(4, 12)
    write(slots, 0, [0, 0, 0], [1.0, 2.0], [3.0, 4.0], [5.0] * 9)
    positions, mask = slots.begin(0, [2, 2], 1, LIKE)
    assert mask is None
    assert positions.tolist() == [[2], [2]]
    assert (slots.get_query_offset(), slots.get_mask_sizes(1, 0)) == (2, (3, 0))
    [(keys, values), _] = write(slots, 0, [2, 2], [10.0], [20.0])
    assert keys.shape == values.shape == (2, HEADS, 3, WIDTH)
    assert [values_of(slots, row) for row in range(3)] == [[1, 2, 10], [3, 4, 20], [5] * 9]
    assert slots.begin(0, [3, 3], 2, LIKE)[1] is not None  # several positions behind others are not plain causal attention
    assert slots.begin(0, slots.lengths, 1, LIKE)[1] is not None
    assert slots.begin(3, [0], 4, LIKE)[1] is None
    assert (slots.get_query_offset(), slots.get_mask_sizes(4, 0)) == (0, (4, 0))


def test_a_row_may_begin_with_what_was_read_before():
    slots = SlotCache(4, 4096)
    slots.reserve(1, 8)
    write(slots, 0, [0], [1.0, 2.0, 3.0, 4.0])
    known = tuple(tensor.clone() for tensor in slots.prefix(0, 3))
    assert [tensor.shape for tensor in known] == [(HEADS, 3, WIDTH)] * 2 * LAYERS
    slots.reserve(3, 8)
    slots.load_prefix(1, known)
    positions, mask = slots.begin(1, [3, 0], 2, LIKE)
    assert positions.tolist() == [[3, 4], [0, 1]]
    assert mask is not None
    visible = (mask[:, 0] == 0).tolist()
    assert visible[0] == [[True] * 4 + [False], [True] * 5]
    assert visible[1] == [[True] + [False] * 4, [True] * 2 + [False] * 3]
    write(slots, 1, [3, 0], [8.0], [9.0, 9.0])
    assert values_of(slots, 0) == [1, 2, 3, 4]
    assert values_of(slots, 1) == [1, 2, 3, 8]
    assert values_of(slots, 2) == [9, 9]


def test_a_pass_that_failed_leaves_nothing_behind():
    slots = SlotCache(4, 4096)
    slots.reserve(2, 8)
    write(slots, 0, [0], [1.0, 2.0])
    slots.begin(1, [0], 2, LIKE)
    slots.update(torch.ones(1, HEADS, 2, WIDTH), torch.ones(1, HEADS, 2, WIDTH), 0)  # and no further
    assert (slots.rows, slots.lengths) == (1, [2])
    write(slots, 0, slots.lengths, [3.0])
    assert values_of(slots, 0) == [1, 2, 3]


@pytest.mark.parametrize(
    ("rows", "positions", "capacity"),
    [(1, 10, (8, 64)), (3, 100, (8, 128)), (1, 900, (1, 960)), (2, 900, (2, 960))],
)
def test_the_storage_takes_as_many_rows_as_the_budget_allows(rows, positions, capacity):
    slots = SlotCache(max_rows=8, max_positions=1024)
    slots.reserve(rows, positions)
    assert slots.capacity == capacity
    write(slots, 0, [0], [1.0])
    assert slots._keys[0].shape == (capacity[0], HEADS, capacity[1], WIDTH)


def test_the_storage_takes_another_shape_when_it_has_to():
    slots = SlotCache(8, 1024)
    slots.reserve(1, 900)
    write(slots, 0, [0], [5.0] * 5)
    slots.reserve(2, 64)
    assert slots.capacity == (8, 64)
    assert values_of(slots, 0) == [5] * 5
    slots.clear()
    assert (slots.capacity, slots.rows) == ((0, 0), 0)


def test_a_row_is_wiped_where_it_is_asked_for():
    """A number that is not finite must not reach the next row in the same place: a mask only adds to it."""
    slots = SlotCache(4, 4096)
    slots.reserve(3, 8)
    nan = float("nan")
    write(slots, 0, [0, 0, 0], [nan] * 4, [1.0, 2.0], [nan] * 6)
    slots.leave(0, wipe=True)  # the last row, itself full of nan, takes its place
    slots.leave(0, wipe=True)
    assert values_of(slots, 0) == [1, 2]
    assert all(stored.isfinite().all() for stored in (*slots._keys, *slots._values))
    slots.begin(1, [0], 2, LIKE)
    slots.update(torch.full((1, HEADS, 2, WIDTH), nan), torch.full((1, HEADS, 2, WIDTH), nan), 0)
    slots.wipe_unused()
    assert slots._keys[0].isfinite().all()


def test_what_was_read_before_can_be_recalled_into_an_empty_storage():
    slots = SlotCache(4, 4096)
    slots.reserve(1, 8)
    write(slots, 0, [0], [1.0, 2.0, 3.0])
    known = tuple(tensor.clone() for tensor in slots.prefix(0, 2))
    slots.clear()
    slots.reserve(2, 8)
    slots.load_prefix(0, known)
    write(slots, 0, [2], [9.0])
    assert values_of(slots, 0) == [1, 2, 9]


def test_a_part_of_the_rows_can_take_a_step():
    slots = SlotCache(4, 4096)
    slots.reserve(3, 8)
    write(slots, 0, [0, 0, 0], [1.0], [2.0], [3.0])
    write(slots, 1, [1], [20.0])
    assert slots.lengths == [1, 2, 1]
    assert [values_of(slots, row) for row in range(3)] == [[1], [2, 20], [3]]


def test_the_storage_shrinks_to_the_rows_in_use_and_grows_again():
    slots = SlotCache(max_rows=8, max_positions=4096)
    slots.reserve(3, 8)
    write(slots, 0, [0, 0, 0], [1.0, 2.0], [3.0], [4.0])
    slots.leave(0)
    assert slots.capacity[0] == 8
    assert slots.shrink() and not slots.shrink()
    assert slots.capacity == (2, 64) and {len(stored) for stored in (*slots._keys, *slots._values)} == {2}
    assert [values_of(slots, row) for row in range(2)] == [[4], [3]]
    slots.reserve(3, 8)
    write(slots, 2, [0], [5.0, 6.0])
    assert [values_of(slots, row) for row in range(3)] == [[4], [3], [5, 6]]


def test_storage_of_which_only_some_layers_could_be_made_smaller_still_works(monkeypatch):
    slots = SlotCache(max_rows=4, max_positions=4096)
    slots.reserve(2, 8)
    write(slots, 0, [0, 0], [1.0, 2.0], [3.0])
    slots.leave(1)
    original, copies = torch.Tensor.clone, [0]

    def short(tensor: torch.Tensor) -> torch.Tensor:
        copies[0] += 1
        if copies[0] > 1:
            raise MemoryError
        return original(tensor)

    monkeypatch.setattr(torch.Tensor, "clone", short)
    with pytest.raises(MemoryError):
        slots.shrink()
    monkeypatch.undo()
    assert [len(stored) for stored in slots._keys] == [1, 4]
    write(slots, 0, slots.lengths, [9.0])
    slots.reserve(2, 8)
    write(slots, 1, [0], [5.0])
    assert [values_of(slots, row) for row in range(2)] == [[1, 2, 9], [5]]


def test_an_empty_storage_holds_nothing():
    slots = SlotCache(4, 4096)
    assert (slots.rows, slots.capacity, slots.get_seq_length()) == (0, (0, 0), 0)


def test_what_fits_is_not_moved():
    slots = SlotCache(2, 4096)
    slots.reserve(2, 64)
    write(slots, 0, [0, 0], [1.0], [2.0])
    stored = slots._keys[0]
    for rows, positions in ((2, 1), (1, 64), (2, 64)):
        slots.reserve(rows, positions)
        assert slots._keys[0] is stored
    slots.reserve(2, 65)
    assert slots._keys[0] is not stored and slots.capacity == (2, 128)


@pytest.mark.parametrize(("more_rows", "rows"), [(None, 8), (3, 3), (1, 2), (100, 8)])
def test_the_storage_grows_by_no_more_rows_than_are_allowed(more_rows, rows):
    slots = SlotCache(8, 4096)
    slots.reserve(2, 8, more_rows)
    assert slots.capacity == (rows, 64)


def test_rows_are_wiped_with_zeros_and_only_where_it_is_asked_for():
    slots = SlotCache(4, 4096)
    slots.reserve(4, 8)
    write(slots, 0, [0] * 4, [1.0], [2.0], [3.0] * 3, [4.0, 5.0])
    slots.leave(0)
    assert slots._keys[0][3, 0, :3, 0].tolist() == [4, 5, -1]  # nobody reads it any more
    slots.leave(1, wipe=True)
    assert [values_of(slots, row) for row in range(2)] == [[4, 5], [3] * 3]
    for stored in (*slots._keys, *slots._values):
        assert not stored[1, :, 3:].any() and not stored[2].any()
    slots.wipe_unused()
    assert not any(stored[2:].any() for stored in (*slots._keys, *slots._values))
    slots.leave(1, wipe=True)
    assert not any(stored[1:].any() for stored in (*slots._keys, *slots._values))


def test_positions_and_masks_are_made_where_and_as_the_model_computes():
    slots = SlotCache(4, 4096)
    slots.reserve(2, 8)
    positions, mask = slots.begin(0, [0, 3], 2, torch.zeros(1, dtype=torch.bfloat16, device="meta"))
    assert mask is not None and positions.device.type == mask.device.type == "meta" and mask.dtype == torch.bfloat16
    _, mask = slots.begin(0, [0, 3], 2, torch.zeros(1, dtype=torch.float64))
    assert mask is not None and mask.min() == torch.finfo(torch.float64).min


def test_layers_may_lie_on_several_devices():
    slots = SlotCache(2, 4096)
    slots.reserve(2, 8)
    slots.begin(0, [0, 3], 1, LIKE)
    for layer, device in enumerate(("cpu", "meta", "meta")):
        states = torch.ones(2, HEADS, 1, WIDTH, device=device)
        keys, values = slots.update(states, states, layer)
        assert keys.device.type == values.device.type == device and keys.shape == (2, HEADS, 4, WIDTH)
    assert slots._keys[0][:, 0, :4, 0].tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]
