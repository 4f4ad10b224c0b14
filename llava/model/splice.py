"""Visual tokens go where the prompt has a placeholder: ids and images become one batch of embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX


@dataclass(frozen=True)
class SplicedInputs:
    """What the language model reads. B rows padded to L positions.

    inputs_embeds: (B, L, D); padding is zeros.
    attention_mask: (B, L) bool.
    position_ids: (B, L), counted from each row's first real position; 0 on padding.
    labels: (B, L), `IGNORE_INDEX` on visual tokens and padding.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor


@dataclass(frozen=True)
class SplicedRow:
    """One row before padding: `inputs_embeds` (L', D) and `labels` (L',)."""

    inputs_embeds: Tensor
    labels: Tensor

    @property
    def length(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class PromptRow:
    """One row without its padding: `ids` (L,), `labels` (L,), and `is_image` (L,), true where an image goes.

    embeds: (L, D) in place of the embeddings of `ids`, where a prompt was given as such.
    """

    ids: Tensor
    labels: Tensor
    is_image: Tensor
    embeds: Tensor | None = None

    @property
    def num_images(self) -> int:
        return int(self.is_image.sum())

    @property
    def num_text_tokens(self) -> int:
        return len(self.ids) - self.num_images

    def followed_by(self, ids: Tensor) -> PromptRow:
        """The row with further ids (L',) behind it: text without labels."""
        labels = torch.full_like(ids, IGNORE_INDEX)
        is_image = torch.zeros_like(ids, dtype=torch.bool)
        return PromptRow(torch.cat([self.ids, ids]), torch.cat([self.labels, labels]), torch.cat([self.is_image, is_image]))


class ContextLengthError(ValueError):
    """A row that is longer than the language model's context."""


def prompt_row(ids: Tensor) -> PromptRow:
    """A prompt of ids (L,) without labels."""
    return prompt_rows(ids[None], None, None)[0]


def prompt_rows(
    input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None, image_token: int = IMAGE_TOKEN_INDEX
) -> list[PromptRow]:
    """Take the padding, left or right, off every row.

    Args:
        input_ids: (B, L). attention_mask: (B, L), true on real positions; `None`: all are. labels: (B, L) or `None`.
        image_token: the id that stands where an image goes, once per image.
    """
    labels = torch.full_like(input_ids, IGNORE_INDEX) if labels is None else labels
    kept = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    rows = [(ids[keep], own[keep]) for ids, own, keep in zip(input_ids, labels, kept, strict=True)]
    return [PromptRow(ids, own, ids == image_token) for ids, own in rows]


def images_of_rows(rows: Sequence[PromptRow], num_images: int) -> list[range]:
    """Which images belong to which row, in reading order.

    Raises:
        ValueError: as many placeholders as images are needed; both numbers are named.
    """
    counts = [row.num_images for row in rows]
    if sum(counts) != num_images:
        raise ValueError(
            f"The prompts hold {sum(counts)} image placeholders ({counts} by row), but {num_images} images were given; "
            "write one <image> per image."
        )
    starts = [sum(counts[:index]) for index in range(len(counts))]
    return [range(start, start + count) for start, count in zip(starts, counts, strict=True)]


def splice_rows(
    rows: Sequence[PromptRow], visual_tokens: Sequence[Tensor], embed: Callable[[Tensor], Tensor], max_length: int
) -> list[SplicedRow]:
    """Put each image's tokens in place of its placeholder, row by row.

    Args:
        rows: B rows from `prompt_rows`.
        visual_tokens: one (T, D) per placeholder, in reading order over the batch.
        embed: token ids (L,) -> (L, D).
        max_length: the language model's context; a longer row is refused, never cut.

    Raises:
        ValueError: images that do not match the placeholders.
        ContextLengthError: a row longer than the context.
    """
    owners = images_of_rows(rows, len(visual_tokens))
    text = [row.ids[~row.is_image] for row in rows]
    embedded = embed(torch.cat(text)).split([len(ids) for ids in text])
    built = [
        _splice_row(row, words, [visual_tokens[index] for index in owned]) for row, words, owned in zip(rows, embedded, owners, strict=True)
    ]
    check_context([row.num_text_tokens for row in rows], [row.length for row in built], max_length)
    return built


def check_context(num_text_tokens: Sequence[int], lengths: Sequence[int], max_length: int) -> None:
    """Refuse rows of these lengths, visual tokens included, where one is longer than the context.

    Raises:
        ContextLengthError: naming the longest row.
    """
    longest = max(lengths, default=0)
    if longest > max_length:
        row = list(lengths).index(longest)
        raise ContextLengthError(
            f"Row {row} has {longest} tokens ({longest - num_text_tokens[row]} of them visual), but the context of this model is "
            f"{max_length}; shorten the text or choose a coarser granularity."
        )


def pad_rows(rows: Sequence[SplicedRow], padding_side: str) -> SplicedInputs:
    """Pad rows to one length, on the `left` to generate, on the `right` to train."""
    pad: dict[str, Any] = {"batch_first": True, "padding_side": padding_side}
    device = rows[0].labels.device
    mask = pad_sequence([torch.ones(row.length, dtype=torch.bool, device=device) for row in rows], padding_value=False, **pad)
    return SplicedInputs(
        inputs_embeds=pad_sequence([row.inputs_embeds for row in rows], padding_value=0.0, **pad),
        attention_mask=mask,
        position_ids=(mask.long().cumsum(-1) - 1).clamp(min=0) * mask,
        labels=pad_sequence([row.labels for row in rows], padding_value=IGNORE_INDEX, **pad),
    )


def _splice_row(row: PromptRow, words: Tensor, images: Sequence[Tensor]) -> SplicedRow:
    """One row; `words` are the embeddings of its text, in order."""
    if not images:
        return SplicedRow(words, row.labels)
    repeats = torch.ones_like(row.ids)
    repeats[row.is_image] = torch.tensor([len(tokens) for tokens in images], device=row.ids.device)
    visual = row.is_image.repeat_interleave(repeats)
    embeds = words.new_empty(len(visual), words.shape[-1])
    embeds[~visual] = words
    embeds[visual] = torch.cat(list(images)).to(words.dtype)
    labels = torch.where(row.is_image, IGNORE_INDEX, row.labels).repeat_interleave(repeats)
    return SplicedRow(embeds, labels)
