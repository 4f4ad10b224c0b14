"""What clients are told when a worker refuses: words that the controller can answer for, whatever the worker wrote.

Whoever has the worker token may register a worker, and its answers are its own. But an error speaks in the service's name: a worker that
lies could send clients to another site, ask for their keys, or repeat what others have asked. So of a worker's error the controller takes
the kind, by its code, the field that is to blame, where it is one of the request's, and the least value of it, a number; what is wrong with
it the controller finds out for itself, from the same description of the request that the worker reads. The worker's own words are in its
log, under the request's id.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from llava.rules import Integer
from llava.serve.errors import FieldError
from llava.serve.openai_api import validate
from llava.serve.protocol import ErrorKind, ServeError
from llava.serve.strict_json import parse_json

_KINDS: dict[Any, ErrorKind] = {kind.value: kind for kind in ErrorKind} | {kind.fault.code: kind for kind in ErrorKind}
"""By OpenAI's `code` and by LLaVA's `error_code`."""
_BY_STATUS = {
    400: ErrorKind.INVALID_REQUEST,
    404: ErrorKind.MODEL_NOT_FOUND,
    413: ErrorKind.TOO_LARGE,
    422: ErrorKind.INVALID_REQUEST,
    429: ErrorKind.OVERLOADED,
    503: ErrorKind.OVERLOADED,
}
"""What a refusal of a server that is not ours means, whose codes are its own."""
_MAX_PARAM = 200
_COUNT = Integer(1, 10**9)
_PATH = re.compile(r"[A-Za-z_]\w*(\[\d{1,4}\]|\.\w+)*", re.ASCII)


def told_kind(told: dict[str, Any], status: int | None = None) -> ErrorKind:
    """The kind of a worker's error; where its code is none of ours, by the status, else `BACKEND_FAILED`."""
    error = told.get("error")
    codes = (error.get("code") if isinstance(error, dict) else None, told.get("error_code"))
    found = next((_KINDS[code] for code in codes if isinstance(code, str | int) and code in _KINDS), None)
    return found or _BY_STATUS.get(status or 0, ErrorKind.BACKEND_FAILED)


def own_words(kind: ErrorKind, told: dict[str, Any], schema: type[BaseModel] | None, body: bytes) -> ServeError:
    """A worker's refusal in the controller's words.

    Args:
        told: the worker's answer. schema: of the request's body, where the controller knows it. body: the request.
    """
    if schema is None:
        return ServeError(kind)
    if kind is ErrorKind.INVALID_REQUEST:
        try:
            validate(schema, parse_json(body))
        except FieldError as found:
            return found
    error: Any = told.get("error")
    param = error.get("param") if isinstance(error, dict) else None
    if not isinstance(param, str) or not _is_field(param, schema):
        return ServeError(kind)
    if kind is not ErrorKind.INVALID_REQUEST:
        return ServeError(kind, None, param)
    if _COUNT.accepts(least := error.get("least")):
        return ServeError(kind, f"{param} is too small here; the smallest value that would do is {least}.", param, least)
    return ServeError(kind, f"The worker refuses {param}; its log has the reason under this request id.", param)


def _is_field(param: str, schema: type[BaseModel]) -> bool:
    """Whether a path is made of names that stand in the description of the request, and of numbers."""
    if len(param) > _MAX_PARAM or not _PATH.fullmatch(param):
        return False
    words = re.findall(r"\w+", param)
    return words[0] in schema.model_fields and all(word.isdigit() or word in _names(schema) for word in words)


@functools.cache
def _names(schema: type[BaseModel]) -> frozenset[str]:
    return frozenset(_names_in(schema.model_json_schema()))


def _names_in(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        properties = value.get("properties")
        yield from properties if isinstance(properties, dict) else ()
        for each in value.values():
            yield from _names_in(each)
    elif isinstance(value, list):
        for each in value:
            yield from _names_in(each)
