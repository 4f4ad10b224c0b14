"""Numbers that float32 cannot hold, wherever they stand in a body."""

from __future__ import annotations

import pytest
import torch

from llava.serve.api.body_models import SMALLEST_NUMBER, StrictModel, as_float32
from llava.serve.api.llava import WorkerRequest
from llava.serve.api.openai_chat import ChatRequest

SUBNORMAL = (5e-324, 1e-320, 1e-46, 1e-40, SMALLEST_NUMBER * 0.99)


class Inner(StrictModel):
    weight: float | None = None


class Outer(StrictModel):
    inner: Inner
    number: float = 1.0
    count: int = 1


def test_the_smallest_number_is_float32s():
    assert torch.finfo(torch.float32).tiny == SMALLEST_NUMBER
    assert [as_float32(sign * SMALLEST_NUMBER) for sign in (1, -1)] == [SMALLEST_NUMBER, -SMALLEST_NUMBER]
    assert [as_float32(sign * number) for sign in (1, -1) for number in SUBNORMAL] == [0.0] * 10


@pytest.mark.parametrize("number", SUBNORMAL)
def test_what_float32_would_lose_is_0_at_every_depth(number):
    read = Outer.model_validate({"inner": {"weight": -number}, "number": number, "count": 2})
    assert (read.inner.weight, read.number, read.count) == (0.0, 0.0, 2)


@pytest.mark.parametrize("schema", [ChatRequest, WorkerRequest])
def test_no_number_of_a_request_stays_below_it(schema):
    needed = {"model": "m", "messages": [{"role": "user", "content": "x"}], "prompt": "x"}
    body = {key: value for key, value in needed.items() if key in schema.model_fields}
    names = {name for name, field in schema.model_fields.items() if field.annotation in (float, float | None)}
    assert {"temperature", "top_p", "granularity_bias"} <= names
    for name in names - {"repetition_penalty"}:
        assert getattr(schema.model_validate({**body, name: 1e-320}), name) == 0.0
    if "repetition_penalty" in names:  # what it divides by is never near 0
        with pytest.raises(ValueError, match="repetition_penalty"):
            schema.model_validate({**body, "repetition_penalty": 1e-320})
