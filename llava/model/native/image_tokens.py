"""Image tokens in prompts: one for an image whose granularity is open, as many as it has visual tokens once it is decided.

Pure index work on (B, L) masks; neither pixels nor embeddings. Legend: B rows, L given positions, L' expanded ones, N images.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class Expansion:
    """Where every position of the expanded rows comes from.

    source: (B, L') the position in the given rows, -1 on new padding. attention_mask: (B, L').
    last: (B, L) where each given position ends up; an image token's is its last visual token, and given padding's means nothing.
    """

    source: Tensor
    attention_mask: Tensor
    last: Tensor

    def take(self, given: Tensor, fill: float) -> Tensor:
        """(B, L, ...) ids or embeddings -> (B, L', ...), `fill` on new padding."""
        trailing = (1,) * (given.ndim - 2)
        index = self.source.clamp(min=0).view(*self.source.shape, *trailing).expand(*self.source.shape, *given.shape[2:])
        return given.gather(1, index).masked_fill((self.source < 0).view(*self.source.shape, *trailing), fill)


def expand(is_image: Tensor, attention_mask: Tensor, lengths: Sequence[int], padding_side: str) -> Expansion:
    """Repeat the token of image i `lengths[i]` times, and pad anew.

    Args:
        is_image: (B, L) bool, true at image tokens, one per image. attention_mask: (B, L); what it hides is left out.
        lengths: N visual tokens. padding_side: where shorter rows are filled up, `left` or `right`.
    """
    repeats = attention_mask.long()
    repeats[is_image] = torch.tensor(list(lengths), device=is_image.device)
    positions = torch.arange(is_image.shape[1], device=is_image.device)
    rows = [positions.repeat_interleave(row) for row in repeats]
    source = pad_sequence(rows, batch_first=True, padding_value=-1, padding_side=padding_side)
    in_front = (source < 0).sum(-1, keepdim=True) if padding_side == "left" else 0
    return Expansion(source, (source >= 0).long(), (repeats.cumsum(-1) - 1 + in_front).clamp(min=0))


def images_per_row(is_image: Tensor, lengths: Sequence[int]) -> list[int]:
    """How many of N images each row has, when every image has as many tokens as `lengths` says."""
    counts, image = [], 0
    for tokens in is_image.sum(-1).tolist():
        first = image
        while tokens > 0:
            tokens -= lengths[image]
            image += 1
        counts.append(image - first)
    return counts


def images_behind(before: Sequence[int], behind: Sequence[int]) -> list[int]:
    """Which of a batch's images, in reading order, stand behind the first `before` ones of their rows.

    Args:
        before, behind: images of each row in front of a point of it, and behind.
    """
    starts = itertools.accumulate((first + rest for first, rest in zip(before, behind, strict=True)), initial=0)
    return [start + first + image for start, first, rest in zip(starts, before, behind, strict=False) for image in range(rest)]


def levels_of_runs(is_image: Tensor, costs: Sequence[Sequence[int]]) -> list[int]:
    """Read each image's level off the length of its run of image tokens.

    Images that stand side by side share a run. Where several choices of levels fill the runs, the one with all images at one level counts.

    Args:
        is_image: (B, L) bool. costs: visual tokens of each of the N images at each level, coarse to fine.

    Raises:
        ValueError: runs that no choice of levels explains, or that several do.
    """
    runs = [run for row in is_image for run in _runs(row)]
    found = _explanations(tuple(runs), tuple(map(tuple, costs)))
    if len(found) > 1:
        found = [levels for levels in found if len(set(levels)) == 1] or found
    if len(found) == 1:
        return found[0]
    shown = [list(image) for image in costs]
    if not found:
        raise ValueError(
            f"Image features and image tokens do not match: the prompts have runs of {runs} image tokens, and the {len(costs)} images take "
            f"{shown} visual tokens at the model's levels; write one image token per image, or those of a level."
        )
    raise ValueError(
        f"The prompts have runs of {runs} image tokens, which {len(costs)} images that take {shown} visual tokens fill in more than one "
        "way; write one image token per image, or something between the images."
    )


def _runs(row: Tensor) -> list[int]:
    values, counts = torch.unique_consecutive(row, return_counts=True)
    return [int(count) for is_run, count in zip(values, counts, strict=True) if is_run]


def _explanations(runs: tuple[int, ...], costs: tuple[tuple[int, ...], ...]) -> list[list[int]]:
    """The choices of levels with which the images fill the runs: all with one level for all images, and else up to two."""

    @functools.cache
    def fill(run: int, image: int, left: int) -> tuple[tuple[int, ...], ...]:
        """Up to two choices for the images from `image` on, `left` tokens of run `run` still to be filled."""
        if left == 0:
            if run + 1 == len(runs):
                return ((),) if image == len(costs) else ()
            return fill(run + 1, image, runs[run + 1])
        if image == len(costs):
            return ()
        fitting = ((level, cost) for level, cost in enumerate(costs[image]) if cost <= left)
        choices = ((level, *rest) for level, cost in fitting for rest in fill(run, image + 1, left - cost))
        return tuple(itertools.islice(choices, 2))

    if not runs:
        return [[]] if not costs else []
    found = [list(levels) for levels in fill(0, 0, runs[0])]
    if len(found) > 1:
        alike = [[level] * len(costs) for level in range(min(map(len, costs)))]
        found += [levels for levels in alike if levels not in found and _fills(runs, costs, levels)]
    return found


def _fills(runs: Sequence[int], costs: Sequence[Sequence[int]], levels: Sequence[int]) -> bool:
    """Whether images at given levels fill the runs one after the other."""
    ends = set(itertools.accumulate(cost[level] for cost, level in zip(costs, levels, strict=True)))
    return set(itertools.accumulate(runs)) <= ends and sum(runs) == max(ends)
