"""The middleware of every service: request ids, errors, API keys, foreign web pages, limits on requests and bodies.

Pure ASGI, one class per rule, stacked in `guard_app`: a request gets an id, presents its key, is refused if the server is full, and only
then is its body read, within `llava.serve.http.body_limits`. Whatever is raised inside becomes an error of `llava.serve.protocol.FAULTS`;
the details stay in the log, under the request's id.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava.serve.http.asgi import abort_connection, header_of
from llava.serve.http.body_limits import BodyLimits, LimitBodies
from llava.serve.http.errors import ErrorFormat, FieldError, error_body, error_response, typed_error
from llava.serve.http.keys import KeySet
from llava.serve.http.origins import is_allowed_origin
from llava.serve.http.request_limiter import RequestLimiter
from llava.serve.protocol import ErrorKind, Limits, ServeError

logger = logging.getLogger(__name__)

MAX_HEADER_BYTES = 16_384
"""Maximum size of a request's target and headers together."""

SMALL_BODY_BYTES = 65_536
"""Maximum size of a body on `small_paths`."""
SMALL_BODIES = 64
"""Bodies of that size that are held at once, all clients together."""
SMALL_UPLOADS = 16
"""Those that one client may be uploading at once."""

_SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class HeadAsGet:
    """Answers HEAD like GET, for supervisors and proxies: FastAPI's `get` does not; the server omits the body."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_head = scope["type"] == "http" and scope["method"] == "HEAD"
        await self.app({**scope, "method": "GET"} if is_head else scope, receive, send)


class RequestIds:
    """Gives each request an id, logs it, and turns whatever is raised inside into an error response.

    starlette's exception handlers run inside all middleware, so that they miss what middleware raises. A client's own `X-Request-Id` is
    kept where it is short and plain; every response has the id.

    Args:
        on_error: called with each error's kind.
        error_bodies: by path, where an error's body is not `error_body`.
    """

    def __init__(
        self, app: ASGIApp, on_error: Callable[[ErrorKind], None] = lambda kind: None, error_bodies: Mapping[str, ErrorFormat] | None = None
    ) -> None:
        self.app, self.on_error, self.error_bodies = app, on_error, error_bodies or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = header_of(scope, b"x-request-id")
        request_id = given if given is not None and _SAFE_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {}).update(request_id=request_id, error_body=self.error_bodies.get(scope["path"], error_body))
        status, start = 0, time.perf_counter()
        extra = [(b"x-request-id", request_id.encode()), *_SECURITY_HEADERS, *(_CLOSING if _is_framed_twice(scope) else ())]

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *extra]
            await send(message)

        try:
            _check_head(scope)
            await self.app(scope, receive, named)
        except Exception as raised:
            error = typed_error(raised, request_id)
            self.on_error(error.kind)
            if status:  # too late for an error response: end so that no client takes this one for complete
                abort_connection(scope)
                await asyncio.sleep(0)
            else:
                await error_response(error, scope)(scope, receive, named)
        finally:
            took = 1000 * (time.perf_counter() - start)
            logger.info("%s %r %d in %.0f ms, request %s", scope["method"], scope["path"][:200], status, took, request_id)


class JsonNotFound:
    """Answers 404 with the API's error body and a request id where a program asks a page's server for something it does not have.

    Browsers, which accept HTML where a person reads the answer, get the page's own.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app, self._refuse = app, RequestIds(_nothing_here)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or "text/html" in (header_of(scope, b"accept") or ""):
            await self.app(scope, receive, send)
            return
        is_missing = False

        async def unless_missing(message: Message) -> None:
            nonlocal is_missing
            if message["type"] == "http.response.start":
                is_missing = message["status"] == 404
            if not is_missing:
                await send(message)

        await self.app(scope, receive, unless_missing)
        if is_missing:
            await self._refuse(scope, receive, send)


async def _nothing_here(scope: Scope, receive: Receive, send: Send) -> None:
    raise ServeError(ErrorKind.NOT_FOUND)


def _check_head(scope: Scope) -> None:
    """Limit the headers: h11's own limit holds for incomplete ones only, not for those that arrive in one piece."""
    size = len(scope["raw_path"]) + len(scope["query_string"]) + sum(len(name) + len(value) + 4 for name, value in scope["headers"])
    if size > MAX_HEADER_BYTES:
        raise ServeError(ErrorKind.TOO_LARGE)
    if _is_framed_twice(scope):
        raise FieldError("The request has a Content-Length and a Transfer-Encoding; send one of the two.")


def _is_framed_twice(scope: Scope) -> bool:
    """Whether a proxy before us may see this request end elsewhere than we do (request smuggling)."""
    return {b"content-length", b"transfer-encoding"} <= {name for name, _ in scope["headers"]}


_CLOSING = ((b"connection", b"close"),)
_SECURITY_HEADERS = ((b"x-content-type-options", b"nosniff"),)
_FOREIGN_ORIGIN = (
    "Web pages of other sites may not call this server without an API key; the operator sets one, or adds the site with "
    "--allowed-origins."
)


