"""Prompts of every template, against recorded ones, and what a conversation can do besides."""

from __future__ import annotations

import base64
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava.conversation import (
    Conversation,
    SeparatorStyle,
    conv_templates,
    default_conversation,
    get_template,
)
from llava.conversation_images import process_image

RECORD = json.loads((Path(__file__).parent / "oracle" / "conversations.json").read_text())
QUESTION, ANSWER, QUESTION_2, ANSWER_2 = RECORD["exchange"]
IMAGE_QUESTION = ("Look here <image> What is on the pier?", None, "Default")
TURNS: dict[str, list[Any]] = {
    "two_turns_open": [QUESTION, ANSWER, QUESTION_2, None],
    "two_turns_closed": [QUESTION, ANSWER, QUESTION_2, ANSWER_2],
    "one_turn_open": [QUESTION, None],
    "image_tuple_first": [IMAGE_QUESTION, None],
    "empty_answer": [QUESTION, ""],
}


def fill(conversation: Conversation, messages: list[Any]) -> Conversation:
    for i, message in enumerate(messages):
        conversation.append_message(conversation.roles[i % 2], message)
    return conversation


def test_the_templates_are_the_recorded_ones() -> None:
    assert set(conv_templates) == set(RECORD["templates"])
    assert default_conversation is conv_templates["v1"]


@pytest.mark.parametrize("name", RECORD["templates"])
def test_template_fields(name: str) -> None:
    template, record = conv_templates[name], RECORD["templates"][name]
    assert list(template.roles) == record["roles"]
    assert template.sep_style.name == record["sep_style"]
    for field in ("sep", "sep2", "version", "offset"):
        assert getattr(template, field) == record[field]
    assert len(template.messages) == record["n_preset_messages"]


@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("name", RECORD["templates"])
def test_prompt(name: str, turns: str) -> None:
    conversation, expected = fill(get_template(name), TURNS[turns]), RECORD["templates"][name][turns]
    if isinstance(expected, dict):  # the reference fails with a TypeError about None
        with pytest.raises(ValueError, match="no second separator"):
            conversation.get_prompt()
    else:
        assert conversation.get_prompt() == expected


def test_asking_for_the_prompt_changes_nothing() -> None:
    conversation = fill(get_template("v1_mmtag"), TURNS["image_tuple_first"])
    assert conversation.get_prompt() == conversation.get_prompt()
    assert len(conversation.messages) == 2


def test_a_copy_grows_alone() -> None:
    copy = conv_templates["v1"].copy()
    fill(copy, [QUESTION, None])
    copy.messages[-1][1] = ANSWER
    again = copy.copy()
    again.messages[-1][1] = "other"
    assert conv_templates["v1"].messages == []
    assert copy.messages[-1][1] == ANSWER


def test_unknown_template_lists_the_choices() -> None:
    with pytest.raises(ValueError, match="'v7' is unknown: choose one of chatml_direct, .*vicuna_v1"):
        get_template("v7")


def test_bracket_template_wants_a_question_first() -> None:
    conversation = get_template("llama_2")
    conversation.append_message("USER", None)
    with pytest.raises(ValueError, match="starts with a text of 'USER'"):
        conversation.get_prompt()


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("v1", " ASSISTANT: a</s>USER: b ASSISTANT: c</s>ASSISTANT:"),
        ("llava_v0", "###Assistant: a###Human: b###Assistant: c###Assistant:"),
        ("chatml_direct", "<|im_end|><|im_start|>assistant\na<|im_end|><|im_start|>user\nb<|im_end|><|im_start|>assistant\nc<|im_end|>"
                          "<|im_start|>assistant\n"),
        ("mistral_instruct", "[INST]  [/INST] a </s>[INST] b [/INST] c </s>[INST]  [/INST]"),
        ("llava_llama_2", "\n<</SYS>>\n\n [/INST] a </s><s>[INST] b [/INST] c </s><s>[INST]  [/INST]"),
    ],
)  # fmt: skip
def test_the_assistant_may_speak_first_and_again(name: str, written: str) -> None:
    conversation = get_template(name)
    for role, text in ((1, "a"), (0, "b"), (1, "c"), (1, None)):
        conversation.append_message(conversation.roles[role], text)
    assert conversation.get_prompt().endswith(written)
    assert conversation.get_prompt().count("<<SYS>>") == (name == "llava_llama_2")


