"""What stands before the endpoints of every service: other sites' pages, request ids, errors, keys, admission, and bounds on bodies.

Pure ASGI, one class per rule, outermost first in `guard_app`: a request gets an id, shows its key, is told if there is no place, and only
then is its body read, within the bounds of `llava.serve.http.body_limits`. Whatever goes wrong inside becomes one of
`llava.serve.protocol.FAULTS`; the details stay in the log, under the request's id.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import TypeVar
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava.fetch import literal_address
from llava.serve.http.asgi import abort_connection, header_of
from llava.serve.http.body_limits import BodyBounds, BoundedBodies
from llava.serve.http.errors import ErrorFormat, FieldError, error_body, error_response, typed_error
from llava.serve.http.keys import KeySet
from llava.serve.http.request_limiter import RequestLimiter
from llava.serve.protocol import ErrorKind, Limits, ServeError

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_HEADER_BYTES = 16_384
"""Address and headers of a request together."""

SMALL_BODY_BYTES = 65_536
"""Largest body of a path that only small ones are sent to."""
SMALL_BODIES = 64
"""How many of that size are held at once, all clients together."""
SMALL_UPLOADS = 16
"""How many of them one client may be sending at once."""

_SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_UNKNOWN_HOST = "This server is not known under the name that the request asks for; its operator adds names with --allow-host."


def is_own_page(scope: Scope, names: Collection[str]) -> bool:
    """Whether a request comes from no web page, or from one of this server: by its Origin, which browsers send with every POST.

    A server's own pages are those under the name that the request itself asks for, under an address or localhost, and under one of
    `names`, in lower case. A page without a name of its own (`null`) is nobody's.
    """
    origin = header_of(scope, b"origin")
    if origin is None:
        return True
    try:
        page, asked = urlsplit(origin).hostname or "", urlsplit(f"//{header_of(scope, b'host') or ''}").hostname or ""
    except ValueError:
        return False
    return page != "" and (page == asked or _is_fixed(page) or page.rstrip(".") in names)


def _is_fixed(host: str) -> bool:
    """Whether nobody else can point this name or address at another machine, or at this one."""
    host = host.rstrip(".")
    return host == "localhost" or host.endswith(".localhost") or literal_address(host) is not None


class HostNames:
    """Answers only requests whose Host header is an address, localhost or one of the names given.

    A page of a site whose name was pointed at this machine (DNS rebinding) is to the browser one and the same site as this server; all
    that tells the two apart is that name.

    Args:
        names: in lower case.
    """

    def __init__(self, app: ASGIApp, names: Collection[str]) -> None:
        self.app, self.names = app, frozenset(names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_known(header_of(scope, b"host") or ""):
            await self.app(scope, receive, send)
        else:
            await PlainTextResponse(_UNKNOWN_HOST, 403)(scope, receive, send)

    def _is_known(self, header: str) -> bool:
        try:
            host = urlsplit(f"//{header}").hostname or ""
        except ValueError:
            return False
        return _is_fixed(host) or host.rstrip(".") in self.names


class HeadAsGet:
    """Answers HEAD as GET, which supervisors and proxies ask with; the server itself leaves the body away."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_head = scope["type"] == "http" and scope["method"] == "HEAD"
        await self.app({**scope, "method": "GET"} if is_head else scope, receive, send)


class RequestIds:
    """Names each request, logs it, and turns whatever is raised inside into an error body.

    A client's own `X-Request-Id` is kept where it is short and plain; every response carries the id.

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
        extra = [(b"x-request-id", request_id.encode()), *_SAFETY_HEADERS, *(_CLOSING if _is_framed_twice(scope) else ())]

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
            if status:  # too late for another answer: an ending that no client takes for a whole one
                abort_connection(scope)
                await asyncio.sleep(0)
            else:
                await error_response(error, scope)(scope, receive, named)
        finally:
            took = 1000 * (time.perf_counter() - start)
            logger.info("%s %r %d in %.0f ms, request %s", scope["method"], scope["path"][:200], status, took, request_id)


class TypedNotFound:
    """Tells programs that ask a page's server for what it does not have so in the API's words, with a request's id.

    Browsers, which ask for HTML where a person reads the answer, get the page's own.
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
    """Bound the headers: the server bounds what it holds of unfinished ones, but takes longer ones that arrive in one piece."""
    size = len(scope["raw_path"]) + len(scope["query_string"]) + sum(len(name) + len(value) + 4 for name, value in scope["headers"])
    if size > MAX_HEADER_BYTES:
        raise ServeError(ErrorKind.TOO_LARGE)
    if _is_framed_twice(scope):
        raise FieldError("The request has a Content-Length and a Transfer-Encoding; send one of the two.")


def _is_framed_twice(scope: Scope) -> bool:
    """Whether a proxy before us may see this request end elsewhere than we do, and take our answers for those to other people."""
    return {b"content-length", b"transfer-encoding"} <= {name for name, _ in scope["headers"]}


_CLOSING = ((b"connection", b"close"),)
_SAFETY_HEADERS = ((b"x-content-type-options", b"nosniff"),)


