"""Conversations and granularities as they travel to a server."""

from __future__ import annotations

import base64
from io import BytesIO

import pytest
from PIL import Image

from llava.messages import Message, RoutingRequest, text_of_parts
from llava.openai_chat import chat_messages, data_url, processor_kwargs, routing_fields


def test_images_stand_where_their_placeholders_stood() -> None:
    turns = [Message("system", "Be brief."), Message("user", "<image>\nWhich of it and <image> is red?"), Message("assistant", "It.")]
    system, user, assistant = chat_messages(turns, ["data:a", "data:b"], (None, "low"))
    assert system == {"role": "system", "content": "Be brief."} and assistant == {"role": "assistant", "content": "It."}
    assert user["content"] == [
        {"type": "image_url", "image_url": {"url": "data:a"}},
        {"type": "text", "text": "Which of it and "},
        {"type": "image_url", "image_url": {"url": "data:b", "detail": "low"}},
        {"type": "text", "text": " is red?"},
    ]
    with pytest.raises(ValueError, match="holds 2 <image> placeholders, but 1 images came"):
        chat_messages(turns, ["data:a"])


def test_a_server_that_writes_its_parts_a_line_each_writes_the_turn_again() -> None:
    text = "First\n<image>\nand then\n<image>\n<image>\nWhich is red?"
    [message] = chat_messages([Message("user", text)], ["data:a", "data:b", "data:c"])
    assert text_of_parts([part.get("text", "<image>") for part in message["content"]]) == text


def test_an_image_arrives_with_the_pixels_it_had() -> None:
    image = Image.effect_noise((9, 7), 50).convert("RGB")
    head, _, data = data_url(image).partition(",")
    assert head == "data:image/png;base64"
    assert Image.open(BytesIO(base64.b64decode(data))).tobytes() == image.tobytes()


@pytest.mark.parametrize(
    ("routing", "values"),
    [
        (RoutingRequest(), (None, None, None)),
        (RoutingRequest(16), (16, None, None)),
        (RoutingRequest((4, 16), 90, -0.5), ([4, 16], 90, -0.5)),
    ],
)
def test_granularity_has_one_name_for_our_services_and_one_for_vllm(routing: RoutingRequest, values: tuple[object, ...]) -> None:
    for fields, granularity in ((routing_fields(routing), "granularity"), (processor_kwargs(routing), "vis_token_granularity")):
        names = (granularity, "max_visual_tokens", "granularity_bias")
        assert fields == {name: value for name, value in zip(names, values, strict=True) if value is not None}
