"""From a PIL image to the views that the vision tower sees: geometry and pixels, no model.

Sizes are `(width, height)` everywhere, as in PIL. A *view* is one square of the tower's input size `S`. With any
resolution ("anyres", LLaVA-NeXT) an image gives `C = 1 + tiles` views: the whole image squeezed into one square,
then the tiles of a canvas that suits its shape, row by row. Canvases ("pinpoints") are multiples of `S` on both sides.

Pixels come from Pillow's resizing, in an order of its two passes that no version of Pillow decides, and transformers'
Pillow image processor. Its torchvision twin resizes differently, by up to 0.015 after normalisation, so
`load_image_processor` never takes that one, whether torchvision is installed or not.
"""

from __future__ import annotations

import ast
import math
import os
from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from llava.images import expand2square
from llava.rules import shown

Size: TypeAlias = "tuple[int, int]"
"""(width, height) in pixels."""

IMAGE_MODES = ("none", "square", "pad", "anyres")
"""How an image becomes views; "none" and "square" are the same: shortest edge resized, centre cropped."""

_MAX_PAD_SIDE = 4096  # a longer image is shrunk before it is put on a square, whose area grows with the side squared


class ImageProcessor(Protocol):
    """What this module needs of a transformers image processor."""

    size: Any
    crop_size: Any
    image_mean: Any
    resample: Any
    do_resize: Any

    def preprocess(self, images: Any, **kwargs: Any) -> Any:
        """Resize, crop, rescale and normalise a list of images; gives a mapping with `pixel_values`.

        Keywords replace its settings of the same name: `do_resize`, `do_center_crop`, `do_rescale`, `do_normalize`.
        """


def load_image_processor(path: str | os.PathLike[str], **kwargs: Any) -> CLIPImageProcessorPil:
    """Load a CLIP image processor of the Pillow kind from a folder or hub id with `preprocessor_config.json`."""
    return CLIPImageProcessorPil.from_pretrained(path, **kwargs)


# --- geometry -----------------------------------------------------------------------------------------------------


def parse_pinpoints(grid_pinpoints: str | Sequence[Sequence[int]]) -> list[Size]:
    """Return the canvases as a list of (width, height).

    Args:
        grid_pinpoints: pairs of positive integers, or that list written as a string, as LLaVA's configs hold it.

    Raises:
        ValueError: anything else.
    """
    pairs: Any = grid_pinpoints
    if isinstance(grid_pinpoints, str):
        try:
            pairs = ast.literal_eval(grid_pinpoints.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            pairs = None
    is_list = isinstance(pairs, (list, tuple)) and len(pairs) > 0
    if not is_list or not all(_is_size(pair) for pair in pairs):
        raise ValueError(
            f"image grid pinpoints are {shown(grid_pinpoints)}, expected a list of (width, height) pairs of positive "
            "integers such as [[336, 672], [672, 336]]"
        )
    return [(pair[0], pair[1]) for pair in pairs]


def _is_size(pair: Any) -> bool:
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        return False
    return all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in pair)


