"""What the page's server answers at all, and the headers it sends.

Gradio serves more than this page uses: a proxy, components' own routes, remote files named in a request. Here is a closed list of paths
and methods; nothing is taken from other sites' pages; requests are small (images come in through `uploads.py` alone), name no remote file
and call an event that the page has, all of which Gradio itself would answer with an internal error; and the browser is told to load nothing
from anywhere else.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Collection, Mapping
from typing import Any
from urllib.parse import unquote

from starlette.datastructures import MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava.serve.http.asgi import abort_connection
from llava.serve.http.body_limits import BodyLimits, LimitBodies
from llava.serve.http.errors import plain_error
from llava.serve.http.origins import is_own_page
from llava.serve.http.request_limiter import RequestLimiter
from llava.serve.http.watchdog import with_send_timeout
from llava.serve.page.uploads import upload_limits
from llava.serve.protocol import Limits, ServeError

logger = logging.getLogger(__name__)

MAX_JSON_BYTES = 1_000_000
"""Largest request besides an upload: a question and settings."""
HELD_BODIES = 64
"""How many of that size are held at once, all visitors together."""
MAX_DEPTH = 40
"""Deepest nesting of such a request."""

MAX_NAME = 200
"""Longest part of a path; file systems refuse more than 255."""

_PLAIN = r"(?:|config|info|theme\.css|robots\.txt|favicon\.ico|manifest\.json|(?:static|assets|svelte)/.+)"
_GET_API = r"(?:info|config|queue/data|queue/status|heartbeat/[\w-]+|startup-events|app_id|upload_progress|call/\w+/\w+|theme\.css|file=.+)"
_GET = re.compile(rf"/(?:{_PLAIN}|gradio_api/{_GET_API})")
_CALL = re.compile(r"/gradio_api/(?:queue/join|(?P<way>run|call)/(?P<name>[\w-]+))/?")
_POST = re.compile(rf"{_CALL.pattern}|/gradio_api/(?:cancel|reset|upload)/?")
_REMOTE = re.compile(r"\s*[a-z][a-z0-9+.-]*:", re.IGNORECASE)

_FOREIGN_PAGE = "Pages of other sites may not ask here; the operator adds this page's own names with --allow-host."
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors {ancestors}"
)


class PageGuard:
    """ASGI middleware around the page.

    Args:
        events: the page's events, by number and by name, with the number of their inputs.
        embed: let other sites show the page in a frame.
        names: of this server, in lower case; pages under these may post, besides those that `is_own_page` knows.
        body_seconds: that a request or an upload may bring nothing.
        send_seconds: that a browser may take to read one piece of an answer before it is taken for gone.
    """

    def __init__(
        self,
        app: ASGIApp,
        events: Mapping[int | str, int],
        embed: bool = False,
        names: Collection[str] = (),
        body_seconds: float = Limits.body_seconds,
        send_seconds: float = Limits.send_seconds,
    ) -> None:
        self.app, self.events, self.names, self.send_seconds = app, events, frozenset(names), send_seconds
        bounds = BodyLimits(RequestLimiter(0, HELD_BODIES * MAX_JSON_BYTES), MAX_JSON_BYTES, seconds=body_seconds)
        self._bounded_post = LimitBodies(self._post, bounds)
        self._bounded_upload = LimitBodies(self.app, upload_limits(body_seconds))
        self.headers = {
            "Content-Security-Policy": _POLICY.format(ancestors="*" if embed else "'self'"),
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # the page has no websockets; the server closes the connection
        try:
            with with_send_timeout(send, self.send_seconds) as sending:
                await self._answer(scope, receive, self._with_headers(_giving_up(sending)))
        except _NotReading:
            logger.info("%r was not read and is given up", scope["path"][:200])
            abort_connection(scope)
            await asyncio.sleep(0)  # in which the connection is lost

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not _is_open(scope):
            await PlainTextResponse("There is nothing at this address.", 404)(scope, receive, send)
        elif scope["method"] == "POST" and not is_own_page(scope, self.names):
            await PlainTextResponse(_FOREIGN_PAGE, 403)(scope, receive, send)
        elif scope["method"] == "POST":
            is_upload = scope["path"].startswith("/gradio_api/upload")
            try:
                await (self._bounded_upload if is_upload else self._bounded_post)(scope, receive, send)
            except ServeError as error:  # raised by the head or while the body was read: no answer has begun
                await plain_error(error)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _post(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _read_body(receive)
        if body is None:
            return  # the browser has gone
        if not _is_clean(body):
            await PlainTextResponse("The request is not JSON, or names a file that was not uploaded here.", 400)(scope, receive, send)
        elif (call := _CALL.fullmatch(scope["path"])) and not self._is_event(call, json.loads(body or b"null")):
            await PlainTextResponse("The request calls no event of this page, or not in its form.", 400)(scope, receive, send)
        else:
            await self.app(scope, _replay(body, receive), send)

    def _is_event(self, call: re.Match[str], asked: Any) -> bool:
        if not isinstance(asked, dict):
            return False
        event: Any = asked.get("fn_index") if call["name"] in (None, "predict") else call["name"]
        if type(event) not in (int, str) or event not in self.events:
            return False
        if call["way"] != "run":
            return True  # what is wrong with its data is reported where its answer is awaited
        data, session = asked.get("data"), asked.get("session_hash")
        return isinstance(data, list) and len(data) == self.events[event] and isinstance(session, str) and session != ""

    def _with_headers(self, send: Send) -> Send:
        async def wrapped(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self.headers.items():
                    headers[name] = value
            await send(message)

        return wrapped


class _NotReading(Exception):
    """The browser does not read what it is sent."""


def _giving_up(sending: Send) -> Send:
    """A patient `send` whose end nobody on the way takes for an answer's fault."""

    async def giving_up(message: Message) -> None:
        try:
            await sending(message)
        except ServeError as error:
            raise _NotReading from error

    return giving_up


def _is_open(scope: Scope) -> bool:
    path, method = scope["path"], scope["method"]
    if any(len(part) > MAX_NAME for part in path.split("/")):
        return False
    if method == "POST":
        return _POST.fullmatch(path) is not None
    if method not in ("GET", "HEAD") or _GET.fullmatch(path) is None:
        return False
    _, is_file, name = path.partition("/file=")
    return not is_file or _REMOTE.match(unquote(name)) is None


async def _read_body(receive: Receive) -> bytes | None:
    body = b""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        if not message.get("more_body"):
            return body


def _is_clean(body: bytes) -> bool:
    try:
        return not body or _names_no_remote_file(json.loads(body), MAX_DEPTH)
    except (ValueError, RecursionError):
        return False


def _names_no_remote_file(value: Any, depth: int) -> bool:
    """Whether no file in a request is a web address: Gradio would fetch it."""
    if depth == 0:
        return False
    if isinstance(value, dict):
        path = value.get("path")
        if isinstance(path, str) and _REMOTE.match(path):
            return False
        return all(_names_no_remote_file(each, depth - 1) for each in value.values())
    if isinstance(value, list):
        return all(_names_no_remote_file(each, depth - 1) for each in value)
    return True


def _replay(body: bytes, receive: Receive) -> Receive:
    sent = False

    async def replayed() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
