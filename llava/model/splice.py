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
    """One row without its padding: `ids` (L,) with placeholders, `labels` (L,)."""

    ids: Tensor
    labels: Tensor

    @property
    def is_image(self) -> Tensor:
        """(L,) bool, true at placeholders."""
        return self.ids == IMAGE_TOKEN_INDEX

    @property
    def num_images(self) -> int:
        return int(self.is_image.sum())


def prompt_rows(input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None) -> list[PromptRow]:
    """Take the padding, left or right, off every row.

    Args:
        input_ids: (B, L). attention_mask: (B, L), true on real positions; `None`: all are. labels: (B, L) or `None`.
    """
    labels = torch.full_like(input_ids, IGNORE_INDEX) if labels is None else labels
    if attention_mask is None:
        return [PromptRow(ids, row_labels) for ids, row_labels in zip(input_ids, labels, strict=True)]
    keep = attention_mask.bool()
    return [PromptRow(ids[mask], row_labels[mask]) for ids, row_labels, mask in zip(input_ids, labels, keep, strict=True)]


def images_of_rows(rows: Sequence[PromptRow], num_images: int) -> list[range]:
    """Which images belong to which row, in reading order.

    Raises:
        ValueError: as many placeholders as images are needed; both numbers are named.
    """
    counts = [row.num_images for row in rows]
    if sum(counts) != num_images:
        raise ValueError(
            f"The prompts hold {sum(counts)} image placeholders ({counts} by row), but {num_images} images were given; "
            "write one <image> per picture."
        )
    starts = [sum(counts[:index]) for index in range(len(counts))]
    return [range(start, start + count) for start, count in zip(starts, counts, strict=True)]


def splice(
    rows: Sequence[PromptRow],
    visual_tokens: Sequence[Tensor],
    embed: Callable[[Tensor], Tensor],
    max_length: int,
    padding_side: str,
) -> SplicedInputs:
    """Put each image's tokens in place of its placeholder and pad the rows to one length.

    Args:
        rows: B rows from `prompt_rows`.
        visual_tokens: one (T, D) per placeholder, in reading order over the batch.
        embed: token ids (N,) -> (N, D).
        max_length: the language model's context; a longer row is refused, never cut.
        padding_side: `left` to generate, `right` to train.

    Raises:
        ValueError: images that do not match the placeholders, or a row longer than the context.
    """
    return pad_rows(splice_rows(rows, visual_tokens, embed, max_length), padding_side)


def splice_rows(
    rows: Sequence[PromptRow], visual_tokens: Sequence[Tensor], embed: Callable[[Tensor], Tensor], max_length: int
) -> list[SplicedRow]:
    """Put each image's tokens in place of its placeholder, row by row; arguments and errors as in `splice`."""
    owners = images_of_rows(rows, len(visual_tokens))
    text = [row.ids[~row.is_image] for row in rows]
    embedded = embed(torch.cat(text)).split([len(ids) for ids in text])
    built = [
        _splice_row(row, words, [visual_tokens[index] for index in owned]) for row, words, owned in zip(rows, embedded, owners, strict=True)
    ]
    lengths = [row.length for row in built]
    if max(lengths) > max_length:
        row_index = lengths.index(max(lengths))
        raise ValueError(
            f"Row {row_index} has {lengths[row_index]} tokens ({sum(len(visual_tokens[i]) for i in owners[row_index])} of them visual), "
            f"but the context of this model is {max_length}; shorten the text or choose a coarser granularity."
        )
    return built


def pad_rows(rows: Sequence[SplicedRow], padding_side: str) -> SplicedInputs:
    """Pad rows to one length, on the `left` or on the `right`."""
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
