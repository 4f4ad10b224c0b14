"""From what a client sent as a picture to RGB pixels: bounded in threads, in pixels held, and in where it may come from."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from PIL import Image

from llava.fetch import AddressError, FetchError, Resolver, TooLargeError, fetch, resolve_host
from llava.images import FETCH_TIMEOUT, MAX_BYTES, ImageError, decode_image, load_image, load_image_from_base64
from llava.serve.calls import ImageSource
from llava.serve.protocol import ErrorKind, Limits, ServeError

logger = logging.getLogger(__name__)

DECODING_THREADS = 2
FETCHING_THREADS = 8
MAX_HELD_PIXELS = 512_000_000
"""Pixels of all requests' pictures together, three bytes each."""
NOT_FETCHED = "Images at web addresses are not fetched here: send the image as a data URL, or ask the operator, who can allow it."
NOT_READ = (
    "An image is given as neither a data URL nor a web address: files are not read here, send what the file holds as a data URL, "
    "data:image/png;base64,..."
)


class HostNotAllowed(FetchError):
    """A host that is not on the operator's list."""


TOLD: dict[type[FetchError], str] = {
    HostNotAllowed: "The image's address is at a host from which nothing is fetched here: send the image as a data URL, or ask the "
    "operator, who can allow the host.",
    AddressError: "The image's address cannot be read: expected http(s)://host/path without a user name, spaces or backslashes.",
    TooLargeError: "The file at the image's address is too large: expected at most 20 MB.",
    FetchError: "The image's address could not be fetched: expected a file that anybody on the public internet can read within 10 seconds. "
    "Check the address, or send the image as a data URL.",
}
"""What clients are told of an image that was not fetched. Whatever depends on names, addresses and ports around this server is one
sentence, so that nobody can look around there: a host that is refused for its address, that has none, or where nobody answers."""
NO_IMAGE_THERE = (
    "What is at the image's address cannot be used: expected a whole PNG, JPEG, GIF, WebP, BMP, TIFF, PPM or AVIF file of at most 20 MB "
    "and 64 megapixels, its sides at most 200-fold apart."
)


class PictureLoader:
    """Decodes pictures off the event loop; what is wrong with one's bytes, clients are not told: one sentence for all. The
    others are about its address, see `TOLD`.

    Args:
        limits: whether web addresses are fetched, and from which hosts.
        max_held_pixels: of all pictures that are in use at once.
        fetch_bytes: fetches the file at a web address, its first argument; its second resolves host names.
    """

    def __init__(
        self,
        limits: Limits,
        max_held_pixels: int = MAX_HELD_PIXELS,
        fetch_bytes: Callable[[str, Resolver], bytes] | None = None,
    ) -> None:
        self.limits, self.max_held_pixels = limits, max_held_pixels
        self.held_pixels = 0
        self._fetch = fetch_bytes or _fetch
        self._decoders = ThreadPoolExecutor(DECODING_THREADS, thread_name_prefix="decode")
        self._fetchers = ThreadPoolExecutor(FETCHING_THREADS, thread_name_prefix="fetch")  # apart: a slow host holds up no decoding

    def close(self) -> None:
        for pool in (self._decoders, self._fetchers):
            pool.shutdown(wait=False, cancel_futures=True)

    @asynccontextmanager
    async def loaded(self, sources: Sequence[ImageSource]) -> AsyncIterator[tuple[Image.Image, ...]]:
        """The pictures, whose pixels count as held until the block ends.

        Args:
            sources: data URLs, or web addresses where they are allowed.

        Raises:
            ServeError: `INVALID_IMAGE`, with the field that the image stands in; `OVERLOADED` when more pixels than allowed would be held.
        """
        held = 0
        images: list[Image.Image] = []
        try:
            for source in sources:  # one after the other: a request takes one thread, so that others get the next
                image = await self._load(source)
                count = image.width * image.height
                if self.held_pixels + count > self.max_held_pixels:
                    raise ServeError(ErrorKind.OVERLOADED)
                self.held_pixels += count
                held += count
                images.append(image)
            yield tuple(images)
        finally:
            self.held_pixels -= held

    async def _load(self, source: ImageSource) -> Image.Image:
        try:
            return await self._decoded(source.text, source.plain_base64)
        except (ImageError, FetchError, _Unwanted) as error:
            logger.info("an image was refused: %s", str(error)[:500])
            raise ServeError(ErrorKind.INVALID_IMAGE, _told(error), source.param) from error
        except MemoryError as error:
            raise ServeError(ErrorKind.OUT_OF_MEMORY) from error

    async def _decoded(self, source: str, plain_base64: bool) -> Image.Image:
        loop = asyncio.get_running_loop()
        scheme = source[:8].lower()
        if scheme.startswith(("http://", "https://")):
            if not self.limits.allow_remote_images:
                raise _Unwanted(NOT_FETCHED)
            data = await loop.run_in_executor(self._fetchers, self._fetch, source, self._resolve)
            try:
                return await loop.run_in_executor(self._decoders, decode_image, data)
            except ImageError as error:
                raise _Unwanted(NO_IMAGE_THERE) from error
        if scheme.startswith("data:"):
            return await loop.run_in_executor(self._decoders, _load_inline, source)
        if scheme.startswith("file:") or not plain_base64:
            raise _Unwanted(NOT_READ)
        return await loop.run_in_executor(self._decoders, load_image_from_base64, source)

    def _resolve(self, host: str, port: int) -> list[str]:
        """Resolve a host that is allowed; `llava.fetch` asks again for each redirect and refuses addresses that are not public."""
        allowed = self.limits.allowed_hosts
        if allowed and host.lower().rstrip(".") not in {name.lower().rstrip(".") for name in allowed}:
            raise HostNotAllowed(f"the host {host!r} is not among the allowed ones")
        return resolve_host(host, port)


class _Unwanted(Exception):
    """An image that is refused with a constant sentence of its own."""


def _told(error: Exception) -> str | None:
    """What clients read of an error; `None` is the kind's own sentence."""
    if isinstance(error, _Unwanted):
        return str(error)
    return next((text for kind, text in TOLD.items() if isinstance(error, kind)), None)


def _load_inline(source: str) -> Image.Image:
    return load_image(source, allow_local=False, allow_remote=False)


def _fetch(url: str, resolve: Resolver) -> bytes:
    return fetch(url, max_bytes=MAX_BYTES, timeout=FETCH_TIMEOUT, resolve=resolve)
