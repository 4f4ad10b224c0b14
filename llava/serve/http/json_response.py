"""The one way in which bodies are written as JSON: UTF-8, no spaces, finite numbers, half characters replaced."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)  # `json.dumps` would make one per call


def compact_json(value: Any) -> bytes:
    """JSON without spaces.

    Raises:
        ValueError: it holds a number that is not finite, which JSON cannot say.
    """
    return _ENCODER.encode(value).encode("utf-8", "replace")


class JsonResponse(Response):
    """Plain values as a body."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return compact_json(content)
