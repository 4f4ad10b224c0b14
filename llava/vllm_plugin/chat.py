"""OpenAI's messages, as vLLM parses them, to the ids that our model was trained on. Knows no vLLM.

The prompt is written by the checkpoint's conversation template and tokenised as everywhere in this project (`llava.messages`,
`llava.mm_utils`), so no Jinja template takes part: what people say is text whatever it spells, images stand first in their turn, and the
ids are those of `llava.inference`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER
from llava.messages import Message, prompt_spans, text_of_parts
from llava.mm_utils import tokenize_spans

_ROLES = {"developer": "system"}
"""Roles of OpenAI's API that have another name here."""
_MARKS = (DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER)


def chat_ids(
    conversation: Sequence[Mapping[str, Any]],
    template: str,
    use_start_end: bool,
    tokenizer: PreTrainedTokenizerBase,
    image_token_id: int,
    goes_on: bool = False,
) -> list[int]:
    """The ids of a conversation's prompt, open for the next answer, with one image token per image.

    Args:
        conversation: `role` and `content` of each turn; a content is a text, or parts of type `text` and `image`.
        template, use_start_end: `conv_version` and `mm_use_im_start_end` of the checkpoint.
        goes_on: the last turn is an answer's beginning, which the model is to continue.

    Raises:
        ValueError: turns that cannot be answered, a text that spells an image's placeholder, or an image that is not the user's.
    """
    turns = [Message(_ROLES.get(turn["role"], turn["role"]), _text_of(turn)) for turn in conversation]
    num_images = sum(_is_image(part) for turn in conversation for part in _parts(turn))
    beginning = None
    if goes_on:
        if not turns or turns[-1].role != "assistant" or not turns[-1].text.strip():
            raise ValueError("continue_final_message is set, but the last message is no beginning of an answer; give one.")
        beginning = turns.pop().text
    return tokenize_spans(prompt_spans(turns, num_images, template, use_start_end, beginning), tokenizer, image_token_id)


def _text_of(turn: Mapping[str, Any]) -> str:
    """A turn's text with a placeholder for each image."""
    parts = _parts(turn)
    if turn["role"] != "user" and any(map(_is_image, parts)):
        raise ValueError(f"A message of role {turn['role']} holds an image; only user messages may.")
    texts = [DEFAULT_IMAGE_TOKEN if _is_image(part) else part["text"] for part in parts]
    if any(mark in text for text, part in zip(texts, parts, strict=True) if not _is_image(part) for mark in _MARKS):
        raise ValueError(f"The text holds {DEFAULT_IMAGE_TOKEN}, an image's placeholder; send images as parts of their own.")
    return text_of_parts(texts)


def _parts(turn: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    content = turn.get("content") or []
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _is_image(part: Mapping[str, Any]) -> bool:
    if part["type"] not in ("text", "image"):
        raise ValueError(f"A message has a part of type {part['type']}, expected text or image.")
    return part["type"] == "image"
