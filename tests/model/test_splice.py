"""Where images stand in a row, and how rows become one batch: by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.model.splice import ContextLengthError, PromptRow, SplicedRow, images_of_rows, pad_rows, prompt_row, prompt_rows, splice_rows

HERE, X = IMAGE_TOKEN_INDEX, IGNORE_INDEX


def embed(ids: Tensor) -> Tensor:
    """(N, 2): the id, and its negative."""
    return torch.stack([ids, -ids], dim=-1).float()


def image(length: int, value: float) -> Tensor:
    return torch.full((length, 2), value)


def row(*ids: int) -> PromptRow:
    """A row whose labels are its ids."""
    return prompt_rows(torch.tensor([ids]), None, torch.tensor([ids]))[0]


def test_padding_on_either_side_is_taken_off():
    ids = torch.tensor([[0, 1, HERE], [3, 4, 0]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]])
    rows = prompt_rows(ids, mask, ids + 10)
    assert [each.ids.tolist() for each in rows] == [[1, HERE], [3, 4]]
    assert [each.labels.tolist() for each in rows] == [[11, HERE + 10], [13, 14]]
    assert [each.num_images for each in rows] == [1, 0] and rows[0].is_image.tolist() == [False, True]
    bare = prompt_rows(ids, None, None)
    assert [each.ids.tolist() for each in bare] == ids.tolist()
    assert [each.labels.tolist() for each in bare] == [[X] * 3] * 2


def test_an_image_may_be_marked_by_another_id_and_text_may_follow_a_row():
    [marked] = prompt_rows(torch.tensor([[1, 7, 2]]), None, None, image_token=7)
    assert marked.is_image.tolist() == [False, True, False] and marked.num_text_tokens == 2
    longer = prompt_row(torch.tensor([1, HERE])).followed_by(torch.tensor([5, 6]))
    assert (longer.ids.tolist(), longer.labels.tolist()) == ([1, HERE, 5, 6], [X] * 4)
    assert longer.is_image.tolist() == [False, True, False, False]


def test_images_go_to_rows_in_reading_order():
    rows = [row(HERE, 1, HERE), row(2), row(HERE)]
    assert images_of_rows(rows, 3) == [range(0, 2), range(2, 2), range(2, 3)]
    with pytest.raises(ValueError, match=r"hold 3 image placeholders \(\[2, 0, 1\] by row\), but 2 images were given"):
        images_of_rows(rows, 2)


def test_visual_tokens_take_their_placeholders_places():
    rows = [row(5, HERE, 6, HERE), row(7, 8)]
    first, second = splice_rows(rows, [image(2, 0.5), image(1, 0.25)], embed, 6)
    assert first.inputs_embeds.tolist() == [[5, -5], [0.5, 0.5], [0.5, 0.5], [6, -6], [0.25, 0.25]]
    assert first.labels.tolist() == [5, X, X, 6, X] and first.length == 5
    assert second.inputs_embeds.tolist() == [[7, -7], [8, -8]] and second.labels.tolist() == [7, 8]


def test_the_embeddings_give_the_dtype():
    [only] = splice_rows([row(5, HERE)], [image(2, 0.5).double()], embed, 3)
    assert only.inputs_embeds.dtype == torch.float32


def test_a_row_may_fill_the_context_and_no_more():
    rows = [row(1), row(5, HERE, 6)]
    assert splice_rows(rows, [image(4, 0.5)], embed, 6)[1].length == 6
    with pytest.raises(ContextLengthError, match=r"Row 1 has 6 tokens \(4 of them visual\), but the context of this model is 5"):
        splice_rows(rows, [image(4, 0.5)], embed, 5)
    with pytest.raises(ContextLengthError, match=r"Row 0 has 3 tokens \(0 of them visual\), but the context of this model is 2"):
        splice_rows([row(1, 2, 3), row(4)], [], embed, 2)


@pytest.mark.parametrize(
    ("side", "mask", "positions", "labels"),
    [
        ("left", [[0, 0, 1], [1, 1, 1]], [[0, 0, 0], [0, 1, 2]], [[X, X, 4], [1, 2, 3]]),
        ("right", [[1, 0, 0], [1, 1, 1]], [[0, 0, 0], [0, 1, 2]], [[4, X, X], [1, 2, 3]]),
    ],
)
def test_rows_are_padded_to_one_length(side, mask, positions, labels):
    rows = [SplicedRow(image(length, 1.0), torch.tensor(own)) for length, own in ((1, [4]), (3, [1, 2, 3]))]
    padded = pad_rows(rows, side)
    assert padded.attention_mask.dtype == torch.bool and padded.attention_mask.long().tolist() == mask
    assert padded.position_ids.tolist() == positions and padded.labels.tolist() == labels
    assert padded.inputs_embeds[..., 0].tolist() == mask
    whole = pad_rows(splice_rows([row(4), row(1, 2, 3)], [], embed, 3), side)  # the longer one fills the context
    assert whole.labels.tolist() == labels and whole.inputs_embeds[1].tolist() == [[1, -1], [2, -2], [3, -3]]


def test_everything_is_made_on_the_rows_device():
    padded = pad_rows([SplicedRow(torch.zeros(2, 2, device="meta"), torch.zeros(2, device="meta"))], "left")
    assert {tensor.device.type for tensor in vars(padded).values()} == {"meta"}
