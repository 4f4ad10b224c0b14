"""A batch that fails is done one by one, with the memory of the batch given back first."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence

import pytest

from llava.eval.one_by_one import attempt


class Tensors:
    """Something large that a piece of work holds."""


def test_what_fails_together_is_done_alone_and_failures_are_told_by_index() -> None:
    asked: list[list[int]] = []

    def work(items: Sequence[int]) -> list[int]:
        asked.append(list(items))
        if 3 in items:
            raise OSError("cut off")
        return [10 * item for item in items]

    outcomes, failures = attempt(work, [1, 3, 5])
    assert outcomes == [10, None, 50] and asked == [[1, 3, 5], [1], [3], [5]]
    assert {index: failure.reason for index, failure in failures.items()} == {1: "OSError: cut off"}
    assert "in work" in failures[1].details
    assert attempt(work, [1, 2]) == ([10, 20], {})
    assert attempt(work, []) == ([], {})


def test_the_failed_batchs_memory_is_free_when_its_items_are_tried_alone() -> None:
    held: list[weakref.ref[Tensors]] = []

    def work(items: Sequence[int]) -> Sequence[int]:
        assert all(reference() is None for reference in held)
        tensors = Tensors()
        held.append(weakref.ref(tensors))
        if len(items) > 1:
            raise MemoryError("out of memory")
        return items

    gc.disable()  # nothing but the last reference may free it
    try:
        assert attempt(work, [1, 2, 3]) == ([1, 2, 3], {})
        assert len(held) == 4
    finally:
        gc.enable()


def test_a_failure_keeps_nothing_alive() -> None:
    held: list[weakref.ref[Tensors]] = []

    def work(items: Sequence[int]) -> Sequence[int]:
        tensors = Tensors()
        held.append(weakref.ref(tensors))
        raise ValueError("no")

    _, failures = attempt(work, [1])
    assert failures[0].reason == "ValueError: no" and held[0]() is None


def test_a_run_that_is_stopped_stops() -> None:
    def work(items: Sequence[int]) -> Sequence[int]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt(work, [1, 2])
