"""From what a client sent as a picture to RGB pixels: bounded in threads, in pixels held, and in where it may come from."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from PIL import Image

from llava.fetch import FetchError, Resolver, fetch, resolve_host
from llava.images import FETCH_TIMEOUT, MAX_BYTES, ImageError, decode_image, load_image, load_image_from_base64
from llava.serve.protocol import ErrorKind, Limits, ServeError

logger = logging.getLogger(__name__)

DECODING_THREADS = 2
FETCHING_THREADS = 8
MAX_HELD_PIXELS = 512_000_000
"""Pixels of all requests' pictures together, three bytes each."""
NOT_FETCHED = "Pictures at web addresses are not fetched here: send the picture as a data URL, or ask the operator, who can allow it."
NOT_READ = (
    "A picture is given as neither a data URL nor a web address: files are not read here, send what the file holds as a data URL, "
    "data:image/png;base64,..."
)


class PictureLoader:
    """Decodes pictures off the event loop; what is wrong with one, clients are not told: one sentence for all. Two more are
    about what kind of address it has, which is seen without looking at what is there.

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
    async def loaded(self, sources: Sequence[str], plain_base64: bool = False) -> AsyncIterator[tuple[Image.Image, ...]]:
        """The pictures, whose pixels count as held until the block ends.

        Args:
            sources: data URLs, or web addresses where they are allowed. plain_base64: other texts are base64 (LLaVA's protocol).

        Raises:
            ServeError: `INVALID_IMAGE`; `OVERLOADED` when more pixels than allowed would be held.
        """
        held = 0
        images: list[Image.Image] = []
        try:
            for source in sources:  # one after the other: a request takes one thread, so that others get the next
                image = await self._load(source, plain_base64)
                count = image.width * image.height
                if self.held_pixels + count > self.max_held_pixels:
                    raise ServeError(ErrorKind.OVERLOADED)
                self.held_pixels += count
                held += count
                images.append(image)
            yield tuple(images)
        finally:
            self.held_pixels -= held

    async def _load(self, source: str, plain_base64: bool) -> Image.Image:
        loop = asyncio.get_running_loop()
        scheme = source[:8].lower()
        is_remote, is_inline = scheme.startswith(("http://", "https://")), scheme.startswith("data:")
        if is_remote and not self.limits.allow_remote_images:
            raise ServeError(ErrorKind.INVALID_IMAGE, NOT_FETCHED)
        if scheme.startswith("file:") or not (is_remote or is_inline or plain_base64):
            raise ServeError(ErrorKind.INVALID_IMAGE, NOT_READ)
        try:
            if is_remote:
                data = await loop.run_in_executor(self._fetchers, self._fetch, source, self._resolve)
                return await loop.run_in_executor(self._decoders, decode_image, data)
            return await loop.run_in_executor(self._decoders, _load_inline if is_inline else load_image_from_base64, source)
        except (ImageError, FetchError) as error:
            logger.info("a picture was refused: %s", str(error)[:500])
            raise ServeError(ErrorKind.INVALID_IMAGE) from error
        except MemoryError as error:
            raise ServeError(ErrorKind.OUT_OF_MEMORY) from error

    def _resolve(self, host: str, port: int) -> list[str]:
        """Resolve a host that is allowed; `llava.fetch` asks again for each redirect and refuses addresses that are not public."""
        allowed = self.limits.allowed_hosts
        if allowed and host.lower().rstrip(".") not in {name.lower().rstrip(".") for name in allowed}:
            raise FetchError(f"the host {host!r} is not among the allowed ones")
        return resolve_host(host, port)


def _load_inline(source: str) -> Image.Image:
    return load_image(source, allow_local=False, allow_remote=False)


def _fetch(url: str, resolve: Resolver) -> bytes:
    return fetch(url, max_bytes=MAX_BYTES, timeout=FETCH_TIMEOUT, resolve=resolve)
