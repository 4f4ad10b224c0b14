"""What the processes of a run know of each other's failures, over a store in memory."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
from avg_llava_lmms_eval import processes
from avg_llava_lmms_eval.asking import Failed
from avg_llava_lmms_eval.processes import Tally
from torch.distributed import HashStore


@pytest.fixture
def store(monkeypatch):
    made = HashStore()
    monkeypatch.setattr(processes, "_get_default_store", lambda: made)
    return made


def test_the_counts_are_those_of_all_processes_also_of_one_that_asked_nothing(store):
    first, second, third = (Tally("run", rank, 3) for rank in range(3))
    first.note("generate_until", Failed(5, 0))
    second.note("generate_until", Failed(4, 2, ["one", "two"]))
    second.note("loglikelihood", Failed(3, 1, ["three"]))
    assert third.whole() == first.whole() == {"generate_until": Failed(9, 2, ["one", "two"]), "loglikelihood": Failed(3, 1, ["three"])}
    assert third.failing() == [1] and Tally("another run", 0, 3).whole() == {}


def test_a_process_ends_when_the_failing_ones_have_spoken(store, monkeypatch):
    first, second = (Tally("run", rank, 2) for rank in range(2))
    order = []

    def ends():
        first.said([1])
        order.append("first ends")

    thread = threading.Thread(target=ends)
    thread.start()
    order.append("second speaks")
    second.said([1])
    thread.join(10)
    assert order == ["second speaks", "first ends"]
    monkeypatch.setattr(processes, "OTHERS_SPEAK", timedelta(milliseconds=50))
    Tally("gone", 0, 2).said([1])  # nobody speaks: it ends all the same


def test_one_process_needs_no_store():
    alone = Tally("run", 0, 1)
    alone.note("generate_until", Failed(2, 1, ["x"]))
    assert alone.failing() == [0] and alone.whole()["generate_until"].failed == 1
    alone.said([0])
