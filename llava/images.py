"""The one way from what a user names to an RGB image: file, bytes, data URL, base64 text, web address.

Every input either becomes the same image every time or is refused with one sentence. The rules:

- A file has at most 20 MB, an image at most 64 megapixels; the size is read from the header, before any pixel is
  decoded.
- The bytes say what a file is; its name, its address and what a sender calls it are hints that nobody needs.
- A file whose structure would cost its decoder far more than that size says is refused, and metadata is taken out before a decoder sees
  it; see `llava.image_structure`.
- The longer side is at most 200 times the shorter one. Thinner images hold nothing that a patch of the vision tower
  could see and make the intermediate sizes explode.
- The orientation that Exif data or XMP name is applied. Transparent images are laid on white. Animations give their first frame.
- 16-bit grey is scaled to 8 bits (not clipped); palettes, CMYK and the other modes are converted by Pillow.
- A truncated file is refused, not filled up.
"""

from __future__ import annotations

import base64
import binascii
import functools
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from urllib.parse import unquote_to_bytes

import numpy as np
from PIL import Image, ImageFile

from llava.fetch import FetchError, fetch
from llava.image_metadata import read_orientation
from llava.image_structure import FORMATS, BareImage, StructureError, bare_image

MAX_PIXELS = 64_000_000
"""Largest image, width times height."""
MAX_BYTES = 20_000_000
"""Largest file."""
MAX_ASPECT_RATIO = 200
"""Longest side over shortest side."""
SMALL_PIXELS = 16_000_000
"""Pixels of an image that is not large; photographs mostly have 12 megapixels."""
SMALL_AT_ONCE = 2
"""Small images that a service decodes at once; of large ones it is one."""
FETCH_TIMEOUT = 10.0
"""Seconds for one remote image."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What sets an image of each of Exif's orientations upright."""
_STRIPE_PIXELS = 1_000_000
"""That are converted to RGB at a time."""
_GREY16_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")


class ImageError(ValueError):
    """An image that cannot be used, in one sentence: what was found and what is wanted."""


