"""What a request remembers on its way, and the milliseconds that its callers are told."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.splice import SplicedRow, prompt_row
from llava.serve.engine.task import Encoded, PendingPrefill, Prepared, Task
from llava.serve.protocol import GenerationRequest
from llava.text_stream import TextStream

NOBODY = cast(Any, None)
PREPARED = Prepared(prompt_row(torch.arange(3)), (), ())


def task(submitted: float = 10.0) -> Task:
    return Task(GenerationRequest("name"), NOBODY, submitted, TextStream(NOBODY, ()), NOBODY, 0)


def encoded(length: int = 7, answer: int = 5) -> Encoded:
    return Encoded(length, answer, (), (), {"vision": 30.0, "router": 2.0, "splice": 1.0})


def unread(rows: int = 7, known: int = 0) -> PendingPrefill:
    return PendingPrefill(SplicedRow(torch.zeros(rows, 2), torch.zeros(rows)), (torch.zeros(2, known, 3),) * 2 if known else ())


def test_each_stage_leaves_what_the_next_one_takes():
    made = task()
    assert made.name == "name" and made.slot == -1 and not made.begun
    made.was_prepared(PREPARED)
    assert made.prepared is PREPARED
    left = unread()
    made.was_encoded(encoded(), left)
    assert made.pending is left and made.encoded == encoded()
    with pytest.raises(AssertionError, match="not between preparation and encoding"):
        _ = made.prepared  # its views are let go of
    made.was_prefilled(10.5, 0.1)
    with pytest.raises(AssertionError, match="not between encoding and prefill"):
        _ = made.pending
    assert made.begun and made.encoded == encoded()


def test_the_prompts_text_is_remembered_without_its_images():
    made, ids = task(), torch.tensor([5, IMAGE_TOKEN_INDEX, 6, IMAGE_TOKEN_INDEX])
    made.was_prepared(Prepared(prompt_row(ids), (), ()))
    made.was_encoded(encoded(), unread())
    assert made.text_ids.tolist() == [5, 6]  # penalties for what was said before count them


def test_nothing_is_there_before_its_stage():
    for part, sentence in (("prepared", "preparation"), ("encoded", "was not encoded yet"), ("pending", "prefill")):
        with pytest.raises(AssertionError, match=sentence):
            getattr(task(), part)


def test_positions_are_counted_with_the_answer():
    made = task()
    made.was_encoded(encoded(length=7, answer=5), unread(4, known=3))
    assert made.encoded.positions == 12
    assert (made.pending.prefix_length, unread(7).prefix_length) == (3, 0)
    made.stream.ids += [1, 2]
    assert made.length == 9


def test_the_milliseconds_up_to_the_first_token():
    made = task(submitted=10.0)
    made.milliseconds["views"] = 17.0
    made.was_encoded(encoded(), unread())
    made.was_prefilled(at=10.25, took=0.05)  # 250 ms in all: 17 + 30 + 2 + 1 + 50 were work
    assert made.milliseconds == {
        "queue": pytest.approx(150),
        "views": 17.0,
        "vision": 30.0,
        "router": 2.0,
        "splice": 1.0,
        "prefill": pytest.approx(50),
        "ttft": pytest.approx(250),
    }
    assert made.all_milliseconds(11.0) == {**made.milliseconds, "decode": pytest.approx(750), "total": pytest.approx(1000)}
    assert made.all_milliseconds(12.5)["total"] == pytest.approx(2500)


def test_one_that_is_read_again_keeps_what_was_told_of_its_first_token():
    made = task(submitted=10.0)
    made.was_encoded(encoded(), unread())
    made.was_prefilled(10.25, 0.05)
    told = dict(made.milliseconds)
    made.was_prepared(PREPARED)
    made.was_encoded(made.encoded, unread(9))
    assert made.pending.row.length == 9
    made.was_prefilled(12.0, 0.5)
    assert made.milliseconds == told
    assert made.all_milliseconds(13.0)["decode"] == pytest.approx(2750)
