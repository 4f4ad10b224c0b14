"""Who joins the running batch, when, and with whom."""

from __future__ import annotations

from collections import deque
from typing import Any, cast

import torch

from llava.model.splice import SplicedRow
from llava.serve.admission import Company, admit, of_similar_length
from llava.serve.task import Encoded, Task, Unread


def task(unread: int, answer: int = 10, known: int = 0) -> Task:
    """A request that was encoded: `known` and `unread` positions of prompt, and of an answer at most."""
    nobody = cast(Any, None)
    made = Task(nobody, nobody, 0.0, nobody, nobody, 0)
    row = SplicedRow(torch.zeros(unread, 1), torch.zeros(unread))
    beginning = (torch.zeros(1, known, 1),) if known else ()
    made.was_encoded(Encoded(known + unread, answer, (), (), {}), Unread(row, beginning))
    return made


def test_a_request_waits_two_steps_for_company():
    company = Company()
    assert [company.enough(1, running=4, free=3) for _ in range(4)] == [False, False, True, False]


def test_nobody_waits_for_company_where_that_gains_nothing():
    company = Company()
    assert not company.enough(0, running=0, free=4)
    assert company.enough(1, running=0, free=4)  # nothing runs
    assert company.enough(2, running=2, free=4)  # as many as run
    assert company.enough(1, running=9, free=1)  # all that fit
    assert not company.enough(1, running=4, free=3)  # and then the count begins anew


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


def test_prompts_are_read_together_where_that_needs_little_padding():
    short, alike, long, known = task(100), task(110), task(900), task(100, known=50)
    assert of_similar_length([long, known, alike, short]) == [[short, alike], [long], [known]]
    assert of_similar_length([]) == []
