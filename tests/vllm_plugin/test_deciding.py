"""Levels decided for a prompt against those that our own assistant reports."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from llava.constants import IMAGE_TOKEN_INDEX
from llava.inference import Assistant
from llava.messages import Options, RoutingRequest
from llava.vllm_plugin.deciding import Decider, FeatureCache, RequestedImage, RouterOptions
from llava.vllm_plugin.served import ServedModel

QUESTION = "<image>\n<image>\nWhat handwritten digit is there?"


@pytest.fixture
def decider(served: ServedModel) -> Decider:
    return Decider(served, torch.float32, RouterOptions())


def prompt(served: ServedModel, assistant: Assistant, text: str, num_images: int) -> list[int]:
    ids = assistant.prompt_ids(text, num_images).tolist()
    return [served.image_token_id if index == IMAGE_TOKEN_INDEX else index for index in ids]


def requested(served: ServedModel, images: list[Image.Image]) -> list[RequestedImage]:
    return [RequestedImage(served, str(id(image)), image) for image in images]


@pytest.mark.parametrize(
    "request_",
    [
        RoutingRequest(),
        RoutingRequest(16),
        RoutingRequest(10_000),
        RoutingRequest([4, 64]),
        RoutingRequest(max_visual_tokens=150),
        RoutingRequest(bias=1.5),
        RoutingRequest([8, 64], max_visual_tokens=400, bias=0.5),
    ],
    ids=str,
)
def test_levels_are_our_own(
    served: ServedModel, decider: Decider, assistant: Assistant, images: list[Image.Image], request_: RoutingRequest
) -> None:
    for pair in ([images[0], images[2]], [images[1], images[3]], [images[1], images[1]]):
        answer = assistant.answer(pair, QUESTION, Options(max_new_tokens=1, routing=request_))
        levels = decider.decide(prompt(served, assistant, QUESTION, 2), requested(served, pair), request_)
        assert [served.config.levels[level].tokens for level in levels] == [report.granularity for report in answer.reports]


def test_a_level_that_is_fixed_costs_no_model(
    served: ServedModel, decider: Decider, assistant: Assistant, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ServedModel, "load_front", lambda *_: pytest.fail("the router was asked"))
    monkeypatch.setattr(ServedModel, "views", lambda *_: pytest.fail("the image was cut"))
    ids = prompt(served, assistant, QUESTION, 2)
    assert decider.decide(ids, requested(served, images[:2]), RoutingRequest(8)) == [1, 1]


def test_an_image_is_encoded_once(
    served: ServedModel, decider: Decider, assistant: Assistant, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    front: Any = decider._front
    encode = front.encode_views
    monkeypatch.setattr(front, "encode_views", lambda views: encoded.append(len(views)) or encode(views))
    ids = prompt(served, assistant, QUESTION, 2)
    first = decider.decide(ids, requested(served, [images[0], images[0]]), RoutingRequest())
    assert decider.decide(ids, requested(served, [images[0], images[1]]), RoutingRequest())[:1] == first[:1]
    decider.decide(ids, requested(served, [images[1], images[0]]), RoutingRequest())
    assert encoded == [1, 1, 0]


def test_images_unlike_image_tokens_are_refused(
    served: ServedModel, decider: Decider, assistant: Assistant, images: list[Image.Image]
) -> None:
    with pytest.raises(ValueError, match="hold 2 image placeholders"):
        decider.decide(prompt(served, assistant, QUESTION, 2), requested(served, images[:1]), RoutingRequest())


def test_the_cache_forgets_what_was_not_used_for_longest() -> None:
    cache, features = FeatureCache(3 * 40), torch.zeros(10)
    for name in "abc":
        cache.put(name, features)
    assert cache.get("a") is features
    cache.put("d", features)
    assert [name for name in "abcd" if cache.get(name) is not None] == ["a", "c", "d"]
    cache.put("e", torch.zeros(31))
    assert cache.get("e") is None and cache.get("a") is features


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"device": "cpu"}, "device is no option"),
        ({"router_device": "gpu"}, "router_device is 'gpu', expected a device"),
        ({"router_cache_mib": -1}, "router_cache_mib is -1, expected a whole number"),
    ],
)
def test_options_that_cannot_work_are_refused(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        RouterOptions.from_values(values)


def test_options() -> None:
    assert RouterOptions.from_values({"router_device": "cuda:1"}) == RouterOptions("cuda:1", 512)
