"""What clients are told when a worker refuses: words that the controller can answer for, whatever the worker wrote.

Whoever has the worker token may register a worker, and its answers are its own. But an error speaks in the service's name: a worker that
lies could send clients to another site, ask for their keys, or repeat what others have asked. So of a worker's error the controller takes
the kind, by its code, the field that is to blame, where it is one of the request's, and the least value of it, a number. What is wrong
with a request the controller finds out for itself, by reading it as the worker does; what only a worker can know it passes on where it is
one of the sentences that there are for it, `llava.serve.sentences`. Any other words of the worker are in its log, under the request's id.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from llava.rules import Integer
from llava.serve.api.endpoints import BODIES, READERS
from llava.serve.api.image_loader import IMAGE_SENTENCES
from llava.serve.api.openai_chat import validate
from llava.serve.http.strict_json import parse_json
from llava.serve.protocol import ErrorKind, Limits, ModelCard, ServeError
from llava.serve.sentences import SENTENCES, is_filled

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
_ANY_LENGTH = 2**63
"""Longest answer of a worker that the controller knows no such limit of."""
_PATH = re.compile(r"[A-Za-z_]\w*(\[\d{1,4}\]|\.\w+)*", re.ASCII)


def told_kind(told: dict[str, Any], status: int | None = None) -> ErrorKind:
    """The kind of a worker's error; where its code is none of ours, by the status, else `BACKEND_FAILED`."""
    error = told.get("error")
    codes = (error.get("code") if isinstance(error, dict) else None, told.get("error_code"))
    found = next((_KINDS[code] for code in codes if isinstance(code, str | int) and code in _KINDS), None)
    return found or _BY_STATUS.get(status or 0, ErrorKind.BACKEND_FAILED)


def own_words(kind: ErrorKind, told: dict[str, Any], path: str, body: bytes, card: ModelCard | None = None) -> ServeError:
    """A worker's refusal in words that the controller can answer for.

    Args:
        told: the worker's answer. path, body: of the request. card: of the worker's model, where it is known.
    """
    if (schema := BODIES.get(path)) is None:
        return ServeError(kind)
    found = _found_here(path, body, card)
    if found is not None and found.kind is kind:
        return found
    error: Any = told.get("error")
    error = error if isinstance(error, dict) else {}
    param = error.get("param")
    param = param if isinstance(param, str) and _is_field(param, schema) else None
    if kind is ErrorKind.INVALID_REQUEST and param is not None and _COUNT.accepts(least := error.get("least")):
        return ServeError(kind, f"{param} is too small here; the smallest value that would do is {least}.", param, least)
    if _is_ours(text := error.get("message"), param):
        return ServeError(kind, text, param)
    unnamed = kind is not ErrorKind.INVALID_REQUEST or param is None
    return ServeError(kind, None if unnamed else f"The worker refuses {param}; its log has the reason under this request id.", param)


def _found_here(path: str, body: bytes, card: ModelCard | None) -> ServeError | None:
    """What is wrong with a request, as the worker's own reading of it would find; without a card, of its form alone."""
    try:
        value = parse_json(body)
        if card is None:
            validate(BODIES[path], value)
        else:
            READERS[path](value, card, Limits(max_images=card.max_images, max_new_tokens=_ANY_LENGTH))
    except ServeError as found:
        return found
    return None


def _is_ours(text: Any, param: str | None) -> bool:
    """Whether a worker's words are a sentence of ours."""
    return isinstance(text, str) and (text in IMAGE_SENTENCES or any(is_filled(text, sentence, param) for sentence in SENTENCES))


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
