"""Calls from one server to another: to addresses already checked, without redirects, with limits on size and time.

The other side is not trusted: a body may be endless, never arrive, break off or be a compression bomb. A failed call says whether the
request was sent, because that decides whether it may be sent to another server.
"""

from __future__ import annotations

import functools
import json
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, cast

import anyio
import httpx
from httpx_sse import ServerSentEvent

from llava.serve.http.addresses import Endpoint
from llava.serve.http.sse import server_sent_events
from llava.serve.http.watchdog import Watchdog

MAX_FRAME_BYTES = 4_000_000
"""Maximum size of an event or a frame of a stream."""


class Unreachable(Exception):
    """No connection was made, so the request was not sent."""


class BrokenResponse(Exception):
    """The other side ended early, timed out, sent too much or violated HTTP."""


@dataclass(frozen=True)
class Timeouts:
    """Seconds: to connect; until the response's headers; between two reads of its body; and in total."""

    connect: float = 3.0
    headers: float = 600.0
    read: float = 120.0
    total: float = 3600.0


class Reply:
    """The headers of a response, and its body as it arrives."""

    def __init__(self, response: httpx.Response, timeouts: Timeouts, max_bytes: int, ends_at: float) -> None:
        self.status = response.status_code
        self.content_type = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        self.retry_after = response.headers.get("retry-after")
        self._response = response
        self._timeouts, self._max_bytes, self._ends_at = timeouts, max_bytes, ends_at

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body's bytes.

        Raises:
            BrokenResponse: it ended early, was too slow, too long or compressed.
        """
        if self._response.headers.get("content-encoding", "identity").lower() != "identity":
            raise BrokenResponse("the body is compressed although that was not requested")
        parts = self._response.aiter_raw()
        seen = 0
        with Watchdog() as watchdog:
            while True:
                seconds = min(self._timeouts.read, self._ends_at - anyio.current_time())
                try:
                    chunk = await watchdog.wait(anext(parts, b""), seconds)
                except TimeoutError as error:
                    raise BrokenResponse(f"no data for {seconds:.0f} seconds") from error
                except (httpx.HTTPError, httpx.StreamError, ssl.SSLError, OSError) as error:
                    raise BrokenResponse(f"the body broke off: {type(error).__name__}") from error
                if not chunk:
                    return
                seen += len(chunk)
                if seen > self._max_bytes:
                    raise BrokenResponse(f"the body is longer than {self._max_bytes:,} bytes")
                yield chunk

    async def body(self) -> bytes:
        """The whole body; raises as `chunks`."""
        return b"".join([chunk async for chunk in self.chunks()])

    async def json(self) -> Any:
        """The body as JSON.

        Raises:
            BrokenResponse: as `chunks`, or it is not JSON.
        """
        data = await self.body()
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise BrokenResponse("the body is not JSON") from error

    async def frames(self, delimiter: bytes) -> AsyncIterator[bytes]:
        """The body, split at a delimiter; what follows the last one too, unless it is empty.

        Raises:
            BrokenResponse: as `chunks`, or a frame is too long.
        """
        rest = b""
        async for chunk in self.chunks():
            *whole, rest = (rest + chunk).split(delimiter)
            for frame in whole:
                yield frame
            if len(rest) > MAX_FRAME_BYTES:
                raise BrokenResponse(f"a frame is longer than {MAX_FRAME_BYTES:,} bytes")
        if rest.strip():
            yield rest

    async def events(self) -> AsyncIterator[ServerSentEvent]:
        """The body's server-sent events that hold data.

        Raises:
            BrokenResponse: as `chunks`, or an event is too long or not UTF-8.
        """
        try:
            async for event in server_sent_events(self.chunks(), MAX_FRAME_BYTES):
                yield event
        except ValueError as error:
            raise BrokenResponse(f"the stream cannot be read: {error}") from error


@functools.cache
def _certificates() -> ssl.SSLContext:
    """The trusted certificates; loading them takes longer than many a call."""
    return httpx.create_ssl_context(trust_env=False)


class BoundedClient:
    """Calls other servers over one pool of connections.

    Args:
        transport: the network by default. Proxies from the environment are not used: another machine would resolve the names.
        max_connections: at once.
    """

    def __init__(self, transport: httpx.AsyncBaseTransport | None = None, max_connections: int = 1024) -> None:
        limits = httpx.Limits(max_connections=max_connections, max_keepalive_connections=32, keepalive_expiry=5.0)
        self._client = httpx.AsyncClient(
            transport=transport or httpx.AsyncHTTPTransport(verify=_certificates(), trust_env=False, limits=limits),
            trust_env=False,
            follow_redirects=False,
        )

    async def close(self) -> None:
        await self._client.aclose()

    @asynccontextmanager
    async def call(
        self,
        method: str,
        target: Endpoint,
        path: str,
        *,
        timeouts: Timeouts,
        max_bytes: int,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncIterator[Reply]:
        """Send a request and yield its response; leaving the block closes the connection unless the body was read to its end.

        Raises:
            Unreachable: no address of the target accepts connections. BrokenResponse: no response headers, or a redirect.
        """
        ends_at = anyio.current_time() + timeouts.total
        response = await self._first_response(method, target, path, timeouts, content, headers or {})
        try:
            if 300 <= response.status_code < 400:
                raise BrokenResponse(f"it answered with a redirect ({response.status_code}), which is not followed")
            yield Reply(response, timeouts, max_bytes, ends_at)
        finally:
            with anyio.move_on_after(2, shield=True):  # the caller may be cancelled already; the connection still has to be closed
                await response.aclose()

    async def _first_response(
        self, method: str, target: Endpoint, path: str, timeouts: Timeouts, content: bytes | None, headers: Mapping[str, str]
    ) -> httpx.Response:
        problem: Exception | None = None
        for address in target.addresses:
            request = self._client.build_request(
                method,
                target.base(address) + path,
                content=content,
                headers={**headers, "Host": target.url.authority, "Accept-Encoding": "identity"},
                # httpx's read timeout is per read; the scope below covers all headers
                timeout=httpx.Timeout(None, connect=timeouts.connect, pool=timeouts.connect, write=timeouts.read),
                extensions={"sni_hostname": target.url.host},
            )
            try:
                with anyio.fail_after(timeouts.headers):
                    return await self._client.send(request, stream=True)
            except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
                problem = error
            except TimeoutError as error:
                raise BrokenResponse(f"no response within {timeouts.headers:.0f} seconds") from error
            except (httpx.HTTPError, ssl.SSLError, OSError) as error:
                raise BrokenResponse(f"the connection broke before the response: {type(error).__name__}") from error
        raise Unreachable("no connection to any of its addresses") from problem


async def first_bytes(chunks: AsyncIterator[bytes], most: int) -> bytes:
    """The beginning of a body, at most `most` bytes, or as much of it as came before it broke off; the rest is not read."""
    body = b""
    with suppress(BrokenResponse, httpx.HTTPError):
        async for chunk in chunks:
            body += chunk
            if len(body) > most:
                break
    return body[:most]


def parse_json_object(text: str | bytes) -> dict[str, Any] | None:
    """A JSON object, or `None` where the text is anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None
