"""What clients read when a worker refuses: text that the controller can vouch for, whatever the worker wrote.

Whoever has the worker token may register a worker, and what it answers is its own. But an error speaks in the service's name: a malicious
worker could send clients to another site, ask for their keys, or repeat what others have asked. So the controller takes from a worker's
error only its kind (by the code), the field it blames (if the request has such a field) and the smallest value that would do (a number).
What is wrong with the request itself the controller finds by reading it as the worker does. What only a worker can know passes if it is
one of the sentences of `llava.serve.protocol.error_templates`. Whatever else the worker wrote stays in its log, under the request's id.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from llava.rules import Integer
from llava.serve.api.endpoints import BODY_READERS, BODY_SCHEMAS
from llava.serve.api.image_loader import IMAGE_ERROR_TEXTS
from llava.serve.api.validation import validate
from llava.serve.http.strict_json import parse_json
from llava.serve.protocol import ErrorKind, Limits, ModelCard, ServeError
from llava.serve.protocol.error_templates import ERROR_TEMPLATES, matches_template

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
"""The kind of a refusal without a code of ours, from a server that is not ours."""
_MAX_PARAM = 200
_COUNT = Integer(1, 10**9)
_ANY_LENGTH = 2**63
"""No limit on new tokens: the controller does not know the worker's."""
_PATH = re.compile(r"[A-Za-z_]\w*(\[\d{1,4}\]|\.\w+)*", re.ASCII)


def error_kind(answer: dict[str, Any], status: int | None = None) -> ErrorKind:
    """The kind of the error that a worker answers with: by its code, else by the HTTP status, else `BACKEND_FAILED`."""
    error = answer.get("error")
    codes = (error.get("code") if isinstance(error, dict) else None, answer.get("error_code"))
    found = next((_KINDS[code] for code in codes if isinstance(code, str | int) and code in _KINDS), None)
    return found or _BY_STATUS.get(status or 0, ErrorKind.BACKEND_FAILED)


def client_error(kind: ErrorKind, answer: dict[str, Any], path: str, body: bytes, card: ModelCard | None = None) -> ServeError:
    """The error that a client gets for a worker's refusal.

    Args:
        kind: of the refusal. answer: the worker's. path, body: of the request. card: of the worker's model, where it is known.
    """
    if (schema := BODY_SCHEMAS.get(path)) is None:
        return ServeError(kind)
    found = _error_in_request(path, body, card)
    if found is not None and found.kind is kind:
        return found
    error: Any = answer.get("error")
    error = error if isinstance(error, dict) else {}
    param = error.get("param")
    param = param if isinstance(param, str) and _is_field(param, schema) else None
    if kind is ErrorKind.INVALID_REQUEST and param is not None and _COUNT.accepts(least := error.get("least")):
        return ServeError(kind, f"{param} is too small here; the smallest value that would do is {least}.", param, least)
    if _is_known_sentence(text := error.get("message"), param):
        return ServeError(kind, text, param)
    unnamed = kind is not ErrorKind.INVALID_REQUEST or param is None
    return ServeError(kind, None if unnamed else f"The worker refuses {param}; its log has the reason under this request id.", param)


def _error_in_request(path: str, body: bytes, card: ModelCard | None) -> ServeError | None:
    """What a worker's own reading of the request would refuse; without a card, its form alone is checked."""
    try:
        value = parse_json(body)
        if card is None:
            validate(BODY_SCHEMAS[path], value)
        else:
            BODY_READERS[path](value, card, Limits(max_images=card.max_images, max_new_tokens=_ANY_LENGTH))
    except ServeError as found:
        return found
    return None


def _is_known_sentence(text: Any, param: str | None) -> bool:
    """Whether a worker's message is a sentence of `llava.serve.protocol.error_templates`, filled in."""
    if not isinstance(text, str):
        return False
    return text in IMAGE_ERROR_TEXTS or any(matches_template(text, template, param) for template in ERROR_TEMPLATES)


def _is_field(param: str, schema: type[BaseModel]) -> bool:
    """Whether a path consists of numbers and of names in the request's schema, beginning with a field of the request."""
    if len(param) > _MAX_PARAM or not _PATH.fullmatch(param):
        return False
    parts = re.findall(r"\w+", param)
    return parts[0] in schema.model_fields and all(part.isdigit() or part in _names(schema) for part in parts)


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
