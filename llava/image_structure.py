"""Walks over the structure of an image file, before a decoder sees it.

A decoder's work is not bounded by the size in the header alone: a progressive JPEG may pass over its picture thousands of times for some
bytes each, a TIFF of 16 x 16 pixels may consist of one tile of gigapixels, and Pillow joins the comments of a GIF one by one. What no
encoder writes is refused here, in a time that is small beside the reading of the bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from PIL import TiffImagePlugin

MAX_SCANS = 100
"""Passes of a progressive JPEG over its picture; encoders make about ten, and each takes a decoder as long as a whole picture."""
MAX_SEGMENTS = 10_000
"""Segments of a JPEG."""
MAX_CHUNKS = 20_000
"""Chunks of a PNG; 20 MB in libpng's usual pieces are 2,500."""
MAX_BLOCKS = 4_000
"""Blocks of a GIF before its first frame, the parts of comments counted one by one."""
MAX_JUNK = 65_536
"""Bytes of a JPEG before its first scan that belong to no segment."""
MAX_PPM_HEADER = 1_024
"""Bytes of a PPM's header, comments included."""
MAX_SLOW_BYTES = 1_000_000
"""Bytes of a file that Pillow decodes step by step in Python: numbers written out in a PPM, run lengths in a BMP."""

_START_OF_SCAN, _END_OF_IMAGE = b"\xff\xda", b"\xff\xd9"
_JPEG_MARK = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
"""A mark with a segment behind it, or the end of the image. Within a scan, a byte of 255 is followed by 0 or a restart mark."""
_PPM_COMMENT = re.compile(rb"#[^\r\n]*")


class StructureError(ValueError):
    """A file that no encoder writes, in one sentence."""


def check_structure(data: bytes) -> None:
    """Refuse a JPEG, PNG, GIF, BMP or PPM file that costs its decoder far more than its picture; other files pass.

    Args:
        data: the whole file; it may be broken in any way.

    Raises:
        StructureError: see the limits above.
    """
    for start, check in _CHECKS:
        if data.startswith(start):
            check(data)


def check_tiff(image: TiffImagePlugin.TiffImageFile, data: bytes, max_pixels: int) -> None:
    """Refuse a TIFF whose tiles are beyond a picture's largest size, or whose strips or tiles are JPEGs of too many scans.

    Args:
        image: with its header read. data: the whole file.

    Raises:
        StructureError: as said.
    """
    tile = image.tag_v2.get(TiffImagePlugin.TILEWIDTH, 0), image.tag_v2.get(TiffImagePlugin.TILELENGTH, 0)
    if not all(isinstance(side, int) for side in tile) or tile[0] * tile[1] > max_pixels:
        raise StructureError(f"the image has tiles of {tile[0]} x {tile[1]} pixels, expected at most {max_pixels:,} in all: save it again")
    if image.info.get("compression") in ("jpeg", "tiff_jpeg"):
        parts = image.tag_v2.get(TiffImagePlugin.TILEOFFSETS) or image.tag_v2.get(TiffImagePlugin.STRIPOFFSETS) or ()
        _check_scans(data.count(_START_OF_SCAN), MAX_SCANS + len(parts))


def _check_jpeg(data: bytes) -> None:
    # What lies within a segment, as a thumbnail does, or behind the end mark, does not count.
    scans, place = 0, 2
    for _ in range(MAX_SEGMENTS):
        mark = _JPEG_MARK.search(data, place)
        start = len(data) if mark is None else mark.start()
        if not scans and start - place > MAX_JUNK:
            raise StructureError(f"the JPEG image has {start - place:,} bytes between two segments: save it again")
        if mark is None or mark[0] == _END_OF_IMAGE:
            return
        scans += mark[0] == _START_OF_SCAN
        _check_scans(scans, MAX_SCANS)
        place = mark.end() + int.from_bytes(data[mark.end() : mark.end() + 2], "big")
    raise StructureError(f"the JPEG image has more than {MAX_SEGMENTS:,} segments: save it again")


def _check_scans(found: int, allowed: int) -> None:
    if found > allowed:
        raise StructureError(f"the JPEG image has more than {allowed:,} scans: save it again")


def _check_png(data: bytes) -> None:
    place = 8
    for _ in range(MAX_CHUNKS):
        if place >= len(data) or data[place + 4 : place + 8] == b"IEND":
            return
        place += 12 + int.from_bytes(data[place : place + 4], "big")
    raise StructureError(f"the PNG image has more than {MAX_CHUNKS:,} chunks: save it again")


def _check_gif(data: bytes) -> None:
    flags = data[10] if len(data) > 10 else 0
    place = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    in_extension = False
    for _ in range(MAX_BLOCKS):
        if place >= len(data):
            return
        first = data[place]
        if in_extension:  # parts with their lengths before them, up to an empty one
            in_extension, place = first > 0, place + 1 + first
        elif first == 0x21:  # and the extension's kind
            in_extension, place = True, place + 2
        elif first in (0x2C, 0x3B):  # a frame, or the end
            return
        else:  # decoders pass over what stands between blocks
            place += 1
    raise StructureError(f"the GIF image has more than {MAX_BLOCKS:,} blocks before its first frame: save it again")


def _check_bmp(data: bytes) -> None:
    if len(data) > MAX_SLOW_BYTES and data[14:15] != b"\x0c" and data[30:34] in (b"\1\0\0\0", b"\2\0\0\0"):
        raise StructureError(f"the BMP image has {len(data):,} bytes of run lengths, expected at most {MAX_SLOW_BYTES:,}: save it as PNG")


def _check_ppm(data: bytes) -> None:
    if len(data) > MAX_SLOW_BYTES and data[1:2] in (b"1", b"2", b"3"):
        raise StructureError(f"the PPM image has {len(data):,} bytes of text, expected at most {MAX_SLOW_BYTES:,}: save it as PNG")
    wanted = 3 if data[1:2] in b"14" else 4  # bitmaps have no largest value
    if len(data) > MAX_PPM_HEADER and len(_PPM_COMMENT.sub(b"", data[:MAX_PPM_HEADER]).split()) < wanted:
        raise StructureError(f"the PPM image has a header of more than {MAX_PPM_HEADER:,} bytes: save it again")


_CHECKS: tuple[tuple[bytes, Callable[[bytes], None]], ...] = (
    (b"\xff\xd8", _check_jpeg),
    (b"\x89PNG", _check_png),
    (b"GIF8", _check_gif),
    (b"BM", _check_bmp),
    (b"P", _check_ppm),
)
