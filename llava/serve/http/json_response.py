"""How every body is written as JSON: UTF-8, no spaces, finite numbers, lone surrogates replaced.

starlette's `JSONResponse` fails on lone surrogates, and streams need the bytes without a response.
"""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)  # `json.dumps` would create one per call


def compact_json(value: Any) -> bytes:
    """JSON without spaces.

    Raises:
        ValueError: it holds a number that is not finite, which JSON cannot express.
    """
    return _ENCODER.encode(value).encode("utf-8", "replace")


class JsonResponse(Response):
    """A response with plain values as JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return compact_json(content)
