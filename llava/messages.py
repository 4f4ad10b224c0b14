"""The turns of a conversation, and where the images of a turn stand. Nothing here needs torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from llava.constants import DEFAULT_IMAGE_TOKEN


@dataclass(frozen=True)
class Message:
    """One turn: `role` is `user`, `assistant`, or `system` at the very start. `<image>` in the text marks where an image goes."""

    role: str
    text: str


def images_first(parts: Sequence[str]) -> list[str]:
    """The parts of a turn, its images in front where they all stand together behind the words.

    The models were trained with a turn's images in front of its words, and transformers' LLaVA templates write them there, while most
    clients send the words first. Words between images, or on both sides of them, say something by their place and keep it.

    Args:
        parts: texts, `<image>` for an image. Beside images, parts of white space alone are left out: they are no words.
    """
    if DEFAULT_IMAGE_TOKEN not in parts:
        return list(parts)
    filled = [part for part in parts if part.strip()]
    num_words = len(filled)
    while num_words and filled[num_words - 1] == DEFAULT_IMAGE_TOKEN:
        num_words -= 1
    words, images = filled[:num_words], filled[num_words:]
    return filled if any(DEFAULT_IMAGE_TOKEN in part for part in words) else images + words


def text_of_parts(parts: Sequence[str]) -> str:
    """A turn's text from its parts, one a line, ordered by `images_first`."""
    return "\n".join(images_first(parts))


def put_images_first(text: str) -> str:
    """A turn's text, ordered by `images_first`: images that move stand on lines of their own, where none moves nothing changes."""
    parts = [part for part in re.split(f"({DEFAULT_IMAGE_TOKEN})", text) if part.strip()]
    moved = images_first(parts)
    return text if moved == parts else "\n".join(part.strip() for part in moved)
