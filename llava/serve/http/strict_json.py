"""Bodies of requests as JSON values, parsed strictly and within bounds."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

from fastapi import Request

from llava.serve.http.errors import FieldError

MAX_JSON_ITEMS = 300_000
"""Maximum number of commas and brackets in a body: bounds the objects that parsing creates. Images, in base64, have none of them."""
LARGE_BODY = 1_000_000
"""Bytes from which a body is parsed in a thread, so that the event loop goes on."""
MAX_JSON_DIGITS = 24
"""Maximum number of digits of an integer."""
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_ESCAPES = re.compile(r"\\(?:u(?i:d[89ab][0-9a-f]{2})\\u(?i:d[c-f][0-9a-f]{2})|(?P<half>u(?i:d[89a-f][0-9a-f]{2}))|.)", re.DOTALL)
"""One escape after the other: a surrogate pair, a lone surrogate, or any other."""


async def read_json(request: Request) -> Any:
    """The body of a request as plain JSON values.

    Raises:
        ServeError: another content type, a body beyond its limits, or as `parse_json`.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":  # also keeps web pages of other origins from posting plain forms
        raise FieldError("The Content-Type is not application/json; send JSON and declare it.")
    body = await request.body()
    return parse_json(body) if len(body) < LARGE_BODY else await asyncio.to_thread(parse_json, body)


def parse_json(body: bytes) -> Any:
    """Parse JSON strictly: UTF-8, finite numbers of bounded length, unique names, bounded size and depth.

    `json.loads` alone accepts repeated names, NaN and integers of any length. The escape of a lone surrogate, which programs write that cut
    a text inside an emoji, is read as U+FFFD.

    Raises:
        FieldError: it violates one of these; the message never quotes the body.
    """
    if sum(body.count(mark) for mark in (b",", b"[", b"{")) > MAX_JSON_ITEMS:
        raise FieldError(f"The body has more than {MAX_JSON_ITEMS} items.")
    try:
        text = body.decode("utf-8")
        if b"\\u" in body and _SURROGATE.search(text):
            text = _ESCAPES.sub(lambda found: "\\ufffd" if found["half"] else found[0], text)
        value = json.loads(text, parse_int=_whole, parse_float=_finite, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except FieldError:
        raise
    except UnicodeError as error:
        raise FieldError("The body is not UTF-8 text.") from error
    except RecursionError as error:
        raise FieldError("The body is nested too deeply.") from error
    except ValueError as error:
        raise FieldError("The body is not valid JSON.") from error
    return value


def _whole(digits: str) -> int:
    if len(digits) > MAX_JSON_DIGITS:
        raise FieldError(f"The body holds an integer of more than {MAX_JSON_DIGITS} digits.")
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        raise FieldError("The body holds a number that is too large.")
    return number


def _refuse_constant(name: str) -> Any:
    raise FieldError(f"The body holds {name}, which is not JSON.")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise FieldError("An object in the body has the same field twice.")
    return found
