"""The turns of a conversation, whichever API sent them, as messages with a placeholder for each image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER
from llava.messages import Message, normalise_turns, text_of_parts
from llava.serve.api.parsed_request import ImageSource
from llava.serve.http.errors import FieldError
from llava.serve.protocol import ErrorKind, Limits, ModelCard


@dataclass(frozen=True)
class ChatTurn:
    """One turn as a client sent it. parts: texts and images in the order sent. param: the field that holds them."""

    role: str
    parts: Sequence[str | ImageSource]
    param: str


def read_turns(
    sent: Sequence[ChatTurn], card: ModelCard, limits: Limits, param: str
) -> tuple[tuple[Message, ...], tuple[ImageSource, ...]]:
    """A conversation as the engine takes it, with a placeholder for each image, and the images in the order of their placeholders.

    Args:
        param: the field that holds the conversation.

    Raises:
        FieldError: what cannot be answered, and in which field.
    """
    if len(sent) > limits.max_messages:
        raise FieldError(f"There are {len(sent)} messages, expected at most {limits.max_messages}.", param)
    turns = [Message("system" if turn.role == "developer" else turn.role, _text_of(turn)) for turn in sent]
    sources = tuple(part for turn in sent for part in turn.parts if isinstance(part, ImageSource))
    check_images(len(sources), card, limits, param)
    check_prompt_length(sum(len(turn.text) for turn in turns), limits, param)
    try:
        return tuple(normalise_turns(turns, len(sources))), sources
    except ValueError as error:  # nothing to answer; the message is this package's own and names positions only
        raise FieldError(str(error), param) from error


def _text_of(turn: ChatTurn) -> str:
    """A turn's text, with a placeholder for each image; the images keep their own order."""
    if turn.role != "user" and any(isinstance(part, ImageSource) for part in turn.parts):
        raise FieldError(f"A message of role {turn.role} holds an image; only user messages may.", turn.param)
    if any(mark in part for part in turn.parts if isinstance(part, str) for mark in (DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER)):
        raise FieldError(f"The text holds {DEFAULT_IMAGE_TOKEN}, an image's placeholder; send images as parts of their own.", turn.param)
    return text_of_parts([part if isinstance(part, str) else DEFAULT_IMAGE_TOKEN for part in turn.parts])


def check_images(count: int, card: ModelCard, limits: Limits, param: str) -> None:
    """Refuse more images than the model or the server accepts."""
    most = min(limits.max_images, card.max_images) if card.takes_images else 0
    if count > most:
        raise FieldError(f"There are {count} images, expected at most {most}.", param)


def check_prompt_length(count: int, limits: Limits, param: str) -> None:
    """Refuse a longer text than the server accepts."""
    if count > limits.max_prompt_characters:
        raise FieldError(
            f"The text has {count} characters, expected at most {limits.max_prompt_characters}.", param, ErrorKind.CONTEXT_LENGTH
        )
