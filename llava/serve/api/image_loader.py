"""From an image as a client sent it to what the engine keeps of it, within bounds on threads, pixels, bytes and where it may come from.

An image's pixels live only while the engine reads them, in a thread; what it keeps takes a hundredth of that. Small images have a pool of
threads, large ones a thread of their own, both first in, first out. A request has one image in them at a time. So large images are decoded
one after the other, the requests that send them take turns, and small images never wait for large ones.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from PIL import Image

from llava.fetch import AddressError, FetchError, Resolver, TooLargeError, fetch, resolve_host
from llava.images import FETCH_TIMEOUT, MAX_BYTES, SMALL_AT_ONCE, ImageError, OpenedImage, decode_base64, open_image, read_source
from llava.serve.api.parsed_request import ImageSource
from llava.serve.protocol import EngineImage, ErrorKind, Limits, ServeError

logger = logging.getLogger(__name__)

FETCHING_THREADS = 8
MAX_HELD_BYTES = 4_000_000_000
"""For all images that are in use at once: 74 requests of eight images in five views of 336 x 336 pixels, 6.8 MB each."""
REQUEST_SHARE = 8
"""One request's images may take at most this fraction of it, one eighth; a data URL of 64 megapixels of noise takes 260 MB."""
TOO_MUCH = "The images of the request take too much memory together: send fewer or smaller ones."
NOT_FETCHED = "Images at web addresses are not fetched here: send the image as a data URL, or ask the operator, who can allow it."
NOT_READ = (
    "An image is given as neither a data URL nor a web address: files are not read here, send what the file holds as a data URL, "
    "data:image/png;base64,..."
)


class HostNotAllowed(FetchError):
    """A host that is not on the operator's allow-list."""


FETCH_ERROR_TEXTS: dict[type[FetchError], str] = {
    HostNotAllowed: "The image's address is at a host from which nothing is fetched here: send the image as a data URL, or ask the "
    "operator, who can allow the host.",
    AddressError: "The image's address cannot be read: expected http(s)://host/path without a user name, spaces or backslashes.",
    TooLargeError: "The file at the image's address is too large: expected at most 20 MB.",
    FetchError: "The image's address could not be fetched: expected a file that anybody on the public internet can read within 10 seconds. "
    "Check the address, or send the image as a data URL.",
}
"""Error messages about images that were not fetched. Everything that depends on the network around this server has one message, so that
nobody can scan it: a host that is refused for its address, does not resolve, or does not answer."""
NO_IMAGE_THERE = (
    "What is at the image's address cannot be used: expected a whole PNG, JPEG, GIF, WebP, BMP, TIFF, PPM or AVIF file of at most 20 MB "
    "and 64 megapixels, with an aspect ratio of at most 200:1."
)
IMAGE_ERROR_TEXTS = (*FETCH_ERROR_TEXTS.values(), NO_IMAGE_THERE, NOT_FETCHED, NOT_READ, TOO_MUCH)
"""All error messages about images besides the defaults of `ErrorKind`; see `llava.serve.protocol.error_templates`."""


