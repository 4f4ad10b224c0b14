from __future__ import annotations

from typing import Any

import pytest

from llava.messages import RoutingRequest
from llava.vllm_plugin.wishes import routing_request


@pytest.mark.parametrize(
    ("wishes", "request_"),
    [
        ({}, RoutingRequest()),
        ({"vis_token_granularity": 144}, RoutingRequest(144)),
        ({"vis_token_granularity": [36, 144]}, RoutingRequest([36, 144])),
        ({"vis_token_granularity": "auto"}, RoutingRequest()),
        ({"vis_token_granularity": None, "max_visual_tokens": None, "granularity_bias": None}, RoutingRequest()),
        ({"max_visual_tokens": 500, "granularity_bias": -1}, RoutingRequest(max_visual_tokens=500, bias=-1.0)),
    ],
)
def test_wishes_become_a_routing_request(wishes: dict[str, Any], request_: RoutingRequest) -> None:
    assert routing_request(wishes) == request_


def test_a_default_holds_where_nothing_else_is_said() -> None:
    defaults = {"vis_token_granularity": 144, "max_visual_tokens": 500}
    assert routing_request({"vis_token_granularity": None}, defaults) == RoutingRequest(144, 500)
    assert routing_request({"vis_token_granularity": "auto"}, defaults) == RoutingRequest(None, 500)
    assert routing_request({"vis_token_granularity": 36, "max_visual_tokens": 9}, defaults) == RoutingRequest(36, 9)


@pytest.mark.parametrize("name", ["granularity", "images_kwargs", "a secret"])
def test_an_unknown_field_is_refused_without_being_quoted(name: str) -> None:
    with pytest.raises(ValueError, match="1 unknown fields, expected vis_token_granularity") as raised:
        routing_request({name: 1})
    assert name == "granularity" or name not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("vis_token_granularity", value) for value in (True, 0, -1, 1.5, "finest", [], ["auto"], [0], {}, 10**30, list(range(1, 100)))],
        *[("max_visual_tokens", value) for value in (True, 0, -5, 10.0, "9", [9], 10**30)],
        *[("granularity_bias", value) for value in (True, "0.5", [0.5], float("nan"), float("inf"), 1e300)],
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_value_that_no_model_takes_is_refused_by_its_field(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^mm_processor_kwargs cannot work: {name}, expected ") as raised:
        routing_request({name: value})
    assert len(str(raised.value)) < 300
