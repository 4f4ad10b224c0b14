"""Image files for `attacks.py`: small ones that cost a decoder far more than their pixels, and those that people mean well with."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

Image.init()  # so that `Image.SAVE` is whole
SIDE = 16
SUFFIXES = {".png", ".jpg", ".jpeg", ".gif", ".webp", ".tif", ".tiff", ".bmp", ".avif", ".ppm"}
SEGMENT = 65_000
"""Bytes of Exif data in one segment of a JPEG, which holds 65,533 bytes in all."""

Tag = tuple[int, int, int, "int | None"]
"""Of a TIFF directory: tag, type, count, and value; `None` is the place behind the directory."""


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """An image as a file of this format."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def grey() -> Image.Image:
    """A small image whose pixels cost nothing."""
    return Image.new("RGB", (SIDE, SIDE), "grey")


def directory(tags: Sequence[Tag], content: bytes) -> bytes:
    """A TIFF of these tags, and behind them what they say is theirs."""
    place = 8 + 2 + 12 * len(tags) + 4
    table = b"".join(struct.pack("<HHII", tag, kind, count, place if value is None else value) for tag, kind, count, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + table + b"\0\0\0\0" + content


def sharing(count: int, size: int) -> list[Tag]:
    """So many tags that all say that the same bytes are theirs."""
    return [(20_000 + number, 1, size, None) for number in range(count)]


def tiff(tags: Sequence[Tag], size: int) -> bytes:
    """A grey TIFF with further tags over `size` bytes."""
    plain: list[Tag] = [(256, 4, 1, SIDE), (257, 4, 1, SIDE), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, None)]
    plain += [(277, 3, 1, 1), (278, 4, 1, SIDE), (279, 4, 1, SIDE * SIDE)]
    return directory(sorted([*plain, *tags], key=lambda tag: tag[0]), b"\x55" * size)


def exif(count: int, size: int) -> bytes:
    """Exif data of so many tags over the same bytes."""
    return directory(sharing(count, size), b"\x55" * size)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(chunks: bytes) -> bytes:
    """A PNG with these chunks before its pixels."""
    plain = encoded(grey(), "PNG")
    return plain[:33] + chunks + plain[33:]


def jpeg(contents: Sequence[bytes]) -> bytes:
    """A JPEG with an Exif segment for each of these."""
    plain = encoded(grey(), "JPEG")
    segments = b"".join(b"\xff\xe1" + struct.pack(">H", len(content) + 8) + b"Exif\0\0" + content for content in contents)
    return plain[:2] + segments + plain[2:]


def webp(content: bytes) -> bytes:
    """A WebP with this Exif data."""
    side = struct.pack("<I", SIDE - 1)[:3]
    chunks = [(b"VP8X", struct.pack("<I", 8) + side + side), (b"VP8L", encoded(grey(), "WEBP", lossless=True)[20:]), (b"EXIF", content)]
    body = b"WEBP" + b"".join(kind + struct.pack("<I", len(each)) + each + b"\0" * (len(each) % 2) for kind, each in chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def avif(content: bytes) -> bytes:
    """An AVIF with this Exif data, which no encoder would write: it stands where an encoder wrote another of its length."""
    stand_in = b"II*\0\x08\0\0\0\0\0".ljust(len(content), b"\0")
    return encoded(grey(), "AVIF", exif=b"Exif\0\0" + stand_in).replace(stand_in, content)


def split_exif(data: bytes) -> list[bytes]:
    """Exif data in parts that segments of a JPEG hold."""
    return [data[at : at + SEGMENT] for at in range(0, len(data), SEGMENT)]


HOSTILE: dict[str, Callable[[], bytes]] = {
    "TIFF, 300 tags over the same 5 MB": lambda: tiff(sharing(300, 5_000_000), 5_000_000),
    "TIFF, 40,000 tags over the same 50 kB": lambda: tiff(sharing(40_000, 50_000), 50_000),
    "TIFF, one tag of 2,400,000 rational numbers": lambda: tiff([(282, 5, 2_400_000, None)], 19_200_000),
    "PNG, 300 Exif tags over the same 5 MB": lambda: png(png_chunk(b"eXIf", exif(300, 5_000_000))),
    "JPEG, the same": lambda: jpeg(split_exif(exif(300, 5_000_000))),
    "WebP, the same": lambda: webp(exif(300, 5_000_000)),
    "AVIF, the same": lambda: avif(exif(300, 5_000_000)),
    "PNG, 40,000 Exif tags over the same 50 kB": lambda: png(png_chunk(b"eXIf", exif(40_000, 50_000))),
    "PNG, 5,000 packed profiles": lambda: png(png_chunk(b"iCCP", b"k\0\0" + zlib.compress(b"a" * 1_000_000)) * 5_000),
    "JPEG, 5,000 Exif segments": lambda: jpeg([b"\0" * 1_980] * 5_000),
}
"""Name to builder of files whose metadata costs a decoder time or memory."""

LARGE: dict[str, tuple[int, Callable[[], bytes]]] = {
    "eight solid PNGs of 64 megapixels, RGB": (8, lambda: encoded(Image.new("RGB", (8000, 8000), "pink"), "PNG")),
    "eight solid PNGs of 64 megapixels, RGBA": (8, lambda: encoded(Image.new("RGBA", (8000, 8000), "pink"), "PNG")),
    "eight solid JPEGs of 64 megapixels": (8, lambda: encoded(Image.new("RGB", (8000, 8000), "pink"), "JPEG")),
    "one solid WebP of 64 megapixels": (1, lambda: encoded(Image.new("RGB", (8000, 8000), "pink"), "WEBP")),
}
"""Name to how many images one request holds, and the builder of one of them."""


def well_meant(checkout: Path, folder: Path) -> list[Path]:
    """The image files of a checkout's tests and playground, and one of each format that this Pillow writes, made in a folder."""
    found = [path for part in ("tests", "playground") for path in (checkout / part).rglob("*") if path.suffix.lower() in SUFFIXES]
    noise = Image.effect_noise((640, 480), 60).convert("RGB")
    for kind in sorted({"JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "AVIF"} & set(Image.SAVE)):
        path = folder / f"noise.{kind.lower()}"
        path.write_bytes(encoded(noise, kind))
        found.append(path)
    return sorted(found)
