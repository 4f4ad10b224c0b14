"""The images of a conversation, prepared for their journey to one of LLaVA's workers."""

from __future__ import annotations

import base64
from io import BytesIO

from PIL import Image

from llava.images import expand2square

_PAD_COLOR = (122, 116, 104)  # CLIP's mean pixel
_RESIZE_SIDE = 336
_MAX_SENT_SIDE, _MAX_SENT_SHORT_SIDE = 1344, 672  # larger images are shrunk before they travel to a worker


def process_image(image: Image.Image, mode: str) -> Image.Image:
    """Prepare an image for the journey to a worker.

    Args:
        mode: "Pad" centres it on a square, "Resize" squeezes it to 336 x 336, "Default" and "Crop" keep its shape.

    Returns:
        The image, shrunk to 1344 pixels on its long and 672 on its short side where its long side exceeds 1344.

    Raises:
        ValueError: another `mode`.
    """
    if mode == "Pad":
        image = expand2square(image, _PAD_COLOR)
    elif mode == "Resize":
        image = image.resize((_RESIZE_SIDE, _RESIZE_SIDE))
    elif mode not in ("Default", "Crop"):
        raise ValueError(f"image mode {mode!r} is unknown: use Pad, Default, Crop or Resize")
    long_side, short_side = max(image.size), min(image.size)
    if long_side <= _MAX_SENT_SIDE:
        return image
    scale = min(_MAX_SENT_SIDE / long_side, _MAX_SENT_SHORT_SIDE / short_side)
    return image.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale))))


def to_base64(image: Image.Image, file_format: str) -> str:
    """An image as the base64 text of a file of its pixels."""
    buffer = BytesIO()
    image.convert("RGB").save(buffer, format=file_format)
    return base64.b64encode(buffer.getvalue()).decode()
