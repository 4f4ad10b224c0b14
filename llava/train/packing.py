"""Packs sequences of unequal length into few rows, so that little of a pass is spent on padding.

Positions restart at 0 with each sequence. Given such positions and no mask, transformers keeps the sequences of a row from attending to
each other, whatever the attention kernel ("packed sequences" in `transformers.masking_utils`). Where every row holds one sequence,
positions continue through the padding behind it: attention is causal, so no mask is needed at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava.constants import IGNORE_INDEX
from llava.model.splice import SplicedRow

PADDING_OWNER = -1
"""Owner of a padding position."""


@dataclass(frozen=True)
class PackedRows:
    """S sequences in R rows of L positions.

    Attributes:
        inputs_embeds: (R, L, D); padding is zeros.
        position_ids: (R, L), from 0 in every sequence; padding behind several sequences counts as another sequence.
        labels: (R, L), `IGNORE_INDEX` on padding and on the first position of every sequence, which no position predicts.
        owners: (R, L), number of the sequence, `PADDING_OWNER` on padding.
    """

    inputs_embeds: Tensor
    position_ids: Tensor
    labels: Tensor
    owners: Tensor

    @property
    def padding_share(self) -> float:
        """Share of the positions that are padding."""
        return float((self.owners == PADDING_OWNER).float().mean())


def fill_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Assign sequences to rows: longest first, each to the first row with enough space (first-fit decreasing).

    Args:
        lengths: of the sequences, none longer than `capacity`.
        capacity: positions of a row.

    Returns:
        For each row the numbers of its sequences.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        place = next((row for row, left in enumerate(room) if left >= lengths[index]), None)
        if place is None:
            rows.append([])
            room.append(capacity)
            place = len(rows) - 1
        rows[place].append(index)
        room[place] -= lengths[index]
    return rows


def pack(sequences: Sequence[SplicedRow], one_row: bool = False) -> PackedRows:
    """Pack sequences into rows as long as the longest of them.

    Args:
        sequences: at least one.
        one_row: all in a single row, as kernels for sequences of unequal length (flash attention) take them; a kernel with a mask
            would cost the square of the whole length.
    """
    lengths = [sequence.length for sequence in sequences]
    rows = [list(range(len(sequences)))] if one_row else fill_rows(lengths, max(lengths))
    width = max(sum(lengths[index] for index in row) for row in rows)
    device = sequences[0].labels.device
    flat = [index for row in rows for index in row]
    within = torch.cat([torch.arange(lengths[index], device=device) for index in flat])
    places = torch.cat(
        [torch.arange(sum(lengths[index] for index in row), device=device) + number * width for number, row in enumerate(rows)]
    )
    owner = torch.tensor(flat, device=device).repeat_interleave(torch.tensor([lengths[index] for index in flat], device=device))
    labels = torch.cat([sequences[index].labels for index in flat]).masked_fill(within == 0, IGNORE_INDEX)
    embeds = torch.cat([sequences[index].inputs_embeds for index in flat])
    size = len(rows) * width
    padded = embeds.new_zeros(size, embeds.shape[-1]).index_copy(0, places, embeds)
    return PackedRows(
        inputs_embeds=padded.view(len(rows), width, -1),
        position_ids=_padding_positions(rows, lengths, width, device).index_copy(0, places, within).view(len(rows), width),
        labels=labels.new_full((size,), IGNORE_INDEX).index_copy(0, places, labels).view(len(rows), width),
        owners=owner.new_full((size,), PADDING_OWNER).index_copy(0, places, owner).view(len(rows), width),
    )


def _padding_positions(rows: Sequence[Sequence[int]], lengths: Sequence[int], width: int, device: torch.device) -> Tensor:
    """Positions (R * L,) that restart at 0 where each row's padding starts, or continue; the others are overwritten."""
    if len(rows) == len(lengths):
        return torch.arange(width, device=device).repeat(len(rows))
    ends = torch.tensor([sum(lengths[index] for index in row) for row in rows], device=device)
    return (torch.arange(width, device=device) - ends[:, None]).clamp(min=0).flatten()
