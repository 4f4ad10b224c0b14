"""The images of a processor's call, in every form that transformers' processors accept, as PIL images."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from llava.images import load_image, load_image_from_base64, to_rgb

IMAGE_KEYS = ("image", "url", "path", "base64")
"""Where a part of type `image` may hold its image."""

_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}={0,2}\s*")
"""Longer than names without a dot are, shorter than the smallest image file."""


def read_image(source: Any) -> Image.Image:
    """An image as PIL's.

    Args:
        source: a PIL image; pixels as an array or tensor, see `_from_pixels`; the bytes of an image file; or a text: a file's path, a web
            address, a data URL, or base64.

    Raises:
        ValueError: anything else, or an image that cannot be used (`llava.images`).
    """
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, str) and not os.path.isfile(source) and _BASE64.fullmatch(source):
        return load_image_from_base64(source)
    if isinstance(source, (str, os.PathLike, bytes)):
        return load_image(source, allow_remote=True)
    if hasattr(source, "__array__"):
        return _from_pixels(np.asarray(source))
    raise ValueError(f"An image is a {type(source).__name__}, expected a PIL image, pixels, a path, a web address, a data URL or base64.")


def _from_pixels(pixels: np.ndarray) -> Image.Image:
    """Pixels (H, W), (H, W, C) or (C, H, W) with C of 1, 3 or 4: whole numbers up to 255, or shares from 0 to 1."""
    if pixels.ndim == 3 and pixels.shape[-1] not in (1, 3, 4) and pixels.shape[0] in (1, 3, 4):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    if not pixels.size or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[-1] in (3, 4))):
        raise ValueError(f"An image's pixels have the shape {pixels.shape}, expected (height, width) or that with 1, 3 or 4 channels.")
    most = 1 if pixels.dtype.kind == "f" else 255
    if pixels.dtype.kind not in "uif" or not (pixels.min() >= 0 and pixels.max() <= most):
        raise ValueError(f"An image's pixels are of type {pixels.dtype}, expected whole numbers from 0 to 255 or shares from 0 to 1.")
    return to_rgb(Image.fromarray((pixels * (255 // most)).round().astype(np.uint8)))


def image_of_part(part: dict[str, Any]) -> Image.Image:
    """The image of a message's part of type `image` or, in OpenAI's form, `image_url`.

    Raises:
        ValueError: the part holds none, or one that cannot be read.
    """
    if part["type"] == "image_url":
        address = part.get("image_url")
        return read_image(address.get("url") if isinstance(address, dict) else address)
    found = [part[key] for key in IMAGE_KEYS if part.get(key) is not None]
    if len(found) != 1:
        raise ValueError(
            f"An image part has {sorted(part)}; put a PIL image under 'image', a file under 'path', a web address under 'url' or base64 "
            "under 'base64'."
        )
    return read_image(found[0])


def images_of_rows(images: Any, placeholders: Sequence[int]) -> list[Image.Image]:
    """The images of a call as one list in reading order, checked against the placeholders of each prompt.

    Args:
        images: `None`, one image, images in reading order over the batch, or one entry per prompt: a list of its images, or `None`. What an
            image may be, `read_image` says.
        placeholders: of each prompt.

    Raises:
        ValueError: images unlike placeholders, or what `read_image` raises.
    """
    given = _entries(images)
    if any(entry is None or isinstance(entry, (list, tuple)) for entry in given):
        rows = [_entries(entry) for entry in given]
        counts, expected = [len(row) for row in rows], list(placeholders)
    else:
        rows, counts, expected = [given], [len(given)], [sum(placeholders)]
    if counts != expected:
        raise ValueError(
            f"The prompts hold {list(placeholders)} <image> placeholders, but {counts} images were given; write one <image> per image."
        )
    return [read_image(image) for row in rows for image in row]


def _entries(images: Any) -> list[Any]:
    """What a list of images holds; an array of four axes is one too."""
    if images is None:
        return []
    if isinstance(images, (list, tuple)):
        return list(images)
    return list(images) if getattr(images, "ndim", 0) == 4 else [images]
