"""Views of one image, at one granularity, become one sequence of visual tokens.

The whole view comes first; the tiles are joined into one grid, what is only padding is cut off, and each kept row ends with a
newline vector. `MergedLayout` says how many tokens that makes without touching a tensor, and the merge follows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava.model.granularity import Granularity


@dataclass(frozen=True)
class MergedLayout:
    """What is kept of an image's joined tile grid.

    `rows` and `columns` are (start, stop) in pooled cells of the joined tiles; an image of one view has none.
    """

    base_tokens: int
    tiles: tuple[int, int]
    rows: tuple[int, int]
    columns: tuple[int, int]
    newlines: int

    @property
    def num_tokens(self) -> int:
        kept = (self.rows[1] - self.rows[0]) * (self.columns[1] - self.columns[0])
        return self.base_tokens + kept + self.newlines


def merged_layout(
    level: Granularity,
    num_views: int,
    tiles: tuple[int, int] | None,
    image_size: tuple[int, int],
    merge_type: str,
    unpad_rule: str,
) -> MergedLayout:
    """Decide what one image keeps at one granularity.

    Args:
        level: the granularity.
        num_views: views of the image, the whole view included.
        tiles: (down, across) tiles of its canvas; `None` for a single view.
        image_size: (width, height) of the image in pixels.
        merge_type: `flat` keeps every view as it is, `spatial` joins the tiles, `spatial_unpad` also cuts padding and adds newlines.
        unpad_rule: `picture` or `pooled_grid`; see `GranularityFields`.

    Raises:
        ValueError: tiles that do not make up the views.
    """
    if merge_type == "flat" or num_views == 1:
        newlines = 1 if merge_type == "spatial_unpad" else 0
        return MergedLayout(level.tokens * num_views, (0, 0), (0, 0), (0, 0), newlines)
    if tiles is None or tiles[0] * tiles[1] != num_views - 1:
        raise ValueError(
            f"The image has {num_views - 1} tiles, but its size {image_size} asks for {tiles} (down, across); give its true size."
        )
    height, width = level.grid[0] * tiles[0], level.grid[1] * tiles[1]
    rows, columns = (0, height), (0, width)
    if merge_type == "spatial":
        return MergedLayout(level.tokens, tiles, rows, columns, 0)
    if unpad_rule == "pooled_grid":
        rows, columns = _covered((height, width), image_size)
    else:
        kernel_rows, kernel_columns = level.kernel
        patch_rows, patch_columns = _covered((height * kernel_rows, width * kernel_columns), image_size)
        rows = (patch_rows[0] // kernel_rows, -(-patch_rows[1] // kernel_rows))
        columns = (patch_columns[0] // kernel_columns, -(-patch_columns[1] // kernel_columns))
    return MergedLayout(level.tokens, tiles, rows, columns, rows[1] - rows[0])


def _covered(grid: tuple[int, int], image_size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """(rows, columns) of a grid of square cells that a centred image covers; kept edges are truncated, as published."""
    (height, width), (image_width, image_height) = grid, image_size
    if image_width / image_height > width / height:
        kept = int(image_height * (width / image_width))
        padding = (height - kept) // 2
        return (padding, height - padding), (0, width)
    kept = int(image_width * (height / image_height))
    padding = (width - kept) // 2
    return (0, height), (padding, width - padding)


def unpad_image(tensor: Tensor, original_size: Sequence[int]) -> Tensor:
    """Cut the padding off a grid that a centred image was scaled to fit.

    Args:
        tensor: (D, H, W), square cells. original_size: (width, height) of the image.

    Returns:
        (D, H', W'), a view of `tensor`.
    """
    rows, columns = _covered((tensor.shape[1], tensor.shape[2]), (original_size[0], original_size[1]))
    return tensor[:, slice(*rows), slice(*columns)]


def merge_views(pooled: Tensor, level: Granularity, layout: MergedLayout, newline: Tensor) -> Tensor:
    """Lay one image's views out as a sequence.

    Args:
        pooled: (C, T, D) at `level`, the whole view first, then the tiles in reading order.
        layout: what to keep, from `merged_layout`.
        newline: (D,) the vector that ends a row.

    Returns:
        (`layout.num_tokens`, D).
    """
    width = pooled.shape[-1]
    if layout.tiles == (0, 0):
        flat = pooled.flatten(0, 1)
        return torch.cat([flat, newline[None].to(flat.dtype)]) if layout.newlines else flat
    (down, across), (h, w) = layout.tiles, level.grid
    joined = pooled[1:].reshape(down, across, h, w, width).transpose(1, 2).reshape(down * h, across * w, width)
    kept = joined[slice(*layout.rows), slice(*layout.columns)]
    if layout.newlines:
        kept = torch.cat([kept, newline.to(kept.dtype).expand(kept.shape[0], 1, width)], dim=1)
    return torch.cat([pooled[0], kept.flatten(0, 1)])
