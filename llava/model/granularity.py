"""The visual granularity scaler (paper, section 3.1): one patch grid pooled to several, coarse to fine.

A grid travels as (height, width); nobody takes a square root of a token count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Granularity:
    """One level: `grid` (h, w) cells per view, each the mean of `kernel` (rows, columns) patches."""

    grid: tuple[int, int]
    kernel: tuple[int, int]

    @property
    def tokens(self) -> int:
        """Visual tokens per view."""
        return self.grid[0] * self.grid[1]


def halving_chain(patch_grid: tuple[int, int]) -> list[Granularity]:
    """Every level that halving reaches from `patch_grid`, fine to coarse: the width first, then the height, in turn.

    24 x 24 gives 576 (24x24), 288 (24x12), 144 (12x12), 72 (12x6), 36 (6x6), 18 (6x3), 9 (3x3): the published levels are the first five.
    """
    height, width = patch_grid
    chain = [Granularity((height, width), (1, 1))]
    halve_width = True
    while True:
        last = chain[-1]
        side = last.grid[1] if halve_width else last.grid[0]
        if side % 2:
            return chain
        rows, columns = last.kernel
        kernel = (rows, columns * 2) if halve_width else (rows * 2, columns)
        chain.append(Granularity((height // kernel[0], width // kernel[1]), kernel))
        halve_width = not halve_width


def granularity_levels(
    patch_grid: tuple[int, int], tokens: Sequence[int] | None, grids: Sequence[Sequence[int]] | None = None
) -> tuple[Granularity, ...]:
    """The levels of a model, coarse to fine.

    Args:
        patch_grid: (height, width) of one view's patches.
        tokens: tokens per view of each level, coarse to fine; `None` means the full grid alone.
        grids: (height, width) of each level, where halving is not meant.

    Raises:
        ValueError: a level that halving does not reach, a grid that does not divide the patch grid, or levels out of order.
    """
    if tokens is None:
        return (Granularity(patch_grid, (1, 1)),)
    if grids is None:
        reachable = {level.tokens: level for level in halving_chain(patch_grid)}
        unknown = [count for count in tokens if count not in reachable]
        if unknown:
            raise ValueError(
                f"vis_token_granularity has {unknown}, but halving a {patch_grid[0]}x{patch_grid[1]} grid gives "
                f"{sorted(reachable)}; choose from these or give vis_token_grids."
            )
        levels = tuple(reachable[count] for count in tokens)
    else:
        levels = tuple(_explicit_level(patch_grid, (grid[0], grid[1])) for grid in grids)
        if [level.tokens for level in levels] != list(tokens):
            raise ValueError(f"vis_token_grids {list(map(list, grids))} do not have the token counts {list(tokens)}; make them agree.")
    counts = [level.tokens for level in levels]
    if counts != sorted(set(counts)):
        raise ValueError(f"Granularities are {counts}, expected distinct counts from coarse to fine.")
    return levels


def _explicit_level(patch_grid: tuple[int, int], grid: tuple[int, int]) -> Granularity:
    if patch_grid[0] % grid[0] or patch_grid[1] % grid[1]:
        raise ValueError(f"A {grid[0]}x{grid[1]} grid does not divide the {patch_grid[0]}x{patch_grid[1]} patch grid; choose divisors.")
    return Granularity(grid, (patch_grid[0] // grid[0], patch_grid[1] // grid[1]))


def pool(features: Tensor, patch_grid: tuple[int, int], level: Granularity) -> Tensor:
    """Average the patches of each view down to one level.

    Args:
        features: (C, P, D) with P = height * width of `patch_grid`, row by row.

    Returns:
        (C, T, D) with T = `level.tokens`, row by row.
    """
    if level.kernel == (1, 1):
        return features
    views, _, width = features.shape
    (h, w), (rows, columns) = level.grid, level.kernel
    return features.reshape(views, h, rows, w, columns, width).mean(dim=(2, 4)).reshape(views, h * w, width)


def pool_all(features: Tensor, patch_grid: tuple[int, int], levels: Sequence[Granularity]) -> list[Tensor]:
    """`pool` at every level: (C, T_g, D) each, in the order of `levels`."""
    return [pool(features, patch_grid, level) for level in levels]
