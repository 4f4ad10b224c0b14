"""Rows hold every sequence once, positions restart, and sequences do not see each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llava.model.splice import SplicedRow
from llava.train.packing import PADDING_OWNER, fill_rows, pack


def test_dealing_by_hand() -> None:
    assert fill_rows([3, 5, 2, 5, 1], 5) == [[1], [3], [0, 2], [4]]
    assert fill_rows([4], 4) == [[0]]


def sequence(length: int, start: int) -> SplicedRow:
    return SplicedRow(torch.full((length, 2), float(start)), torch.arange(start, start + length))


def test_rows_by_hand() -> None:
    packed = pack([sequence(2, 10), sequence(4, 20), sequence(1, 30)])
    assert packed.owners.tolist() == [[1, 1, 1, 1], [0, 0, 2, PADDING_OWNER]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 0, 0]]
    assert packed.labels.tolist() == [[-100, 21, 22, 23], [-100, 11, -100, -100]]
    assert packed.inputs_embeds[1, :, 0].tolist() == [10, 10, 30, 0]
    assert packed.padding_share == 1 / 8


def test_single_sequences_need_no_mask() -> None:
    packed = pack([sequence(3, 10), sequence(4, 20)])
    assert packed.owners.tolist() == [[1, 1, 1, 1], [0, 0, 0, PADDING_OWNER]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]


def test_one_row_has_no_padding() -> None:
    packed = pack([sequence(2, 10), sequence(4, 20)], one_row=True)
    assert packed.owners.tolist() == [[0, 0, 1, 1, 1, 1]] and packed.padding_share == 0


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("one_row", [False, True])
def test_packed_sequences_do_not_see_each_other(kernel: str, one_row: bool, tiny_model: Any) -> None:
    tiny_model.set_attn_implementation(kernel)
    torch.manual_seed(0)
    width = tiny_model.config.hidden_size
    sequences = [SplicedRow(torch.randn(n, width), torch.zeros(n, dtype=torch.long)) for n in (7, 3, 9, 1, 5)]
    packed = pack(sequences, one_row)
    with torch.no_grad():
        together = tiny_model.model(
            inputs_embeds=packed.inputs_embeds, attention_mask=None, position_ids=packed.position_ids, use_cache=False
        )[0]
        for number, alone in enumerate(sequences):
            expected = tiny_model.model(inputs_embeds=alone.inputs_embeds[None], use_cache=False)[0][0]
            torch.testing.assert_close(together[packed.owners == number], expected, atol=2e-5, rtol=0)
