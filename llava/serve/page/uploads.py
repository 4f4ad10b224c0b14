"""Image uploads from a browser.

Takes the place of Gradio's own upload: a file is kept only if it is an image within the limits, under a name made
here (its SHA-256 and its format), and nothing of the browser's file name survives.
"""

from __future__ import annotations

import hashlib
import threading
import time
from contextlib import suppress
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from llava.durable import write_whole
from llava.image_structure import image_format
from llava.images import MAX_BYTES, ImageError, open_image
from llava.serve.http.body_limits import BodyLimits
from llava.serve.http.errors import plain_error
from llava.serve.http.request_limiter import RequestLimiter
from llava.serve.protocol import Limits, ServeError

MAX_FILES = 8
"""Images per upload."""
MAX_UPLOAD_BYTES = MAX_FILES * (MAX_BYTES + 10_000)
"""Of all images of an upload, and the form around them."""
HELD_UPLOADS = 16
"""How many of that size may be under way at once, all visitors together: what has come of each lies on the disk."""
CLIENT_UPLOADS = 8
"""How many uploads of one visitor are taken at once; further ones wait."""


def upload_limits(body_seconds: float = Limits.body_seconds) -> BodyLimits:
    """How uploads have to arrive."""
    return BodyLimits(
        RequestLimiter(0, HELD_UPLOADS * MAX_UPLOAD_BYTES),
        MAX_UPLOAD_BYTES,
        seconds=body_seconds,
        client_bytes=CLIENT_UPLOADS * MAX_UPLOAD_BYTES,
        client_uploads=CLIENT_UPLOADS,
        unmetered_bytes=0,
    )


class Uploads:
    """The folder of uploaded images.

    Args:
        folder: made here, for this user alone.
        max_bytes: of all images kept together; further ones are refused until old ones expire.
        max_age: seconds after which an image expires.
    """

    def __init__(self, folder: Path, max_bytes: int = 2_000_000_000, max_age: float = 3600.0) -> None:
        self.folder, self.max_bytes, self.max_age = folder, max_bytes, max_age
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._sizes: dict[Path, int] = {}
        self._changing = threading.Lock()

    async def receive(self, request: Request) -> Response:
        """Answer Gradio's `POST /gradio_api/upload`: paths of the images on the server, in order. `PageGuard` bounds how they arrive."""
        if request.headers.get("content-length") is None:
            return PlainTextResponse("The upload has no Content-Length.", 411)
        try:
            async with request.form(max_files=MAX_FILES, max_fields=10) as form:
                files = [part for part in form.getlist("files") if isinstance(part, UploadFile)]
                paths = [await run_in_threadpool(self.keep, await part.read(MAX_BYTES + 1)) for part in files]
        except ServeError as error:
            return plain_error(error)
        except ClientDisconnect:
            return PlainTextResponse("The upload broke off.", 400)
        except MultiPartException:
            return PlainTextResponse("The upload is not a well-formed form.", 400)
        except ImageError as error:
            return PlainTextResponse(f"A file cannot be used: {error}.", 400)
        except OverflowError as error:
            return PlainTextResponse(str(error), 507)
        return JSONResponse([str(path) for path in paths]) if paths else PlainTextResponse("The upload holds no file.", 400)

    async def progress(self, request: Request) -> Response:
        """Answer Gradio's question how far an upload is: it has only ever to hear that nothing is left to wait for."""
        return PlainTextResponse('data: {"msg": "done"}\n\n', media_type="text/event-stream")

    def keep(self, data: bytes) -> Path:
        """Check an image and store it.

        Raises:
            ImageError: not an image within the limits. OverflowError: the folder is full.
        """
        self.expire()
        with open_image(data).decoded():
            pass  # its pixels are whole
        suffix = {"jpeg": "jpg"}.get(name := image_format(data).lower(), name)
        path = self.folder / f"{hashlib.sha256(data).hexdigest()}.{suffix}"
        with self._changing:
            if sum(size for kept, size in self._sizes.items() if kept != path) + len(data) > self.max_bytes:
                raise OverflowError("There is no room for more images now; try again later.")
            write_whole(path, data)
            self._sizes[path] = len(data)
        return path

    def expire(self) -> None:
        """Delete what is older than `max_age`."""
        with self._changing:
            for path in list(self._sizes):
                with suppress(FileNotFoundError):
                    if time.time() - path.stat().st_mtime <= self.max_age:
                        continue
                    path.unlink()
                del self._sizes[path]
