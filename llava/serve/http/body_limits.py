"""Limits on request bodies: how large one may be, how slowly it may arrive, and how much one client may be uploading at once.

A body costs memory from its first byte to the end of its answer, even if the client stalls two bytes before the end. starlette's
`max_body_size` limits one body's size alone. So:

- A body may stall for some seconds. Every byte that arrives gives time back, at the minimum rate that an upload has to sustain, but never
  more than those seconds: a large upload over a slow line goes on for as long as it arrives, a stalled one is ended.
- Bodies in transit count against a quota of their client. While it is used up, further ones wait unread, so that a burst of legitimate
  uploads is only spread out; one that does not get its turn in time is refused. Large bodies never use the last third of the quota, and
  small ones need none of it: whoever stalls large uploads does not even block their own small requests.
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

UNMETERED_BYTES = 65_536
"""Size of a body up to which it needs no quota: the server reads that far ahead anyway."""
LARGE_FRACTION = 1 / 16
"""Fraction of the maximum size above which a body counts as large: 4 MB of 64."""
QUOTA_RESERVE = 1 / 3
"""Fraction of a client's quota that its large bodies leave to its others."""
BUDGET_RESERVE = 1 / 4
"""Fraction of the budget of all bodies that large ones leave to the others."""


class ArrivalDeadline:
    """The time by which more of a body has to arrive.

    Args:
        seconds: that it may stall. rate: bytes per second that it has to sustain. now: when it begins.
    """

    def __init__(self, seconds: float, rate: float, now: float) -> None:
        self.seconds, self.rate = seconds, rate
        self.deadline = now + seconds

    def extend(self, count: int, now: float) -> None:
        """Extend the deadline for bytes received."""
        self.deadline = min(now + self.seconds, self.deadline + count / self.rate)


class UploadQuota:
    """What each client may be uploading at once.

    Args:
        max_bytes: of a client's bodies in transit. max_uploads: their number.
    """

    def __init__(self, max_bytes: int, max_uploads: int) -> None:
        self.max_bytes, self.max_uploads = max_bytes, max_uploads
        self._uploading: dict[Client, list[int]] = {}  # sizes of the bodies in transit
        self._changed = asyncio.Event()

    def fits(self, client: Client, size: int, is_large: bool) -> bool:
        """Whether a body may begin now; a client's only one always may."""
        sizes = self._uploading.get(client, [])
        most = self.max_bytes * (1 - QUOTA_RESERVE) if is_large else self.max_bytes
        return not sizes or (len(sizes) < self.max_uploads and sum(sizes) + size <= most)

    async def wait(self, client: Client, size: int, is_large: bool) -> None:
        """Return when a body may begin."""
        while not self.fits(client, size, is_large):
            await self._changed.wait()

    @contextmanager
    def uploading(self, client: Client, size: int) -> Iterator[None]:
        """Count a body while it arrives."""
        sizes = self._uploading.setdefault(client, [])
        sizes.append(size)
        try:
            yield
        finally:
            sizes.remove(size)
            if not sizes:
                self._uploading.pop(client, None)
            self._changed.set()
            self._changed = asyncio.Event()


class BodyLimits:
    """The limits on the bodies of one kind of request.

    Args:
        limiter: counts the bytes of all of them together, from their arrival to the end of the answer.
        max_bytes: of one body. seconds, rate: see `ArrivalDeadline`.
        client_bytes, client_uploads: see `UploadQuota`; by default three bodies of the maximum size.
        unmetered_bytes: a body of at most this size needs no quota.
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
        unmetered_bytes: int = UNMETERED_BYTES,
    ) -> None:
        self.limiter, self.max_bytes, self.seconds, self.rate, self.unmetered_bytes = limiter, max_bytes, seconds, rate, unmetered_bytes
        self.quota = UploadQuota(Limits.client_bodies * max_bytes if client_bytes is None else client_bytes, client_uploads)

    @classmethod
    def of(cls, limits: Limits, limiter: RequestLimiter) -> BodyLimits:
        """The limits on bodies among a service's limits."""
        return cls(
            limiter,
            limits.max_body_bytes,
            seconds=limits.body_seconds,
            rate=limits.body_rate,
            client_bytes=limits.client_bodies * limits.max_body_bytes,
            client_uploads=limits.client_uploads,
        )

    def is_large(self, size: int) -> bool:
        return size > max(self.unmetered_bytes, LARGE_FRACTION * self.max_bytes)


class LimitBodies:
    """Limits how large a body may be and how it has to arrive, by the request's headers and again while it is read.

    Args:
        limits: of all paths but `small_paths`. small: of those, whose bodies have a budget of their own.
    """

    def __init__(self, app: ASGIApp, limits: BodyLimits, small: BodyLimits | None = None, small_paths: Collection[str] = ()) -> None:
        self.app, self.limits, self.small, self.small_paths = app, limits, small, frozenset(small_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limits = self.small if self.small is not None and scope["path"] in self.small_paths else self.limits
        with _IncomingBody(limits, client_of(scope), _size_of(scope, limits.max_bytes), receive) as body:
            await self.app(scope, body.next, send)


def _size_of(scope: Scope, max_bytes: int) -> int:
    """The size of a body by the request's headers; the maximum where it is chunked.

    Raises:
        ServeError: by its headers, the body is too large or compressed.
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


class _IncomingBody:
    """One body: counted against its client's quota while it arrives, and against the budget until the `with` block ends."""

    def __init__(self, limits: BodyLimits, client: Client, size: int, receive: Receive) -> None:
        self.limits, self.client, self.size, self.receive = limits, client, size, receive
        self.reserve = int(BUDGET_RESERVE * limits.limiter.max_bytes) if limits.is_large(size) else 0
        self.arrived, self.complete = 0, False
        self.deadline: ArrivalDeadline | None = None
        self.quota = ExitStack()

    def __enter__(self) -> _IncomingBody:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.quota.close()
        self.limits.limiter.release_bytes(self.arrived)

    async def next(self) -> Message:
        """The app's `receive`.

        Raises:
            ServeError: `TIMEOUT`, `TOO_LARGE`, or `OVERLOADED` where there is no capacity for it.
        """
        if self.complete:
            return await self.receive()
        if self.deadline is None:
            await self._begin()
            self.deadline = ArrivalDeadline(self.limits.seconds, self.limits.rate, anyio.current_time())
        try:
            with anyio.fail_after(max(0.0, self.deadline.deadline - anyio.current_time())):
                message = await self.receive()
        except TimeoutError as error:
            raise ServeError(ErrorKind.TIMEOUT) from error
        if message["type"] == "http.request":
            self._count(len(message.get("body", b"")), self.deadline)
            if not message.get("more_body", False):
                self.complete = True
                self.quota.close()
        return message

    async def _begin(self) -> None:
        limits = self.limits
        if self.size <= limits.unmetered_bytes:
            return
        try:
            with anyio.fail_after(limits.seconds):
                await limits.quota.wait(self.client, self.size, limits.is_large(self.size))
        except TimeoutError as error:
            raise ServeError(ErrorKind.OVERLOADED, "Too many uploads from this address are in progress; try again.") from error
        self.quota.enter_context(limits.quota.uploading(self.client, self.size))

    def _count(self, count: int, deadline: ArrivalDeadline) -> None:
        if self.arrived + count > self.limits.max_bytes:
            raise ServeError(ErrorKind.TOO_LARGE)
        self.limits.limiter.reserve_bytes(count, self.reserve)
        self.arrived += count
        deadline.extend(count, anyio.current_time())
