"""Answers found by the template's marks are those that training gives labels."""

from __future__ import annotations

import pytest
import torch

from llava.constants import IGNORE_INDEX, MICRO_MODEL
from llava.conversation import conv_templates
from llava.model.answers import answer_marks, in_answers
from llava.tokenizer import load_tokenizer
from llava.train.targets import SPEAKERS, build_targets

TURNS = ["<image>\nWhich colour is it, red or blue?", "Red.", "And the circle?\n", "It is blue, not red", "Why?", "No.\nTwo lines"]


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return load_tokenizer(MICRO_MODEL)


@pytest.mark.parametrize("turns", [2, 4, 6])
@pytest.mark.parametrize("name", sorted(set(conv_templates) - {"plain", "v0_plain"}))
def test_marks_find_what_training_supervises(tokenizer: object, name: str, turns: int) -> None:
    template = conv_templates[name]
    row = [{"from": SPEAKERS[index % 2], "value": text} for index, text in enumerate(TURNS[:turns])]
    targets = build_targets(row, template, tokenizer)
    found = in_answers(torch.tensor(targets.input_ids), *answer_marks(tokenizer, template))
    assert found is not None and found.tolist() == [label != IGNORE_INDEX for label in targets.labels]


def test_an_open_answer_has_nothing_in_it_and_a_row_without_one_is_told_apart() -> None:
    assert in_answers(torch.tensor([5, 6, 7, 8]), [7, 8], [9]).tolist() == [False] * 4  # type: ignore[union-attr]
    assert in_answers(torch.tensor([5, 6, 7]), [7, 8], [9]) is None
    assert in_answers(torch.tensor([5, 6, 7]), [], []) is None
    assert in_answers(torch.tensor([7, 8, 1, 9, 2, 7, 8, 3]), [7, 8], [9]).tolist() == [0, 0, 1, 1, 0, 0, 0, 1]  # type: ignore[union-attr]


def test_captions_have_no_marks(tokenizer: object) -> None:
    assert answer_marks(tokenizer, conv_templates["plain"]) == ([], [])
