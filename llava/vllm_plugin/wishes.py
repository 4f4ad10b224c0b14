"""What a request to vLLM may ask of the granularity: `mm_processor_kwargs`, judged before anything is computed. Knows no vLLM.

    {"vis_token_granularity": 144 | [36, 144] | "auto", "max_visual_tokens": 500, "granularity_bias": -0.5}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava.messages import RoutingRequest
from llava.rules import Choice, Either, Integer, ListOf, Number, Rule, optional

AUTO = "auto"
"""The router's choice among all levels."""

_LEVEL = Integer(1, 2**26)
RULES: dict[str, Rule] = {
    "vis_token_granularity": optional(Either(Either(_LEVEL, ListOf(_LEVEL, 1, 64)), Choice((AUTO,)))),
    "max_visual_tokens": optional(Integer(1, 2**31 - 1)),
    "granularity_bias": optional(Number(-1e6, 1e6)),
}
"""Field -> what it may be. They may also stand in a checkpoint's generation_config.json, as the native model reads them there."""


def routing_request(wishes: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> RoutingRequest:
    """The routing request of a prompt.

    Args:
        wishes: of the request. defaults: in place of what it does not say or says is null.

    Raises:
        ValueError: unknown fields, or values that no model takes; the fields are named, their values are not.
    """
    check_wishes(wishes)
    given = {**(defaults or {}), **{name: value for name, value in wishes.items() if value is not None}}
    level = given.get("vis_token_granularity")
    return RoutingRequest(
        granularity=None if level == AUTO else level,
        max_visual_tokens=given.get("max_visual_tokens"),
        bias=float(given.get("granularity_bias") or 0.0),
    )


def check_wishes(wishes: Mapping[str, Any]) -> None:
    """Refuse fields and values that no model takes; errors as in `routing_request`."""
    if unknown := len(wishes.keys() - RULES.keys()):
        raise ValueError(f"mm_processor_kwargs has {unknown} unknown fields, expected {', '.join(RULES)}.")
    wrong = [f"{name}, expected {rule.expected}" for name, rule in RULES.items() if name in wishes and not rule.accepts(wishes[name])]
    if wrong:
        raise ValueError(f"mm_processor_kwargs cannot work: {'; '.join(wrong)}.")
