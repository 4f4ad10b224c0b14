"""Orders in which rows are read: batches of similar length, and of one modality.

Rows of about equal length waste little padding, and batches that hold either only rows with images or only text keep the ranks of a
distributed run busy for about the same time. The orders equal those of LLaVA-1.5's trainer
(`haotian-liu/LLaVA:llava/train/llava_trainer.py`), seed for seed; this module knows lengths and nothing of data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


def split_evenly(indices: Sequence[int], lengths: Sequence[int], chunks: int) -> list[list[int]]:
    """Deal `indices` into `chunks` lists of about equal total length.

    Args:
        indices: row numbers, longest first.
        lengths: length of every row of the data set.
        chunks: number of lists; where it does not divide the number of rows they are dealt in turn.
    """
    if len(indices) % chunks:
        return [list(indices[start::chunks]) for start in range(chunks)]
    size = len(indices) // chunks
    dealt: list[list[int]] = [[] for _ in range(chunks)]
    totals: list[float] = [0.0] * chunks
    for index in indices:
        shortest = totals.index(min(totals))
        dealt[shortest].append(index)
        totals[shortest] = totals[shortest] + lengths[index] if len(dealt[shortest]) < size else float("inf")
    return dealt


def length_grouped_indices(
    lengths: Sequence[int], batch_size: int, world_size: int, generator: torch.Generator | None = None
) -> list[int]:
    """A random order in which each group of `batch_size * world_size` rows is sorted and dealt evenly to the ranks.

    Args:
        lengths: length of every row.
        batch_size: rows per batch of one rank.
        world_size: batches that are taken at the same time (ranks times accumulated steps).
        generator: source of randomness; torch's global one without it.
    """
    shuffled = torch.randperm(len(lengths), generator=generator).tolist()
    order: list[int] = []
    for group in _slices(shuffled, batch_size * world_size):
        longest_first = sorted(group, key=lambda index: lengths[index], reverse=True)
        for chunk in split_evenly(longest_first, lengths, world_size):
            order.extend(chunk)
    return order


def modality_length_grouped_indices(
    lengths: Sequence[int],
    batch_size: int,
    world_size: int,
    generator: torch.Generator | None = None,
    inner_generator: torch.Generator | None = None,
) -> list[int]:
    """A random order of groups that hold either only rows with images or only rows without.

    The last group of each kind, full or not, is set aside; their rows come last, sorted by index.

    Args:
        lengths: positive for a row with an image, negative for a text-only one, never 0.
        batch_size: rows per batch of one rank.
        world_size: batches that are taken at the same time.
        generator: shuffles the groups.
        inner_generator: shuffles the rows of each kind. The predecessor used the global generator here even when
            one was passed; `None` does the same.

    Raises:
        ValueError: a length is 0.
    """
    if 0 in lengths:
        raise ValueError(f"row {list(lengths).index(0)} has length 0; every row needs at least one word.")
    if all(length > 0 for length in lengths) or all(length < 0 for length in lengths):
        return length_grouped_indices(lengths, batch_size, world_size, generator)
    groups: list[list[int]] = []
    left_over: list[int] = []
    for with_images in (True, False):
        rows = [index for index, length in enumerate(lengths) if (length > 0) is with_images]
        inner = length_grouped_indices([abs(lengths[row]) for row in rows], batch_size, world_size, inner_generator)
        kind = _slices([rows[position] for position in inner], batch_size * world_size)
        groups += kind[:-1]
        left_over += kind[-1]
    shuffled = torch.randperm(len(groups), generator=generator).tolist()
    order = [index for group in shuffled for index in groups[group]]
    return order + sorted(left_over)


def _slices(items: Sequence[int], size: int) -> list[list[int]]:
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


class GroupedSampler(Sampler[int]):
    """Grouped order that depends on the seed and the epoch alone, so that a resumed run continues in the same order.

    Args:
        lengths: length of every row; signed by modality when `by_modality`.
        batch_size: rows per batch of one rank.
        world_size: batches that are taken at the same time (ranks times accumulated steps).
        seed: seed of the run.
        by_modality: keep rows with and without images apart.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, world_size: int, seed: int, by_modality: bool = True
    ) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.world_size = world_size
        self.seed = seed
        self.by_modality = by_modality
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of this epoch; called by the data loader."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        if self.by_modality:
            return iter(
                modality_length_grouped_indices(
                    self.lengths, self.batch_size, self.world_size, generator, inner_generator=generator
                )
            )
        return iter(length_grouped_indices(self.lengths, self.batch_size, self.world_size, generator))
