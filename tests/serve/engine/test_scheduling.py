"""Who joins the running batch, when, and with whom."""

from __future__ import annotations

from collections import deque
from typing import Any, cast

import pytest
import torch

from llava.model.splice import SplicedRow
from llava.serve.engine.scheduling import BatchingDelay, admit, of_similar_length
from llava.serve.engine.task import Encoded, PendingPrefill, Task


def task(unread: int, answer: int = 10, known: int = 0) -> Task:
    """A request that was encoded: `known` and `unread` positions of prompt, and of an answer at most."""
    nobody = cast(Any, None)
    made = Task(nobody, nobody, 0.0, nobody, nobody, 0)
    row = SplicedRow(torch.zeros(unread, 1), torch.zeros(unread))
    beginning = (torch.zeros(1, known, 1),) if known else ()
    made.was_encoded(Encoded(known + unread, answer, (), (), {}), PendingPrefill(row, beginning))
    return made


def test_a_request_waits_at_most_two_steps_for_others():
    delay = BatchingDelay()
    assert [delay.is_over(1, running=4, free=3) for _ in range(4)] == [False, False, True, False]


def test_nobody_waits_for_others_where_that_gains_nothing():
    delay = BatchingDelay()
    assert not delay.is_over(0, running=0, free=4)
    assert delay.is_over(1, running=0, free=4)  # nothing runs
    assert delay.is_over(2, running=2, free=4)  # as many as run
    assert delay.is_over(1, running=9, free=1)  # all that fit
    assert [delay.is_over(1, running=4, free=3) for _ in range(3)] == [False, False, True]  # and then the count begins anew


def test_as_many_join_as_fit_and_in_order():
    tasks = [task(20), task(50), task(10)]
    ready = deque(tasks)
    assert admit(ready, [], max_rows=2, max_positions=1000) == tasks[:2]
    assert list(ready) == tasks[2:]
    assert admit(ready, tasks[:2], max_rows=3, max_positions=179) == []  # three rows of the longest, 60
    assert admit(ready, tasks[:2], max_rows=3, max_positions=180) == tasks[2:]


def test_one_alone_may_be_longer_than_all_may_be_together():
    long = task(500)
    assert admit(deque([long]), [], 4, 100) == [long]
    assert admit(deque([long]), [task(1)], 4, 100) == []


def test_a_prefill_works_on_so_many_positions_at_most():
    tasks = [task(3000) for _ in range(4)]
    assert admit(deque(tasks), [], 8, 10**6) == tasks[:2]
    assert admit(deque(tasks), tasks, 8, 10**6) == tasks[:2]


def test_a_prefill_may_be_as_large_as_the_bound_and_no_larger():
    fits, over = [task(4096), task(4096), task(1)], [task(4097), task(4096)]
    assert admit(deque(fits), [], 8, 10**6) == fits[:2]  # two rows of 4096, padding included; a third makes three of them
    assert admit(deque(over), [], 8, 10**6) == over[:1]
    alone = [task(9000), task(1)]
    assert admit(deque(alone), [], 8, 10**6) == alone[:1]  # one may be longer, but by itself
    later = [task(1), task(4097)]
    assert admit(deque(later), [], 8, 10**6) == later[:1]  # the longest counts, wherever it stands
    known = [task(10, known=4096), task(10, known=4096), task(10, known=4096)]
    assert admit(deque(known), [], 8, 10**6) == known  # only what is still to be read


def test_the_longest_row_counts_whoever_it_is():
    waiting = task(10)
    assert admit(deque([waiting]), [task(50)], 4, 119) == []  # two rows of 60
    assert admit(deque([waiting]), [task(50)], 4, 120) == [waiting]
    assert admit(deque([waiting]), [task(50), task(10)], 4, 179) == []


@pytest.mark.parametrize(
    ("lengths", "groups"),
    [
        ([1, 39], [[1, 39]]),  # 2 rows of 39 are 78 positions: 40 of their own, 6 for the share, and 32
        ([1, 40], [[1], [40]]),  # 80 are more than 41 * 1.15 + 32
        ([100, 172], [[100, 172]]),
        ([100, 173], [[100], [173]]),
        ([100, 100, 141], [[100, 100, 141]]),  # 423 of 424.15
        ([100, 100, 142], [[100, 100], [142]]),  # 426 of 425.3
        ([100, 173, 200, 231], [[100], [173, 200, 231]]),  # a new group counts from its own first
        ([100, 400, 560], [[100], [400, 560]]),
        ([100, 400, 581], [[100], [400], [581]]),
    ],
)
def test_padding_stays_within_its_share(lengths, groups):
    found = of_similar_length([task(length) for length in lengths])
    assert [[each.pending.row.length for each in group] for group in found] == groups


def test_prompts_are_read_together_where_that_needs_little_padding():
    short, alike, long, known = task(100), task(110), task(900), task(100, known=50)
    assert of_similar_length([long, known, alike, short]) == [[short, alike], [long], [known]]
    also_known = task(105, known=70)
    assert of_similar_length([also_known, known, short]) == [[short], [known, also_known]]
    assert of_similar_length([]) == []
