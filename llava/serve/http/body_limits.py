"""Bounds on request bodies: how large one may be, how slowly it may come, and how much of them one client may be sending at once.

A body costs memory from its first byte to the end of its answer, and a client that stops two bytes before the end costs it for nothing. So:

- A body may stall for some seconds. Every byte that arrives gives time back, at the minimum rate that an upload has to sustain, but never
  more than those seconds: a large upload over a slow line goes on for as long as it arrives, a stalled one is ended.
- Bodies that are still arriving count against a share of their client. Where the share is used up, further ones wait unread, so that
  a burst of honest uploads is only spread out; one for which no room is made in time is refused. A large body never takes the last third
  of the share, and small ones need none of it: whoever stalls large uploads does not even keep their own questions out.
- All bodies together have a budget, of which large ones leave a quarter to the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava.serve.http.asgi import Client, client_of, header_of
from llava.serve.http.request_limiter import RequestLimiter
from llava.serve.protocol import ErrorKind, Limits, ServeError

FREE_BYTES = 65_536
"""Size of a body up to which it needs no share: the server reads so much ahead anyway."""
LARGE_PART = 1 / 16
"""Of the largest body, above which one counts as large: 4 MB of 64."""
SHARE_KEPT = 1 / 3
"""Of a client's share, that its large bodies leave to its others."""
BUDGET_KEPT = 1 / 4
"""Of the budget of all bodies, that large ones leave to the others."""


class Allowance:
    """The time by which more of a body has to come.

    Args:
        seconds: that it may bring nothing. rate: bytes per second that it has to keep up. now: when it begins.
    """

    def __init__(self, seconds: float, rate: float, now: float) -> None:
        self.seconds, self.rate = seconds, rate
        self.deadline = now + seconds

    def arrived(self, count: int, now: float) -> None:
        """Give time back for so many bytes."""
        self.deadline = min(now + self.seconds, self.deadline + count / self.rate)


class Shares:
    """What each client may be sending at once.

    Args:
        max_bytes: of a client's unfinished bodies. max_uploads: their number.
    """

    def __init__(self, max_bytes: int, max_uploads: int) -> None:
        self.max_bytes, self.max_uploads = max_bytes, max_uploads
        self._sending: dict[Client, list[int]] = {}  # sizes of the unfinished bodies
        self._changed = asyncio.Event()

    def fits(self, client: Client, size: int, is_large: bool) -> bool:
        """Whether a body may begin now; one alone always may."""
        sizes = self._sending.get(client, [])
        most = self.max_bytes * (1 - SHARE_KEPT) if is_large else self.max_bytes
        return not sizes or (len(sizes) < self.max_uploads and sum(sizes) + size <= most)

    async def wait(self, client: Client, size: int, is_large: bool) -> None:
        """Return when a body may begin."""
        while not self.fits(client, size, is_large):
            await self._changed.wait()

    @contextmanager
    def sending(self, client: Client, size: int) -> Iterator[None]:
        """Count a body while it arrives."""
        sizes = self._sending.setdefault(client, [])
        sizes.append(size)
        try:
            yield
        finally:
            sizes.remove(size)
            if not sizes:
                self._sending.pop(client, None)
            self._changed.set()
            self._changed = asyncio.Event()


class BodyBounds:
    """What the bodies of one kind of request may take.

    Args:
        limiter: holds the bytes of all of them together, from when they come to the end of the answer.
        max_bytes: of one. seconds, rate: see `Allowance`.
        client_bytes, client_uploads: see `Shares`; without a number of bytes, three of the largest.
        free_bytes: a body of at most this size needs no share.
    """

    def __init__(
        self,
        limiter: RequestLimiter,
        max_bytes: int,
        *,
        seconds: float = Limits.body_seconds,
        rate: float = Limits.body_rate,
        client_bytes: int | None = None,
        client_uploads: int = Limits.client_uploads,
        free_bytes: int = FREE_BYTES,
    ) -> None:
        self.limiter, self.max_bytes, self.seconds, self.rate, self.free_bytes = limiter, max_bytes, seconds, rate, free_bytes
        self.shares = Shares(Limits.client_bodies * max_bytes if client_bytes is None else client_bytes, client_uploads)

    @classmethod
    def of(cls, limits: Limits, limiter: RequestLimiter) -> BodyBounds:
        """The bounds that a service's limits ask for."""
        return cls(
            limiter,
            limits.max_body_bytes,
            seconds=limits.body_seconds,
            rate=limits.body_rate,
            client_bytes=limits.client_bodies * limits.max_body_bytes,
            client_uploads=limits.client_uploads,
        )

    def is_large(self, size: int) -> bool:
        return size > max(self.free_bytes, LARGE_PART * self.max_bytes)