_FOREIGN_PAGE = (
    "Pages of other sites may not ask here without an API key; the operator starts the server with one, or adds the site with "
    "--allowed-origins."
)


def _may_ask(origin: str | None, origins: Collection[str]) -> bool:
    """Whether a request comes from no page, from one under an address or a name of this machine alone, or from a site on the list.

    Pages without a name (`null`: a sandboxed frame, a file) and extensions are other sites like any.
    """
    if origin is None or origin in origins:
        return True
    try:
        parts = urlsplit(origin)
        return parts.scheme in ("http", "https") and _is_fixed(parts.hostname or "") and parts.port != 0  # which looks at the port, too
    except ValueError:
        return False


class RequireApiKey:
    """Lets in whoever shows a key, and everyone to the open paths; without keys everyone but the pages of other sites.

    A site whose name is made to point at this machine (DNS rebinding) speaks through the browser of somebody who may reach this server.

    Args:
        origins: of other sites whose pages may ask without a key.
        open_paths: exact paths. open_prefixes: paths that start with one of these, up to a slash.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: KeySet,
        origins: Collection[str] = (),
        open_paths: Sequence[str] = ("/health",),
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
            elif not _may_ask(header_of(scope, b"origin"), self.origins):
                raise ServeError(ErrorKind.FORBIDDEN, _FOREIGN_PAGE)
        await self.app(scope, receive, send)

    def _is_open(self, path: str) -> bool:
        return path in self.open_paths or f"{path}/".startswith(self.open_prefixes)


class LimitRequests:
    """Takes a place for each request that generates, once its body has come, and gives it back at the end.

    A full server says so before the body is read. But a body that drips in holds no place: otherwise a handful of slow clients would keep
    everybody else out. What arriving bodies take together is bounded by `BoundedBodies`.

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
            has_come = False

            async def arriving() -> Message:
                nonlocal has_come
                message = await receive()
                if not has_come and message["type"] == "http.request" and not message.get("more_body", False):
                    has_come = True
                    held.enter_context(self.limiter.places())
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
    open_paths: Sequence[str] = ("/health",),
    open_prefixes: Sequence[str] = (),
    on_error: Callable[[ErrorKind], None] = lambda kind: None,
    error_bodies: Mapping[str, ErrorFormat] | None = None,
) -> None:
    """Put all of this page's rules before an app; `app.state.drain` is for the `DrainingServer` that runs it.

    Args:
        allowed_origins: of web sites whose pages may read the answers, see `flag_checks.check_origins`.
        on_error, error_bodies: see `RequestIds`.
        generating_paths: take a place of the limiter. small_paths: take small bodies, out of a budget of their own: those that are open.
    """
    app.state.limiter, app.state.drain = limiter, limiter.finish
    app.router.redirect_slashes = False  # to an address that is written with the Host header's name, whatever that is
    small = BodyBounds(
        RequestLimiter(0, SMALL_BODIES * SMALL_BODY_BYTES),
        SMALL_BODY_BYTES,
        seconds=limits.body_seconds,
        rate=limits.body_rate,
        client_bytes=SMALL_UPLOADS * SMALL_BODY_BYTES,
        client_uploads=SMALL_UPLOADS,
        free_bytes=0,
    )
    app.add_middleware(HeadAsGet)
    app.add_middleware(BoundedBodies, bounds=BodyBounds.of(limits, limiter), small=small, small_paths=small_paths)
    app.add_middleware(LimitRequests, limiter=limiter, paths=generating_paths)
    app.add_middleware(RequireApiKey, keys=KeySet(api_keys), origins=allowed_origins, open_paths=open_paths, open_prefixes=open_prefixes)
    app.add_middleware(RequestIds, on_error=on_error, error_bodies=error_bodies)
    if allowed_origins:  # outermost: a preflight has no key, and browsers read errors too only where these headers stand
        app.add_middleware(
            CORSMiddleware,
            allow_origins=allowed_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),  # clients' packages send headers of their own beside Authorization
            expose_headers=("X-Request-Id", "Retry-After"),
        )

    async def refuse(request: Request, raised: Exception) -> Response:
        assert isinstance(raised, HTTPException)
        if raised.status_code == 404:
            raise ServeError(ErrorKind.NOT_FOUND)
        on_error(ErrorKind.INVALID_REQUEST)
        error = ServeError(ErrorKind.INVALID_REQUEST, "This address does not answer to that method.")
        return error_response(error, request.scope, raised.status_code, dict(raised.headers or {}))

    app.add_exception_handler(HTTPException, refuse)


async def wait_for_disconnect(receive: Receive) -> None:
    """Return when the client is gone; call after the body was read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def cancel_on_disconnect(receive: Receive, work: Awaitable[T]) -> T:
    """Await `work`, but cancel it when the client goes away.

    Raises:
        ServeError: `CANCELLED`. Or what the work raises.
    """
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(wait_for_disconnect(receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ServeError(ErrorKind.CANCELLED)
        return await working
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)
