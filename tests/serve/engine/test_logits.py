"""Bias, penalties and ends that come too early: against transformers' own processors, OpenAI's formula, and rows alone."""

from __future__ import annotations

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from llava.serve.engine.logits import Row, adjusted
from llava.serve.protocol import Sampling

NOTHING = torch.empty(0, dtype=torch.long)
INF = float("inf")


def row(written=(), prompt=(), **fields) -> Row:
    return Row(Sampling(**fields), list(written), torch.tensor(list(prompt), dtype=torch.long))


def logits(rows: int = 1, size: int = 50, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))


def test_where_nothing_is_asked_nothing_is_done():
    model = logits(3)
    warm = {"temperature": 1.0, "top_k": 4, "min_p": 0.1, "top_p": 0.5, "logprobs": 1, "ignore_eos": True}
    plain = [row(), row([1, 2], [3], **warm), row([5], min_new_tokens=1)]
    assert adjusted(model, plain, [2]) is model


@pytest.mark.parametrize("penalty", [0.5, 1.3, 100.0, 0.01])
def test_repetition_is_that_of_transformers_over_prompt_and_answer(penalty):
    model = logits()
    prompt, written = [4, 9, 9, 17], [30, 4, 31, 31]
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + written]), model.clone())
    assert torch.equal(adjusted(model, [row(written, prompt, repetition_penalty=penalty)], []), expected)


def test_presence_and_frequency_count_the_answer_alone():
    """OpenAI's formula: mu - count * frequency - [count > 0] * presence."""
    model = torch.tensor([[1.0, -1.0, 0.5, 2.0]])
    found = adjusted(model, [row([1, 1, 3], [0, 0, 2], presence_penalty=0.5, frequency_penalty=-0.25)], [])
    assert torch.equal(found, torch.tensor([[1.0, -1.0 + 2 * 0.25 - 0.5, 0.5, 2.0 + 0.25 - 0.5]]))


def test_vllms_order_is_bias_then_repetition_then_the_counts():
    model = torch.tensor([[-1.0, 4.0]])
    asked = row([0], [1], logit_bias=((0, 3.0),), repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    assert adjusted(model, [asked], []).tolist() == [[(-1.0 + 3.0) / 2.0 - 0.5 - 0.25, 4.0 / 2.0]]


def test_bias_is_added_where_it_is_asked_for():
    model = logits(2)
    found = adjusted(model, [row(), row(logit_bias=((3, -100.0), (49, 7.5)))], [])
    expected = model.clone()
    expected[1, 3] -= 100
    expected[1, 49] += 7.5
    assert torch.equal(found, expected)


def test_ends_are_held_back_until_there_are_enough_tokens():
    model = torch.zeros(3, 6)
    rows = [row([5], min_new_tokens=2, stop_token_ids=(4,)), row([5, 5], min_new_tokens=2, stop_token_ids=(4,)), row(min_new_tokens=1)]
    assert adjusted(model, rows, [1, 2]).tolist() == [[0, -INF, -INF, 0, -INF, 0], [0] * 6, [0, -INF, -INF, 0, 0, 0]]


def test_an_end_is_taken_early_where_nothing_else_is_left():
    model = torch.full((1, 4), -INF)
    model[0, 2] = 1.0
    assert torch.equal(adjusted(model, [row(min_new_tokens=5)], [2]), model)


def test_a_batch_is_its_rows_and_the_models_logits_stay_as_they_are():
    model, before = logits(6, seed=1), logits(6, seed=1)
    rows = [
        row([1, 2, 3], [7], repetition_penalty=1.2),
        row(),
        row([1, 1], presence_penalty=2.0),
        row([8] * 40, [8], frequency_penalty=-2.0, logit_bias=((8, 1.0),)),
        row([9], min_new_tokens=3),
        row([], [5, 6], repetition_penalty=0.7, presence_penalty=1.0, min_new_tokens=1, stop_token_ids=(6,)),
    ]
    together = adjusted(model, rows, [2])
    assert torch.equal(model, before)
    for place, own in enumerate(rows):
        assert torch.equal(together[place], adjusted(model[place : place + 1], [own], [2])[0]), place
    assert torch.equal(together[1], before[1])