class RequireApiKey:
    """Requires an API key on all but the open paths; where there are no keys, refuses web pages of other sites.

    A site whose name is pointed at this machine (DNS rebinding) calls through the browser of somebody who can reach this server.

    Args:
        origins: of other sites whose pages may call without a key.
        open_paths: exact paths. open_prefixes: paths that start with one of these, up to a slash.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: KeySet,
        origins: Collection[str] = (),
        open_paths: Sequence[str] = (),
        open_prefixes: Sequence[str] = (),
    ) -> None:
        self.app, self.keys, self.origins = app, keys, frozenset(origins)
        self.open_paths = frozenset(open_paths)
        self.open_prefixes = tuple(prefix.rstrip("/") + "/" for prefix in open_prefixes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._is_open(scope["path"]):
            if self.keys:
                number = self.keys.find(header_of(scope, b"authorization"))
                if number is None:
                    raise ServeError(ErrorKind.UNAUTHORIZED)
                scope.setdefault("state", {})["api_key"] = number
            elif not is_allowed_origin(header_of(scope, b"origin"), self.origins):
                raise ServeError(ErrorKind.FORBIDDEN, _FOREIGN_ORIGIN)
        await self.app(scope, receive, send)

    def _is_open(self, path: str) -> bool:
        return path in self.open_paths or f"{path}/".startswith(self.open_prefixes)


class LimitRequests:
    """Counts each generating request as in flight, from when its body has arrived to the end of its answer.

    A full server refuses before the body is read. But a body in transit does not count: otherwise a handful of slow clients would lock out
    everybody else. `LimitBodies` bounds those.

    Args:
        paths: the generating ones.
    """

    def __init__(self, app: ASGIApp, limiter: RequestLimiter, paths: Sequence[str]) -> None:
        self.app, self.limiter, self.paths = app, limiter, frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in self.paths:
            await self.app(scope, receive, send)
            return
        self.limiter.check()
        with ExitStack() as held:
            has_arrived = False

            async def arriving() -> Message:
                nonlocal has_arrived
                message = await receive()
                if not has_arrived and message["type"] == "http.request" and not message.get("more_body", False):
                    has_arrived = True
                    held.enter_context(self.limiter.admit())
                return message

            await self.app(scope, arriving, send)


def guard_app(
    app: FastAPI,
    limiter: RequestLimiter,
    limits: Limits,
    *,
    api_keys: Sequence[str] = (),
    allowed_origins: Sequence[str] = (),
    generating_paths: Sequence[str] = (),
    small_paths: Sequence[str] = (),
    open_paths: Sequence[str] = (),
    open_prefixes: Sequence[str] = (),
    on_error: Callable[[ErrorKind], None] = lambda kind: None,
    error_bodies: Mapping[str, ErrorFormat] | None = None,
) -> None:
    """Wrap an app in all of this file's middleware; `app.state.drain` is for the `DrainingServer` that runs it.

    Args:
        allowed_origins: of web sites whose pages may read responses, see `flag_checks.check_origins`.
        open_paths, open_prefixes: see `RequireApiKey`. on_error, error_bodies: see `RequestIds`.
        generating_paths: count as in flight. small_paths: open paths whose bodies are small and have a budget of their own.
    """
    app.state.limiter, app.state.drain = limiter, limiter.finish
    app.router.redirect_slashes = False  # they would lead to whatever name the Host header has
    small = BodyLimits(
        RequestLimiter(0, SMALL_BODIES * SMALL_BODY_BYTES),
        SMALL_BODY_BYTES,
        seconds=limits.body_seconds,
        rate=limits.body_rate,
        client_bytes=SMALL_UPLOADS * SMALL_BODY_BYTES,
        client_uploads=SMALL_UPLOADS,
        unmetered_bytes=0,
    )
    app.add_middleware(HeadAsGet)
    app.add_middleware(LimitBodies, limits=BodyLimits.of(limits, limiter), small=small, small_paths=small_paths)
    app.add_middleware(LimitRequests, limiter=limiter, paths=generating_paths)
    app.add_middleware(RequireApiKey, keys=KeySet(api_keys), origins=allowed_origins, open_paths=open_paths, open_prefixes=open_prefixes)
    app.add_middleware(RequestIds, on_error=on_error, error_bodies=error_bodies)
    if allowed_origins:  # outermost: a preflight has no key, and browsers read errors only with these headers
        app.add_middleware(
            CORSMiddleware,
            allow_origins=allowed_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),  # SDKs send headers of their own beside Authorization
            expose_headers=("X-Request-Id", "Retry-After"),
        )

    async def refuse(request: Request, raised: Exception) -> Response:
        assert isinstance(raised, HTTPException)
        if raised.status_code == 404:
            raise ServeError(ErrorKind.NOT_FOUND)
        on_error(ErrorKind.INVALID_REQUEST)
        error = ServeError(ErrorKind.INVALID_REQUEST, "This path does not support that method.")
        return error_response(error, request.scope, raised.status_code, dict(raised.headers or {}))

    app.add_exception_handler(HTTPException, refuse)
