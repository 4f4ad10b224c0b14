"""LLaVA's worker protocol as data: its errors name the fields as the client wrote them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llava.messages import RoutingRequest
from llava.serve.api.llava import read_worker_request
from llava.serve.api.parsed_request import ImageSource
from llava.serve.http.errors import FieldError
from llava.serve.protocol import ErrorKind, Limits, ServeError
from tests.serve.bodies import worker_body
from tests.serve.fake_engine import CARD

LIMITS = Limits(max_prompt_characters=100, max_new_tokens=300)


def read(prompt="<image> a", card=CARD, **fields):
    return read_worker_request(worker_body(prompt, **{"images": ["AAAA"], **fields}), card, LIMITS)


def test_images_stand_at_their_places():
    call = read("<image> a <image>", images=["AAAA", "data:b"], vis_token_granularity=36)
    assert call.sources == (ImageSource("AAAA", "images[0]", plain_base64=True), ImageSource("data:b", "images[1]", plain_base64=True))
    assert call.prompts == ("<image> a <image>",) and call.routing == RoutingRequest(36) and call.stream and call.echo


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"granularity": 7}, "granularity"),
        ({"vis_token_granularity": 7}, "vis_token_granularity"),
        ({"vis_token_granularity": "fine"}, "vis_token_granularity"),
        ({"granularity": 36, "vis_token_granularity": 144}, "granularity"),
        ({"max_visual_tokens": 0}, "max_visual_tokens"),
        ({"images": ["A", 5]}, "images[1]"),
        ({"images": []}, "images"),
        ({"stop": ["a", 5]}, "stop[1]"),
        ({"stop": ""}, "stop"),
        ({"max_new_tokens": 301}, "max_new_tokens"),
        ({"prompt": "<image>" + "a" * 100}, "prompt"),
        ({"temperature": 3}, "temperature"),
    ],
)
def test_refused_by_the_name_of_the_field(fields, param):
    with pytest.raises(FieldError) as refused:
        read(**fields)
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"vis_token_granularity": 36}, "vis_token_granularity"),
        ({"granularity": 36}, "granularity"),
        ({"max_visual_tokens": 9}, "max_visual_tokens"),
    ],
)
def test_a_model_without_granularities_refuses_each_by_its_name(fields, param):
    with pytest.raises(FieldError) as refused:
        read(card=replace(CARD, granularities=(), has_router=False), **fields)
    assert refused.value.param == param


def test_what_the_engine_blames_has_the_clients_name():
    call = read("<image> a <image>", images=["A", "B"], vis_token_granularity=36)
    for told, param in (("images[1]", "images[1]"), ("granularity", "vis_token_granularity"), ("prompt", "prompt"), (None, None)):
        assert call.with_client_names(ServeError(ErrorKind.INVALID_REQUEST, "x", told)).param == param