class BoundedBodies:
    """Bounds how large a body may be and how it has to arrive, by the request's head and again while it is read.

    Args:
        bounds: of all paths but those of `small`. small, small_paths: the bounds of some paths, whose bodies have a budget of their own.
    """

    def __init__(self, app: ASGIApp, bounds: BodyBounds, small: BodyBounds | None = None, small_paths: Collection[str] = ()) -> None:
        self.app, self.bounds, self.small, self.small_paths = app, bounds, small, frozenset(small_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        bounds = self.small if self.small is not None and scope["path"] in self.small_paths else self.bounds
        with _Arriving(bounds, client_of(scope), _size_of(scope, bounds.max_bytes), receive) as body:
            await self.app(scope, body.next, send)


def _size_of(scope: Scope, max_bytes: int) -> int:
    """The size of a body by the request's head; the largest one where it comes in chunks.

    Raises:
        ServeError: the head alone says that the body is too large, or that it is compressed.
    """
    encoding = header_of(scope, b"content-encoding")
    if encoding is not None and encoding.strip().lower() not in ("", "identity"):
        raise ServeError(ErrorKind.ENCODED)
    declared = header_of(scope, b"content-length")
    if declared is None:
        return 0 if header_of(scope, b"transfer-encoding") is None else max_bytes
    if not declared.isdecimal() or len(declared) > 18 or int(declared) > max_bytes:
        raise ServeError(ErrorKind.TOO_LARGE)
    return int(declared)


class _Arriving:
    """One body: its share while it arrives, and its bytes until the `with` block ends."""

    def __init__(self, bounds: BodyBounds, client: Client, size: int, receive: Receive) -> None:
        self.bounds, self.client, self.size, self.receive = bounds, client, size, receive
        self.kept = int(BUDGET_KEPT * bounds.limiter.held_bytes) if bounds.is_large(size) else 0
        self.arrived, self.complete = 0, False
        self.allowance: Allowance | None = None
        self.share = ExitStack()

    def __enter__(self) -> _Arriving:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.share.close()
        self.bounds.limiter.give_bytes(self.arrived)

    async def next(self) -> Message:
        """The app's `receive`.

        Raises:
            ServeError: `TIMEOUT`, `TOO_LARGE`, or `OVERLOADED` where there is no room for it.
        """
        if self.complete:
            return await self.receive()
        if self.allowance is None:
            await self._begin()
            self.allowance = Allowance(self.bounds.seconds, self.bounds.rate, anyio.current_time())
        try:
            with anyio.fail_after(max(0.0, self.allowance.deadline - anyio.current_time())):
                message = await self.receive()
        except TimeoutError as error:
            raise ServeError(ErrorKind.TIMEOUT) from error
        if message["type"] == "http.request":
            self._count(len(message.get("body", b"")), self.allowance)
            if not message.get("more_body", False):
                self.complete = True
                self.share.close()
        return message

    async def _begin(self) -> None:
        bounds = self.bounds
        if self.size <= bounds.free_bytes:
            return
        try:
            with anyio.fail_after(bounds.seconds):
                await bounds.shares.wait(self.client, self.size, bounds.is_large(self.size))
        except TimeoutError as error:
            raise ServeError(ErrorKind.OVERLOADED, "Too many uploads of this address are under way; try again.") from error
        self.share.enter_context(bounds.shares.sending(self.client, self.size))

    def _count(self, count: int, allowance: Allowance) -> None:
        if self.arrived + count > self.bounds.max_bytes:
            raise ServeError(ErrorKind.TOO_LARGE)
        self.bounds.limiter.take_bytes(count, self.kept)
        self.arrived += count
        allowance.arrived(count, anyio.current_time())
