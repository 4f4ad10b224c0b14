"""Visual tokens as vLLM reads them: what arrives is what was sent, and broken rows do not leave."""

from __future__ import annotations

import base64
import math
from io import BytesIO

import pytest
import torch

from llava.model.image_embeds import check_rows, image_embeds_part


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_arrive_as_they_were_sent(dtype: torch.dtype) -> None:
    rows = torch.randn(5, 8).to(dtype)
    part = image_embeds_part(rows)
    assert part["type"] == "image_embeds"
    arrived = torch.load(BytesIO(base64.b64decode(part["image_embeds"])), weights_only=True)  # as vLLM's media loader does
    assert arrived.dtype == dtype and torch.equal(arrived, rows)


def test_a_slice_travels_without_what_it_was_cut_from() -> None:
    batch = torch.randn(1000, 8)
    assert len(base64.b64decode(image_embeds_part(batch[:2])["image_embeds"])) < 4_000 < batch.nbytes


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        (torch.zeros(4, 8), r"\(4, 8\)"),
        (torch.zeros(5, 9), r"\(5, 9\)"),
        (torch.zeros(1, 5, 8), r"\(1, 5, 8\)"),
        (torch.zeros(5, 8, dtype=torch.float16), "float16"),
    ],
)
def test_rows_of_another_form_are_refused(rows: torch.Tensor, found: str) -> None:
    with pytest.raises(ValueError, match=found):
        check_rows(rows, 5, 8, torch.float32)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(bad: float) -> None:
    rows = torch.zeros(5, 8)
    check_rows(rows, 5, 8, torch.float32)
    rows[3, 7] = bad
    with pytest.raises(FloatingPointError):
        check_rows(rows, 5, 8, torch.float32)