def load_image(
    source: str | os.PathLike[str] | bytes,
    *,
    allow_local: bool = True,
    allow_remote: bool = False,
    allow_private: bool = False,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
    timeout: float = FETCH_TIMEOUT,
) -> Image.Image:
    """Load one image as RGB, upright, without transparency.

    Args:
        source: bytes of an image file; a path; or a text that starts with `data:` (base64), `http://` or `https://`.
        allow_local: read files. A server passes False for what its clients send.
        allow_remote: fetch web addresses.
        allow_private: fetch them also from addresses that are not public; see `llava.fetch`.
        max_pixels: largest width times height. Pillow's own limit, 179 million, stays in force.
        max_bytes: largest file.
        timeout: seconds for a remote image.

    Raises:
        ImageError: the image is missing, broken, too large, too thin, or its source is not allowed.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
    else:
        data = read_source(
            source,
            allow_local=allow_local,
            allow_remote=allow_remote,
            allow_private=allow_private,
            max_bytes=max_bytes,
            timeout=timeout,
        )
    try:
        return decode_image(data, max_pixels=max_pixels, max_bytes=max_bytes)
    except ImageError as error:
        if isinstance(source, (bytes, bytearray, memoryview)) or _is_address(os.fspath(source)):
            raise
        raise ImageError(f"{os.fspath(source)}: {error}") from error  # of several files, it is this one


def _is_address(source: str) -> bool:
    return source[:8].lower().startswith(("data:", "http://", "https://"))


def read_source(
    source: str | os.PathLike[str],
    *,
    allow_local: bool = True,
    allow_remote: bool = False,
    allow_private: bool = False,
    max_bytes: int = MAX_BYTES,
    timeout: float = FETCH_TIMEOUT,
) -> bytes:
    """The bytes of the file that a path, a data URL or a web address stands for; arguments and errors as in `load_image`."""
    text = os.fspath(source)
    scheme = text[:8].lower()
    if scheme.startswith("data:"):
        return _decode_data_url(text, max_bytes)
    if scheme.startswith(("http://", "https://")):
        return _fetch_remote(text, allow_remote, allow_private, max_bytes, timeout)
    return _read_file(text, allow_local, max_bytes)


def load_images(
    sources: Sequence[str],
    *,
    allow_local: bool = True,
    allow_remote: bool = False,
    allow_private: bool = False,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
    timeout: float = FETCH_TIMEOUT,
) -> list[Image.Image]:
    """Load several images in order, each under the limits of `load_image`."""
    if isinstance(sources, (str, bytes)):
        raise ImageError("the sources are one text, expected a list of them: wrap it in a list")
    return [
        load_image(
            source,
            allow_local=allow_local,
            allow_remote=allow_remote,
            allow_private=allow_private,
            max_pixels=max_pixels,
            max_bytes=max_bytes,
            timeout=timeout,
        )
        for source in sources
    ]


def load_image_from_base64(image: str | bytes) -> Image.Image:
    """Load an image from base64 text (without a `data:` prefix), under the limits of `load_image`."""
    text = image.decode("ascii", errors="replace") if isinstance(image, bytes) else image
    return decode_image(decode_base64(text))


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES) -> Image.Image:
    """Decode the bytes of an image file to an upright RGB image; see `load_image` for the rules and errors."""
    opened = open_image(data, max_pixels=max_pixels, max_bytes=max_bytes)
    rgb = opened.decode()
    return rgb.copy() if rgb is opened.file else rgb


def open_image(data: bytes, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES) -> OpenedImage:
    """Read the header of an image file under the rules of `load_image`; no pixel is decoded yet."""
    if not data:
        raise ImageError("the image holds 0 bytes, expected an image file: check how it was written or sent")
    _check_bytes(len(data), max_bytes)
    with _whole_files_only:
        return OpenedImage(*_open_checked(data, max_pixels))


@dataclass(frozen=True)
class OpenedImage:
    """An image file that passed all checks of its header. file: as Pillow opened it. orientation: as Exif numbers it."""

    file: Image.Image
    orientation: int

    @property
    def pixels(self) -> int:
        return self.file.width * self.file.height

    @property
    def is_large(self) -> bool:
        return self.pixels > SMALL_PIXELS

    @contextmanager
    def decoded(self) -> Iterator[Image.Image]:
        """The upright RGB image as long as the block lasts; waits until few enough of its size are in use in this process.

        Raises:
            ImageError: as `decode`.
        """
        with _PLACES[self.is_large]:
            yield self.decode()

    def decode(self) -> Image.Image:
        """The upright RGB image; where that is `file` itself, it keeps the file's bytes and its decoder for as long as it lives.

        Raises:
            ImageError: broken pixels, or such as cannot become RGB.
        """
        with _whole_files_only:
            try:
                self.file.load()
            except Exception as error:  # a decoder fails on broken bytes with whatever its parser happens to meet
                raise ImageError(
                    f"the {self.file.format} image is truncated or broken, expected a whole file: save it again"
                ) from error
        return to_rgb(self.file.transpose(_TURNS[self.orientation]) if self.orientation in _TURNS else self.file)


_PLACES = {False: threading.Semaphore(SMALL_AT_ONCE), True: threading.Semaphore(1)}


class _WholeFilesOnly:
    """Undoes, while any thread decodes, Pillow's switch for filling up truncated files: lmms-eval sets it for its whole process."""

    def __init__(self) -> None:
        self._lock, self._inside, self._before = threading.Lock(), 0, False

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
            self._inside += 1

    def __exit__(self, *raised: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                ImageFile.LOAD_TRUNCATED_IMAGES = self._before


_whole_files_only = _WholeFilesOnly()


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a decoded image of any mode to RGB: transparency on white, 16-bit grey scaled to 8 bits.

    Raises:
        ImageError: floating-point pixels, 32-bit integers above 65535, or a mode that Pillow cannot convert.
    """
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.width * image.height <= _STRIPE_PIXELS:
        return _part_to_rgb(image)
    rgb, rows = Image.new("RGB", image.size), max(1, _STRIPE_PIXELS // image.width)
    for top in range(0, image.height, rows):  # what lies between the two modes takes several times what an image does
        rgb.paste(_part_to_rgb(image.crop((0, top, image.width, min(top + rows, image.height)))), (0, top))
    return rgb


def _part_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _GREY16_MODES:
        return _grey16_to_rgb(image)
    if image.mode == "F":
        raise ImageError("the image has floating-point pixels, expected 8 or 16 bits per channel: convert it first")
    try:
        if image.has_transparency_data:
            layer = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
        return image.convert("RGB")
    except (ValueError, OSError) as error:
        raise ImageError(f"the image mode {image.mode} cannot become RGB: convert the file to PNG or JPEG") from error


def _grey16_to_rgb(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image).astype(np.int64)  # (height, width)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ImageError(
            f"the image has 32-bit pixels from {pixels.min()} to {pixels.max()}, expected 0 to 65535: "
            "convert it to 8 or 16 bits"
        )
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        pixels[pixels == transparent] = 65535
    return Image.fromarray(((pixels + 128) // 257).astype(np.uint8)).convert("RGB")  # 65535 = 255 * 257


@functools.cache
def _readable_formats() -> tuple[str, ...]:
    """Return those of our formats that this machine's Pillow was built with (WebP and AVIF are optional)."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _open_checked(data: bytes, max_pixels: int) -> tuple[Image.Image, int]:
    """Read the header of a file that costs its decoder no more than an image of the largest size does; also gives its orientation."""
    try:
        bare = bare_image(data, max_pixels)
    except StructureError as error:
        raise ImageError(str(error)) from error
    if bare is None or bare.format not in _readable_formats():
        raise ImageError(f"the {len(data):,} bytes are not a readable image, expected one of {', '.join(_readable_formats())}")
    image = _open_header(bare)
    _check_size(image.size, max_pixels)
    return image, read_orientation(bare.exif or image.info.get("exif", b""), bare.xmp or image.info.get("xmp", b""))


def _open_header(bare: BareImage) -> Image.Image:
    """Read the header alone; no pixel is decoded yet."""
    try:
        return Image.open(BytesIO(bare.data), formats=[bare.format])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"the image is too large to decode: {error}; scale it down") from error
    except Exception as error:  # a broken header fails in whatever way its parser happens to meet it
        raise ImageError(f"the {bare.format} image has a broken header, expected a whole file: save it again") from error