@pytest.mark.parametrize("name", conv_templates)
def test_words_and_markup_make_up_the_prompt(name: str) -> None:
    conversation = get_template(name)
    fill(conversation, ["a <image> b", "</s>", "<im_start><image><im_end>\n<im_start>"][: 1 if "plain" in name else 3])
    conversation.set_system_message("" if "plain" in name else "<s>")
    spans = conversation.get_spans()
    assert "".join(span.text for span in spans) == conversation.get_prompt()
    words = [span.text for span in spans if span.is_text]
    shown = [text for _, text in conversation.messages[: conversation.offset]]
    expected = ["a ", " b"] if "plain" in name else ["<s>", "a ", " b", "</s>", "\n<im_start>"]
    assert [text for text in words if text not in shown] == expected


def test_a_conversation_built_by_hand_like_llava() -> None:
    conversation = Conversation(
        system="S.", roles=("A", "B"), messages=[], offset=0, sep_style=SeparatorStyle.TWO, sep="|", sep2="#"
    )
    assert fill(conversation, ["q", "a", "r", None]).get_prompt() == "S.|A: q|B: a#A: r|B:"


def test_images_come_out_in_order_as_each_message_asks() -> None:
    wide, tall = Image.new("RGB", (40, 20), "red"), Image.new("RGB", (10, 30), "blue")
    turns = [("<image>\nOne?", wide, "Pad"), "yes", ("<image>\nTwo?", tall, "Default"), None]
    conversation = fill(get_template("v1"), turns)
    assert [image.size for image in conversation.get_images(return_pil=True)] == [(40, 40), (10, 30)]
    sent = Image.open(BytesIO(base64.b64decode(conversation.get_images()[1])))
    assert (sent.size, sent.format) == ((10, 30), "PNG")


@pytest.mark.parametrize(
    ("mode", "size", "expected"),
    [
        ("Default", (1344, 1000), (1344, 1000)),
        ("Default", (1600, 800), (1344, 672)),
        ("Crop", (1400, 1400), (672, 672)),
        ("Default", (5000, 30), (1344, 8)),
        ("Resize", (500, 30), (336, 336)),
        ("Pad", (50, 30), (50, 50)),
    ],
)
def test_sizes_on_the_way_to_a_worker(mode: str, size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert process_image(Image.new("RGB", size), mode).size == expected


def test_unknown_image_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="'Zoom' is unknown"):
        process_image(Image.new("RGB", (4, 4)), "Zoom")


def test_chatbot_messages() -> None:
    turns = [('<image>\nA <b>bold</b> "one"?', Image.new("RGB", (8, 8)), "Pad"), "yes", "more?", None]
    shown = fill(get_template("v0"), turns).to_gradio_chatbot()
    assert [message["role"] for message in shown] == ["user", "assistant", "user"]
    assert shown[0]["content"].startswith('<img src="data:image/jpeg;base64,')
    assert 'alt="A &lt;b&gt;bold&lt;/b&gt; &quot;one&quot;?"' in shown[0]["content"]
    assert shown[1:] == [{"role": "assistant", "content": "yes"}, {"role": "user", "content": "more?"}]


def test_dict_leaves_pictures_out() -> None:
    conversation = fill(get_template("v1"), [("Q", Image.new("RGB", (8, 8)), "Pad"), None])
    fields = conversation.dict()
    assert list(fields) == ["system", "roles", "messages", "offset", "sep", "sep2"]
    assert fields["messages"] == [["USER", "Q"], ["ASSISTANT", None]]