class ImageLoader:
    """Fetches and decodes images off the event loop.

    Clients do not learn what is wrong with an image's bytes: that is one message for all. The others concern its address, see
    `FETCH_ERROR_TEXTS`.

    Args:
        limits: whether web addresses are fetched, and from which hosts.
        prepare: takes from an RGB image what the engine needs; see `protocol.Engine`.
        max_held_bytes: for what it took, of all images that are in use at once.
        fetch_bytes: fetches the file at a web address, its first argument; its second resolves host names.
    """

    def __init__(
        self,
        limits: Limits,
        prepare: Callable[[Image.Image], EngineImage],
        max_held_bytes: int = MAX_HELD_BYTES,
        fetch_bytes: Callable[[str, Resolver], bytes] | None = None,
    ) -> None:
        self.limits, self.prepare, self.max_held_bytes = limits, prepare, max_held_bytes
        self.held_bytes = 0
        self._fetch = fetch_bytes or _fetch
        self._small = ThreadPoolExecutor(SMALL_AT_ONCE, thread_name_prefix="decode")
        self._large = ThreadPoolExecutor(1, thread_name_prefix="decode-large")
        self._fetchers = ThreadPoolExecutor(FETCHING_THREADS, thread_name_prefix="fetch")  # separate: a slow host delays no decoding

    def close(self) -> None:
        for pool in (self._small, self._large, self._fetchers):
            pool.shutdown(wait=False, cancel_futures=True)

    @asynccontextmanager
    async def loaded(self, sources: Sequence[ImageSource], request_id: str) -> AsyncIterator[tuple[EngineImage, ...]]:
        """What the engine took from the images; counts as held until the block ends.

        Args:
            sources: data URLs, or web addresses where they are allowed.
            request_id: names the request in the log, where the details of a refusal are.

        Raises:
            ServeError: `INVALID_IMAGE`, with the image's field; `TOO_LARGE` when one request would hold more than its
                share, `OVERLOADED` when all together would hold more than allowed.
        """
        held = 0
        images: list[EngineImage] = []
        try:
            for source in sources:  # sequentially: a request occupies one thread and leaves the next to others
                image = await self._load(source, request_id)
                if held + image.num_bytes > self.max_held_bytes // REQUEST_SHARE:
                    raise ServeError(ErrorKind.TOO_LARGE, TOO_MUCH, source.param)
                if self.held_bytes + image.num_bytes > self.max_held_bytes:
                    raise ServeError(ErrorKind.OVERLOADED)
                self.held_bytes += image.num_bytes
                held += image.num_bytes
                images.append(image)
            yield tuple(images)
        finally:
            self.held_bytes -= held

    async def _load(self, source: ImageSource, request_id: str) -> EngineImage:
        try:
            return await self._prepared(source.text, source.plain_base64)
        except (ImageError, FetchError, _Refused) as error:
            logger.info("request %s: its image in %s is refused: %s", request_id, source.param, str(error)[:500])
            raise ServeError(ErrorKind.INVALID_IMAGE, _client_message(error), source.param) from error
        except ServeError as error:
            raise ServeError(error.kind, error.detail, source.param) from error
        except MemoryError as error:
            raise ServeError(ErrorKind.OUT_OF_MEMORY) from error

    async def _prepared(self, source: str, plain_base64: bool) -> EngineImage:
        scheme = source[:8].lower()
        if scheme.startswith(("http://", "https://")):
            if not self.limits.allow_remote_images:
                raise _Refused(NOT_FETCHED)
            data = await asyncio.get_running_loop().run_in_executor(self._fetchers, self._fetch, source, self._resolve)
            try:
                return await self._decoded(lambda: data)
            except ImageError as error:
                raise _Refused(NO_IMAGE_THERE) from error
        if scheme.startswith("data:"):
            return await self._decoded(lambda: read_source(source, allow_local=False))
        if scheme.startswith("file:") or not plain_base64:
            raise _Refused(NOT_READ)
        return await self._decoded(lambda: decode_base64(source))

    async def _decoded(self, read: Callable[[], bytes]) -> EngineImage:
        """Decode an image in the pool for its size, which its header gives; a large one is read again when its turn comes."""
        loop = asyncio.get_running_loop()
        small = await loop.run_in_executor(self._small, self._take_small, read)
        return await loop.run_in_executor(self._large, lambda: self._take(open_image(read()))) if small is None else small

    def _take_small(self, read: Callable[[], bytes]) -> EngineImage | None:
        """What the engine needs of an image, or `None` for a large one."""
        opened = open_image(read())
        return None if opened.is_large else self._take(opened)

    def _take(self, opened: OpenedImage) -> EngineImage:
        with opened.decoded() as image:
            return self.prepare(image)

    def _resolve(self, host: str, port: int) -> list[str]:
        """Resolve a host that is allowed; `llava.fetch` asks again for each redirect and refuses addresses that are not public."""
        allowed = self.limits.allowed_hosts
        if allowed and host.lower().rstrip(".") not in {name.lower().rstrip(".") for name in allowed}:
            raise HostNotAllowed(f"the host {host!r} is not among the allowed ones")
        return resolve_host(host, port)


class _Refused(Exception):
    """An image that is refused with a constant message of its own."""


def _client_message(error: Exception) -> str | None:
    """The message for clients; `None` stands for the kind's default."""
    if isinstance(error, _Refused):
        return str(error)
    return next((text for kind, text in FETCH_ERROR_TEXTS.items() if isinstance(error, kind)), None)


def _fetch(url: str, resolve: Resolver) -> bytes:
    return fetch(url, max_bytes=MAX_BYTES, timeout=FETCH_TIMEOUT, resolve=resolve)