def _check_bytes(found: int, max_bytes: int) -> None:
    if found > max_bytes:
        raise ImageError(f"the image file has {found:,} bytes, expected at most {max_bytes:,}: use a smaller one")


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"the image is {width} x {height} pixels, expected at least 1 x 1")
    if width * height > max_pixels:
        raise ImageError(
            f"the image is {width} x {height} = {width * height:,} pixels, "
            f"expected at most {max_pixels:,}: scale it down"
        )
    check_aspect_ratio(size)


def check_aspect_ratio(size: tuple[int, int]) -> None:
    """Refuse an image of (width, height) `size` that is longer than `MAX_ASPECT_RATIO` times its shorter side."""
    width, height = size
    if max(size) > MAX_ASPECT_RATIO * min(size):
        raise ImageError(
            f"the image is {width} x {height} pixels, expected an aspect ratio of at most {MAX_ASPECT_RATIO}:1: "
            "crop it or cut it into pieces"
        )


def _read_file(path_text: str, allow_local: bool, max_bytes: int) -> bytes:
    if not allow_local:
        raise ImageError("the image names a file, but files are not read here: send a data URL")
    path = Path(path_text)
    try:
        if not path.is_file():
            raise ImageError(f"there is no image file at {path_text!r}: check the path")
        _check_bytes(path.stat().st_size, max_bytes)
        with path.open("rb") as file:
            return file.read(max_bytes + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"the image file {path_text[:200]!r} cannot be read: check the path and its rights") from error


def _fetch_remote(url: str, allow_remote: bool, allow_private: bool, max_bytes: int, timeout: float) -> bytes:
    if not allow_remote:
        raise ImageError("the image is a web address, but fetching is off here: allow it or give a file or data URL")
    try:
        return fetch(url, max_bytes=max_bytes, timeout=timeout, allow_private=allow_private)
    except FetchError as error:
        raise ImageError(f"the image cannot be fetched: {error}") from error


def _decode_data_url(text: str, max_bytes: int) -> bytes:
    """The bytes of a data URL (RFC 2397). Its media type is a hint that nothing follows from: what the bytes are decides."""
    header, comma, body = text.partition(",")
    if not comma:
        raise ImageError(f"the data URL starts with {header[:60]!r}, expected 'data:image/...;base64,' and the data")
    _check_characters(body, max_bytes)
    data = unquote_to_bytes(body)
    if "base64" not in (option.strip() for option in header.lower().split(";")):
        _check_bytes(len(data), max_bytes)
        return data
    return decode_base64(data.decode("ascii", errors="replace"), max_bytes)


def decode_base64(text: str, max_bytes: int = MAX_BYTES) -> bytes:
    """Decode base64 text of either alphabet, with line breaks, padded or not; its length is checked before anything is allocated for it."""
    _check_characters(text, max_bytes)
    plain = "".join(text.split()).translate(_URL_SAFE).rstrip("=")
    try:
        data = base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"the image is not valid base64 ({error}): encode the whole file") from error
    _check_bytes(len(data), max_bytes)
    return data


_URL_SAFE = str.maketrans("-_", "+/")


def _check_characters(text: str, max_bytes: int) -> None:
    if len(text) > 2 * max_bytes:  # four characters for three bytes, and room for line breaks
        raise ImageError(f"the encoded image has {len(text):,} characters, too many for {max_bytes:,} bytes")


def expand2square(pil_img: Image.Image, background_color: tuple[int, ...] | int) -> Image.Image:
    """Centre an image on a square of one colour whose side is the image's longer side."""
    width, height = pil_img.size
    if width == height:
        return pil_img
    side = max(width, height)
    square = Image.new(pil_img.mode, (side, side), background_color)
    square.paste(pil_img, ((side - width) // 2, (side - height) // 2))
    return square
