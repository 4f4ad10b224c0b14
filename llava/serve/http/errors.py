"""Errors as a client reads them: OpenAI's error body, or another format that an API hands in. Details stay in the log."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse, Response
from starlette.types import Scope

from llava.serve.http.json_response import JsonResponse
from llava.serve.protocol import ErrorKind, ServeError

logger = logging.getLogger(__name__)

ErrorFormat: TypeAlias = "Callable[[ServeError, str], dict[str, Any]]"
"""Makes a body from an error and the request's id."""


class FieldError(ServeError):
    """An error in one field of a request.

    Args:
        param: the field, as `field_path` writes it.
    """

    def __init__(self, detail: str, param: str | None = None, kind: ErrorKind = ErrorKind.INVALID_REQUEST) -> None:
        super().__init__(kind, detail, param)


def field_path(parts: Sequence[str | int]) -> str:
    """The path of a field as OpenAI's errors write it: `messages[0].content[1].image_url.url`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")


def request_id_of(scope: Scope) -> str:
    """The id that `RequestIds` gave this request."""
    return str(scope.get("state", {}).get("request_id", "-"))


def error_fields(error: ServeError, request_id: str) -> dict[str, Any]:
    """The value of `error` in OpenAI's error body."""
    return {
        "message": error.detail,
        "type": error.kind.fault.type,
        "param": error.param,
        "code": error.kind.value,
        "request_id": request_id,
        **({} if error.least is None else {"least": error.least}),
    }


def error_body(error: ServeError, request_id: str) -> dict[str, Any]:
    """An error in OpenAI's format."""
    return {"error": error_fields(error, request_id)}


def error_response(error: ServeError, scope: Scope, status: int | None = None, headers: dict[str, str] | None = None) -> Response:
    """An error as a response, in the format of the request's path (see `RequestIds`).

    Args:
        status: in place of the kind's own.
    """
    fault = error.kind.fault
    extra = dict(headers or {})
    if fault.retry_after is not None:
        extra.setdefault("Retry-After", str(fault.retry_after))
    if error.kind is ErrorKind.UNAUTHORIZED:
        extra["WWW-Authenticate"] = "Bearer"
    if error.kind is ErrorKind.ENCODED:
        extra["Accept-Encoding"] = "identity"
    body: ErrorFormat = scope.get("state", {}).get("error_body", error_body)
    return JsonResponse(body(error, request_id_of(scope)), status or fault.status, extra)


def plain_error(error: ServeError) -> Response:
    """An error as plain text, for requests of a page's own scripts."""
    wait = error.kind.fault.retry_after
    return PlainTextResponse(error.detail, error.kind.fault.status, {} if wait is None else {"Retry-After": str(wait)})


def typed_error(raised: Exception, request_id: str) -> ServeError:
    """Any exception as an error that a client may read; what is unexpected goes to the log."""
    if isinstance(raised, ServeError):
        logger.info("request %s failed: %s: %r", request_id, raised.kind.value, raised.detail)
        return raised
    if isinstance(raised, ClientDisconnect):
        return ServeError(ErrorKind.CANCELLED)
    logger.error("request %s failed with an internal error", request_id, exc_info=raised)
    return ServeError(ErrorKind.INTERNAL)
