"""Drawings of what the model looked at: the views of an image with the chosen token grid over them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from llava.crops import resize_and_pad_image, select_best_resolution
from llava.images import expand2square
from llava.model.granularity import Granularity
from llava.model.merge import MergedLayout, merged_layout
from llava.model.routing import RoutingReport

PANEL = 512
MARGIN = 24
CAPTION = 26
GRID_COLOUR = (255, 64, 64)
TILE_COLOUR = (255, 220, 0)
DROPPED_SHADE = (96, 96, 96)


def draw_granularity(images: Sequence[Image.Image], reports: Sequence[RoutingReport], config: Any) -> Image.Image:
    """Draw every image's whole view and tiles, with one red cell per visual token and a yellow line around each view.

    Args:
        images: RGB images. reports: one per image. config: the model's configuration.

    Returns:
        An RGB image: the whole view on the left, the joined tiles on the right, dropped padding in grey, the cost beneath.
    """
    rows = [_image_row(image, report, config) for image, report in zip(images, reports, strict=True)]
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet


def grid_of(image_size: tuple[int, int], granularity: int, config: Any) -> dict[str, Any]:
    """Where an image's visual tokens lie, as plain numbers that a page can draw without the model.

    Args:
        image_size: (width, height) of the image in pixels.
        granularity: tokens per view of the chosen level.
        config: the model's configuration.

    Returns:
        `{"views": [...]}`: the whole view, then the joined tiles where the model cuts them. Each has `canvas` (width, height) in pixels of
        the drawing, `picture` (left, top, right, bottom) of the image on it, `grid` (rows, columns) of cells over the canvas, `tiles`
        (down, across), `rows` and `columns` (start, stop) of the cells that are kept, and `newlines`, tokens that end a row.

    Raises:
        ValueError: a granularity that the model does not have.
    """
    level = next((level for level in config.levels if level.tokens == granularity), None)
    if level is None:
        known = [each.tokens for each in config.levels]
        raise ValueError(f"granularity is {granularity}, but this model has {known} tokens per view; choose from these.")
    views = [_whole_view_grid(image_size, level, config.image_aspect_ratio)]
    if config.image_aspect_ratio == "anyres":
        views.append(_tiles_grid(image_size, level, config))
    return {"views": views}


def _view_grid(
    canvas: tuple[int, int], picture: tuple[int, int, int, int], grid: tuple[int, int], layout: MergedLayout | None = None
) -> dict[str, Any]:
    cut = layout is not None and layout.tiles != (0, 0)
    return {
        "canvas": list(canvas),
        "picture": list(picture),
        "grid": list(grid),
        "tiles": list(layout.tiles) if layout is not None and cut else [1, 1],
        "rows": list(layout.rows) if layout is not None and cut else [0, grid[0]],
        "columns": list(layout.columns) if layout is not None and cut else [0, grid[1]],
        "newlines": layout.newlines if layout is not None else 0,
    }


def _whole_view_grid(image_size: tuple[int, int], level: Granularity, aspect_ratio: str) -> dict[str, Any]:
    """The whole view: with tiles, the image is squeezed into a square, so its cells lie evenly on the original image."""
    width, height = image_size
    if aspect_ratio == "anyres":
        return _view_grid((width, height), (0, 0, width, height), level.grid)
    side = max(image_size) if aspect_ratio == "pad" else min(image_size)
    left, top = (side - width) // 2, (side - height) // 2
    return _view_grid((side, side), (left, top, left + width, top + height), level.grid)


def _tiles_grid(image_size: tuple[int, int], level: Granularity, config: Any) -> dict[str, Any]:
    canvas = select_best_resolution(image_size, config.image_grid_pinpoints)
    side = config.view_side
    tiles = (canvas[1] // side, canvas[0] // side)
    layout = merged_layout(level, tiles[0] * tiles[1] + 1, tiles, image_size, config.mm_patch_merge_type, config.unpad_rule)
    scale = min(canvas[0] / image_size[0], canvas[1] / image_size[1])
    size = [min(math.ceil(length * scale), limit) for length, limit in zip(image_size, canvas, strict=True)]
    left, top = (canvas[0] - size[0]) // 2, (canvas[1] - size[1]) // 2
    grid = (tiles[0] * level.grid[0], tiles[1] * level.grid[1])
    return {**_view_grid(canvas, (left, top, left + size[0], top + size[1]), grid, layout), "tiles": list(tiles)}


def _image_row(image: Image.Image, report: RoutingReport, config: Any) -> Image.Image:
    level = next(level for level in config.levels if level.tokens == report.granularity)
    panels = [_whole_view(image, level, config)]
    titles = [f"whole view: {level.grid[0]} x {level.grid[1]} tokens"]
    if config.image_aspect_ratio == "anyres":
        panel, layout = _tiles(image, level, config)
        panels.append(panel)
        kept = (layout.rows[1] - layout.rows[0], layout.columns[1] - layout.columns[0])
        newlines = f" + {layout.newlines} newlines" if layout.newlines else ""
        titles.append(f"{layout.tiles[0] * layout.tiles[1]} tiles: {kept[0]} x {kept[1]} tokens{newlines}")
    height = max(panel.height for panel in panels)
    row = Image.new("RGB", (sum(panel.width for panel in panels) + MARGIN * (len(panels) + 1), height + 2 * CAPTION + 2 * MARGIN), "white")
    draw, font = ImageDraw.Draw(row), ImageFont.load_default(16)
    left = MARGIN
    for panel, title in zip(panels, titles, strict=True):
        draw.text((left, MARGIN // 2), title, fill="black", font=font)
        row.paste(panel, (left, MARGIN // 2 + CAPTION))
        left += panel.width + MARGIN
    saved = 100 * (1 - report.num_visual_tokens / report.full_visual_tokens)
    text = f"granularity {report.granularity}: {report.num_visual_tokens} visual tokens of {report.full_visual_tokens}, {saved:.0f} % saved"
    draw.text((MARGIN, height + MARGIN // 2 + CAPTION + 6), text, fill="black", font=font)
    return row


def _whole_view(image: Image.Image, level: Granularity, config: Any) -> Image.Image:
    if config.image_aspect_ratio == "pad":
        image = expand2square(image, (122, 116, 104))
    elif config.image_aspect_ratio != "anyres":
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    panel = image.resize((PANEL, PANEL), Image.Resampling.BICUBIC)
    _draw_grid(panel, level.grid, (1, 1))
    return panel


def _tiles(image: Image.Image, level: Granularity, config: Any) -> tuple[Image.Image, MergedLayout]:
    canvas = select_best_resolution(image.size, config.image_grid_pinpoints)
    side = config.view_side
    tiles = (canvas[1] // side, canvas[0] // side)
    layout = merged_layout(level, tiles[0] * tiles[1] + 1, tiles, image.size, config.mm_patch_merge_type, config.unpad_rule)
    padded = resize_and_pad_image(image, canvas)
    scale = PANEL / canvas[1]
    panel = padded.resize((max(1, round(canvas[0] * scale)), PANEL), Image.Resampling.BICUBIC)
    grid = (tiles[0] * level.grid[0], tiles[1] * level.grid[1])
    if layout.tiles == (0, 0):
        layout = MergedLayout(layout.base_tokens, tiles, (0, grid[0]), (0, grid[1]), 0)
    _draw_grid(panel, grid, tiles, layout.rows, layout.columns)
    return panel, layout


def _draw_grid(
    panel: Image.Image,
    grid: tuple[int, int],
    tiles: tuple[int, int],
    rows: tuple[int, int] | None = None,
    columns: tuple[int, int] | None = None,
) -> None:
    """Draw the kept cells of a (height, width) grid, grey out the others, and outline the (down, across) tiles."""
    rows, columns = rows or (0, grid[0]), columns or (0, grid[1])
    cell_height, cell_width = panel.height / grid[0], panel.width / grid[1]
    box = tuple(round(edge) for edge in (columns[0] * cell_width, rows[0] * cell_height, columns[1] * cell_width, rows[1] * cell_height))
    shade = Image.new("RGB", panel.size, DROPPED_SHADE)
    shade.paste(panel.crop(box), box[:2])  # type: ignore[arg-type]
    panel.paste(shade)
    draw = ImageDraw.Draw(panel)
    for row in range(rows[0], rows[1] + 1):
        draw.line((box[0], round(row * cell_height), box[2], round(row * cell_height)), fill=GRID_COLOUR)
    for column in range(columns[0], columns[1] + 1):
        draw.line((round(column * cell_width), box[1], round(column * cell_width), box[3]), fill=GRID_COLOUR)
    for down in range(tiles[0]):
        for across in range(tiles[1]):
            edges = (
                across * panel.width / tiles[1],
                down * panel.height / tiles[0],
                (across + 1) * panel.width / tiles[1] - 1,
                (down + 1) * panel.height / tiles[0] - 1,
            )
            draw.rectangle(tuple(round(edge) for edge in edges), outline=TILE_COLOUR, width=3)  # type: ignore[arg-type]
