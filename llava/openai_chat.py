"""A conversation as OpenAI's chat completions carry it: what a bridge or the bulk client sends to a server. Nothing here needs torch.

Granularity travels under two names. This project's own services read `routing_fields`; a stock vLLM with our plug-in reads
`processor_kwargs`, the one field of its API that reaches a model's processor.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.images import open_image, read_source
from llava.messages import Detail, Message, RoutingRequest

SENT_AS_IT_IS = {"JPEG": "jpeg", "PNG": "png"}
"""Pillow's name of a format -> its media type: files of these are sent unchanged where nothing has to be done to their pixels."""
UPRIGHT = 1
"""Exif's number of an image that needs no turn."""


def chat_messages(turns: Sequence[Message], urls: Sequence[str], details: Sequence[Detail | None] = ()) -> list[dict[str, Any]]:
    """Turns as OpenAI's messages, each image where its placeholder stands.

    Args:
        turns: as `llava.messages.normalise_turns` gives them. urls: of the images (data URLs), in the order of their placeholders.
        details: one per image, or none at all.

    Raises:
        ValueError: as many placeholders as images were expected.
    """
    return messages_with(turns, [_image_part(url, details[place] if details else None) for place, url in enumerate(urls)])


def messages_with(turns: Sequence[Message], images: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with content parts of any kind in the images' places."""
    marked = sum(turn.text.count(DEFAULT_IMAGE_TOKEN) for turn in turns)
    if marked != len(images):
        raise ValueError(f"The text holds {marked} <image> placeholders, but {len(images)} images came; make them agree.")
    waiting = iter(images)
    return [{"role": turn.role, "content": _content(turn.text, waiting)} for turn in turns]


def _content(turn_text: str, images: Iterator[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """A turn's text, cut at its placeholders; the line breaks around an image, which templates write between parts, are dropped."""
    pieces = turn_text.split(DEFAULT_IMAGE_TOKEN)
    last = len(pieces) - 1
    if not last:
        return turn_text
    parts: list[dict[str, Any]] = []
    for place, piece in enumerate(pieces):
        text = piece.removeprefix("\n" if place else "").removesuffix("\n" if place < last else "")
        if text:
            parts.append({"type": "text", "text": text})
        if place < last:
            parts.append(next(images))
    return parts


def _image_part(url: str, detail: Detail | None) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **({"detail": detail} if detail else {})}}


def data_url(image: Image.Image) -> str:
    """An image as it is sent: PNG, so that the other side decodes the same pixels."""
    buffer = BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def image_url(path: Path) -> str:
    """An image file as it is sent: as it is where every decoder makes the same RGB pixels of it, else those pixels as PNG.

    Raises:
        ImageError: it breaks the rules of `llava.images`.
    """
    data = read_source(path)
    opened = open_image(data)
    subtype = SENT_AS_IT_IS.get(str(opened.file.format))
    if subtype is None or opened.file.mode != "RGB" or opened.orientation != UPRIGHT or "transparency" in opened.file.info:
        return data_url(opened.decode())
    return f"data:image/{subtype};base64,{base64.b64encode(data).decode()}"


def routing_fields(routing: RoutingRequest) -> dict[str, Any]:
    """A routing request as fields of a body to this project's services; the detail of each image is in the image's own part."""
    return _given(routing, "granularity")


def processor_kwargs(routing: RoutingRequest) -> dict[str, Any]:
    """A routing request as `mm_processor_kwargs` of a body to vLLM with the plug-in; empty where the server's default is wanted.

    A server accepts them with `--trust-request-mm-kwargs` only.
    """
    return _given(routing, "vis_token_granularity")


def _given(routing: RoutingRequest, granularity: str) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if routing.granularity is not None:
        fields[granularity] = routing.granularity if isinstance(routing.granularity, int) else list(routing.granularity)
    if routing.max_visual_tokens is not None:
        fields["max_visual_tokens"] = routing.max_visual_tokens
    if routing.bias:
        fields["granularity_bias"] = routing.bias
    return fields