def select_best_resolution(original_size: Sequence[int], possible_resolutions: Sequence[Sequence[int]]) -> Size:
    """Choose the canvas that keeps most of an image's own pixels and, among equals, wastes least of itself.

    A 640 x 480 image keeps all its 307,200 pixels on a 672 x 672 canvas, where it fills 672 x 504, and only 150,528
    on a 672 x 336 one, where it fills 448 x 336. The first of several equal canvases wins (LLaVA-NeXT's rule).

    Args:
        original_size: (width, height) of the image, at least 1 x 1.
        possible_resolutions: canvases, (width, height) each.

    Returns:
        The chosen canvas (width, height).

    Raises:
        ValueError: an empty image or no canvases.
    """
    width, height = original_size
    if width < 1 or height < 1:
        raise ValueError(f"the image is {width} x {height} pixels, expected at least 1 x 1")
    if not possible_resolutions:
        raise ValueError("there is no canvas to choose from: image_grid_pinpoints must hold at least one pair")

    def merit(canvas: Size) -> tuple[int, int]:
        scale = min(canvas[0] / width, canvas[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - canvas[0] * canvas[1]  # the second number is minus the wasted area

    return max(((canvas[0], canvas[1]) for canvas in possible_resolutions), key=merit)


def get_anyres_image_grid_shape(
    image_size: Sequence[int], grid_pinpoints: str | Sequence[Sequence[int]], patch_size: int
) -> tuple[int, int]:
    """Return how many tiles across and down an image of `image_size` is cut into.

    Args:
        image_size: (width, height) of the image.
        grid_pinpoints: canvases, see `parse_pinpoints`.
        patch_size: side of a tile in pixels, which is the tower's input size `S` (the name is LLaVA's).
    """
    width, height = select_best_resolution(image_size, parse_pinpoints(grid_pinpoints))
    return width // patch_size, height // patch_size


# --- pixels -------------------------------------------------------------------------------------------------------


def resize(image: Image.Image, size: Size, resample: int = Image.Resampling.BICUBIC) -> Image.Image:
    """Scale an RGB image to (width, height) `size`, to the same pixels with every version of Pillow.

    Pillow scales columns and rows one after the other and rounds to 8 bits in between, so that the order shows, by 14 of
    255 levels in small noisy images. Version 13 has rows come first where they shrink by more than twice what the columns
    do; earlier ones always have columns first. Here it is version 13's order.
    """
    width, height = size
    rows_first = image.height - height > max(0, 2 * (image.width - width))
    between = (image.width, height) if rows_first else (width, image.height)
    half = image if between == image.size else image.resize(between, resample)
    return half.resize(size, resample)


def resize_and_pad_image(image: Image.Image, target_resolution: Size) -> Image.Image:
    """Scale an image to fit a canvas, keeping its shape, and centre it there on black."""
    canvas_width, canvas_height = target_resolution
    scale_x, scale_y = canvas_width / image.width, canvas_height / image.height
    if scale_x < scale_y:
        size = canvas_width, min(math.ceil(image.height * scale_x), canvas_height)
    else:
        size = min(math.ceil(image.width * scale_y), canvas_width), canvas_height
    canvas = Image.new("RGB", target_resolution, (0, 0, 0))
    canvas.paste(resize(image, size), ((canvas_width - size[0]) // 2, (canvas_height - size[1]) // 2))
    return canvas


def divide_to_patches(image: Image.Image, patch_size: int) -> list[Image.Image]:
    """Cut a canvas into square tiles of side `patch_size`, row by row.

    Raises:
        ValueError: the canvas is not a whole number of tiles on both sides.
    """
    if image.width % patch_size or image.height % patch_size:
        raise ValueError(
            f"a canvas of {image.width} x {image.height} pixels is not a whole number of {patch_size}-pixel tiles: "
            "use image_grid_pinpoints that are multiples of the vision tower's input size"
        )
    corners = [(x, y) for y in range(0, image.height, patch_size) for x in range(0, image.width, patch_size)]
    return [image.crop((x, y, x + patch_size, y + patch_size)) for x, y in corners]


def view_size(processor: ImageProcessor) -> int:
    """Return the side `S` of a view in pixels.

    Raises:
        ValueError: the processor crops to something that is not a square.
    """
    crop = processor.crop_size
    height, width = (crop, crop) if isinstance(crop, int) else (crop["height"], crop["width"])
    if height != width:
        raise ValueError(f"the image processor crops to {width} x {height} pixels, expected a square")
    return int(height)


def pixel_table(processor: ImageProcessor) -> torch.Tensor:
    """What an image processor's rescaling and normalisation make of every pixel: (3, 256) values by channel and pixel.

    A table of them is a tenth of the work of computing each, and gives the same bits.
    """
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, axis=2))
    return processor.preprocess([ramp], do_resize=False, do_center_crop=False, return_tensors="pt")["pixel_values"][0, :, 0]


def pixel_values(views: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Views as the vision tower reads them.

    Args:
        views: (..., 3, S, S) pixels in uint8; what is of another type has its values already and is returned as it is.
        table: from `pixel_table`, on the same device.
    """
    if views.dtype != torch.uint8:
        return views
    channels = [values.take(pixels.long()) for values, pixels in zip(table, views.unbind(-3), strict=True)]
    return torch.stack(channels, dim=-3)


def _to_pixels(processor: ImageProcessor, images: list[Image.Image]) -> torch.Tensor:
    """(len(images), 3, S, S) in uint8."""
    return processor.preprocess(images, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"]


def _cut_anyres(image: Image.Image, processor: ImageProcessor, canvases: Sequence[Size]) -> torch.Tensor:
    side = view_size(processor)
    canvas_size = select_best_resolution(image.size, canvases)
    tiles = divide_to_patches(resize_and_pad_image(image, canvas_size), side)
    return _to_pixels(processor, [resize(image, (side, side)), *tiles])


def _cut_padded(image: Image.Image, processor: ImageProcessor) -> torch.Tensor:
    if max(image.size) > _MAX_PAD_SIDE:
        scale = _MAX_PAD_SIDE / max(image.size)
        image = resize(image, (max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    mean_color = tuple(int(channel * 255) for channel in processor.image_mean)
    return _to_pixels(processor, [expand2square(image, mean_color)])[0]


def _cut_plain(image: Image.Image, processor: ImageProcessor) -> torch.Tensor:
    wanted = processor.size
    if processor.do_resize and "shortest_edge" in wanted and "longest_edge" not in wanted:
        # What the processor does by itself, which then finds nothing left to scale.
        edge, (short, long) = wanted["shortest_edge"], sorted(image.size)
        far = int(edge * long / short)
        image = resize(image, (edge, far) if image.width <= image.height else (far, edge), processor.resample)
    return _to_pixels(processor, [image])[0]


def cut_into_views(
    image: Image.Image,
    processor: ImageProcessor,
    mode: str | None,
    grid_pinpoints: str | Sequence[Sequence[int]] | None,
) -> torch.Tensor:
    """Cut one RGB image into views as `mode` says (one of `IMAGE_MODES`, None for "none").

    "anyres": the whole image squeezed into a square, then the tiles row by row. "pad": the image on a square of the processor's mean
    colour. "none", "square": as CLIP does, shortest edge to S, centre cropped.

    Args:
        processor: image processor of the vision tower.
        grid_pinpoints: canvases of "anyres", see `parse_pinpoints`.

    Returns:
        Pixels in uint8, (1 + tiles, 3, S, S) for "anyres", else (3, S, S); `pixel_values` makes of them what the tower reads.

    Raises:
        ValueError: an unknown mode, or "anyres" without canvases.
    """
    if mode in (None, "none", "square"):
        return _cut_plain(image, processor)
    if mode == "pad":
        return _cut_padded(image, processor)
    if mode != "anyres":
        raise ValueError(f"image_aspect_ratio is {mode!r}, expected one of {', '.join(IMAGE_MODES)}")
    if grid_pinpoints is None:
        raise ValueError("image_aspect_ratio is 'anyres' but image_grid_pinpoints is None: set the list of canvases")
    return _cut_anyres(image, processor, parse_pinpoints(grid_pinpoints))


def process_image_for_mode(
    image: Image.Image,
    processor: ImageProcessor,
    mode: str | None,
    grid_pinpoints: str | Sequence[Sequence[int]] | None,
) -> torch.Tensor:
    """The views of `cut_into_views` with the values that the vision tower reads."""
    return pixel_values(cut_into_views(image, processor, mode, grid_pinpoints), pixel_table(processor))


def process_anyres_image(
    image: Image.Image, processor: ImageProcessor, grid_pinpoints: str | Sequence[Sequence[int]]
) -> torch.Tensor:
    """LLaVA's name for `process_image_for_mode` in mode "anyres": (1 + tiles, 3, S, S)."""
    return process_image_for_mode(image, processor, "anyres", grid_pinpoints)
