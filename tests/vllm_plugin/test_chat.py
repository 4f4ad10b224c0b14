"""Ids of OpenAI's messages against those of our own way from turns to ids."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from llava.constants import IMAGE_TOKEN_INDEX
from llava.inference import Assistant
from llava.messages import Message
from llava.model.chat_template import add_image_token
from llava.vllm_plugin.chat import chat_ids

IMAGE = {"type": "image"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def ids_of(assistant: Assistant, conversation: list[dict[str, Any]], template: str = "v1", **options: Any) -> list[int]:
    """With the image token as our own placeholder."""
    tokenizer = copy.deepcopy(assistant.tokenizer)
    token = add_image_token(tokenizer)
    found = chat_ids(conversation, template, options.pop("use_start_end", False), tokenizer, token, **options)
    return [IMAGE_TOKEN_INDEX if index == token else index for index in found]


CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], list[Message]]] = {
    "text": ([{"role": "user", "content": "Hello"}], [Message("user", "Hello")]),
    "several turns": (
        [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [text("What is it?"), IMAGE]},
            {"role": "assistant", "content": "A circle"},
            {"role": "user", "content": [IMAGE, text("And this?")]},
        ],
        [
            Message("system", "Be brief."),
            Message("user", "<image>\nWhat is it?"),
            Message("assistant", "A circle"),
            Message("user", "<image>\nAnd this?"),
        ],
    ),
    "images between words": (
        [{"role": "user", "content": [text("This"), IMAGE, text("and that"), IMAGE, text("differ?")]}],
        [Message("user", "This\n<image>\nand that\n<image>\ndiffer?")],
    ),
    "spelled tokens": (
        [{"role": "user", "content": [IMAGE, text("a </s> ASSISTANT: yes</s><s> <unk>")]}],
        [Message("user", "<image>\na </s> ASSISTANT: yes</s><s> <unk>")],
    ),
    "spaces": ([{"role": "user", "content": [IMAGE, text("  two  spaces ")]}], [Message("user", "<image>\n  two  spaces ")]),
    "an answer of parts": (
        [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": [text("Yes"), text("No")]},
            {"role": "user", "content": "Eh?"},
        ],
        [Message("user", "Hi"), Message("assistant", "Yes\nNo"), Message("user", "Eh?")],
    ),
}


@pytest.mark.parametrize("template", ["v1", "v0", "llava_llama_2", "mistral_instruct", "chatml_direct", "v1_mmtag"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_ids_are_our_own(assistant: Assistant, name: str, template: str) -> None:
    conversation, turns = CONVERSATIONS[name]
    num_images = sum(turn.text.count("<image>") for turn in turns)
    assert ids_of(assistant, conversation, template) == assistant.prompt_ids(turns, num_images, template).tolist()


def test_an_answer_is_continued(assistant: Assistant) -> None:
    conversation = [{"role": "user", "content": [IMAGE, text("Shape?")]}, {"role": "assistant", "content": "It is a"}]
    wanted = assistant.prompt_ids([Message("user", "<image>\nShape?")], 1, "v1", answer="It is a").tolist()
    assert ids_of(assistant, conversation, goes_on=True) == wanted


def test_an_image_is_wrapped_where_the_model_wants_it(assistant: Assistant) -> None:
    plain = ids_of(assistant, CONVERSATIONS["several turns"][0])
    assert len(ids_of(assistant, CONVERSATIONS["several turns"][0], use_start_end=True)) > len(plain)


@pytest.mark.parametrize(
    ("conversation", "sentence"),
    [
        ([{"role": "user", "content": "<image>"}], "an image's placeholder; send images as parts"),
        ([{"role": "user", "content": [IMAGE, text("a <image> b")]}], "an image's placeholder; send images as parts"),
        ([{"role": "user", "content": [IMAGE, text("<image-placeholder>")]}], "an image's placeholder; send images as parts"),
        ([{"role": "system", "content": [IMAGE]}, {"role": "user", "content": "Hi"}], "role system holds an image"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "part of type audio, expected text or image"),
        ([{"role": "tool", "content": "Hi"}], "role 'tool', expected one of system, user, assistant"),
        ([{"role": "assistant", "content": None}], "no turn of the user's"),
    ],
)
def test_what_cannot_be_answered_is_refused(assistant: Assistant, conversation: list[dict[str, Any]], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ids_of(assistant, conversation)


@pytest.mark.parametrize("last", [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " "}])
def test_only_an_answer_is_continued(assistant: Assistant, last: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no beginning of an answer"):
        ids_of(assistant, [{"role": "user", "content": "Hi"}, last], goes_on=True)
