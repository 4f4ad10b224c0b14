"""Image tokens repeated, counted, and read off again: small cases by hand."""

from __future__ import annotations

import pytest
import torch

from llava.model.native.image_tokens import expand, images_per_row, levels_of_runs


def rows(*texts: str) -> torch.Tensor:
    """(B, L) bool, true where a text has an i."""
    return torch.tensor([[letter == "i" for letter in text] for text in texts])


def test_each_image_token_is_repeated_and_rows_are_filled_up_on_the_left() -> None:
    expansion = expand(rows(".i..", "..i."), torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]]), [3, 1], "left")
    assert expansion.source.tolist() == [[0, 1, 1, 1, 2, 3], [-1, -1, -1, 1, 2, 3]]
    assert expansion.attention_mask.tolist() == [[1] * 6, [0, 0, 0, 1, 1, 1]]
    assert expansion.last[0].tolist() == [0, 3, 4, 5] and expansion.last[1, 1:].tolist() == [3, 4, 5]


def test_padding_that_every_row_has_is_left_out() -> None:
    expansion = expand(rows("...i", "...."), torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]]), [2], "left")
    assert expansion.source.tolist() == [[2, 3, 3], [1, 2, 3]]


def test_rows_are_filled_up_on_the_right_to_train() -> None:
    expansion = expand(rows("i.", ".."), torch.ones(2, 2, dtype=torch.long), [2], "right")
    assert expansion.source.tolist() == [[0, 0, 1], [0, 1, -1]]
    assert expansion.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert expansion.last.tolist() == [[1, 2], [0, 1]]


def test_ids_and_embeddings_follow_the_expansion() -> None:
    expansion = expand(rows(".i", ".."), torch.ones(2, 2, dtype=torch.long), [2], "left")
    assert expansion.take(torch.tensor([[5, 6], [7, 8]]), 0).tolist() == [[5, 6, 6], [0, 7, 8]]
    embeds = torch.arange(8.0).view(2, 2, 2)
    assert expansion.take(embeds, -1.0).tolist() == [[[0, 1], [2, 3], [2, 3]], [[-1, -1], [4, 5], [6, 7]]]


def test_the_images_of_a_row_are_counted_by_their_tokens() -> None:
    assert images_per_row(rows("iii.ii", "......", "i....."), [3, 2, 1]) == [2, 0, 1]


COSTS = [[2, 5], [2, 5], [3, 7]]
"""Of three images at two levels."""


@pytest.mark.parametrize(
    ("prompts", "levels"),
    [
        (("ii.iiiii", "iii....."), [0, 1, 0]),
        (("iiiiiiiiii", "..iii....."), [1, 1, 0]),  # of ten, two images side by side, since the second run has to be an image's too
        (("iiiiiiiiii", "iiiiiii..."), [1, 1, 1]),
    ],
)
def test_levels_are_read_off_the_lengths_of_runs(prompts: tuple[str, ...], levels: list[int]) -> None:
    assert levels_of_runs(rows(*prompts), COSTS) == levels


def test_images_side_by_side_at_one_level_are_told_from_mixed_ones() -> None:
    assert levels_of_runs(rows("iiiiii"), [[1, 3, 5], [1, 3, 5]]) == [1, 1]  # and not 1 + 5 or 5 + 1


def test_images_side_by_side_that_fit_in_two_ways_are_refused() -> None:
    with pytest.raises(ValueError, match=r"runs of \[7\] image tokens, which 2 images .* fill in more than one way"):
        levels_of_runs(rows("iiiiiii"), [[2, 5], [2, 5]])


def test_many_images_side_by_side_are_read_at_once() -> None:
    costs = [[24, 44, 88, 170, 336]] * 64
    assert levels_of_runs(torch.ones(1, 64 * 88, dtype=torch.bool), costs) == [2] * 64


@pytest.mark.parametrize("prompts", [("iiii.",), ("ii.ii",), ("ii.ii.iii.iii",), (".....",)])
def test_runs_that_no_choice_explains_are_refused(prompts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="Image features and image tokens do not match: the prompts have runs of"):
        levels_of_runs(rows(*prompts), COSTS)
