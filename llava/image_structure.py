"""Takes an image file apart before a decoder sees it, and leaves nothing in it but what its pixels need.

A decoder's work is not bounded by the size in the header alone: a progressive JPEG may pass over its image thousands of times for some
bytes each, a TIFF of 16 x 16 pixels may consist of one tile of gigapixels, and Pillow joins the comments of a GIF one by one. What no
encoder writes is refused here, in a time that is small beside the reading of the bytes.

Nor is it bounded by the file: Pillow reads metadata before any pixel, whatever it is and whether anybody asks. Exif and TIFF tags may
share their bytes, Exif segments are joined one by one, profiles and texts unpack. So metadata is taken out: profiles, texts, thumbnails,
further frames and all tags that say nothing about how pixels are stored. What is left of it is Exif data and XMP as they stand, for
`llava.image_metadata.read_orientation`.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llava.image_metadata import MAX_TAGS, XMP, Directory, Entry, read_directory

MAX_SCANS = 100
"""Passes of a progressive JPEG over its image; encoders make about ten, and each takes a decoder as long as a whole image."""
MAX_SEGMENTS = 10_000
"""Segments of a JPEG."""
MAX_TABLE_BYTES = 65_536
"""Of all segments before a JPEG's first scan that are not metadata; encoders write some hundreds."""
MAX_CHUNKS = 20_000
"""Chunks of a PNG or a WebP; 20 MB in libpng's usual pieces are 2,500."""
MAX_TEXT_BYTES = 1_000_000
"""Unpacked bytes of a PNG's compressed Exif data or XMP; the rest is not looked at."""
MAX_BLOCKS = 4_000
"""Blocks of a GIF before its first frame, the parts of comments counted one by one."""
MAX_BOXES = 4_096
"""Boxes of an AVIF, those within others counted."""
MAX_JUNK = 65_536
"""Bytes of a JPEG before its first scan that belong to no segment."""
MAX_PPM_HEADER = 1_024
"""Bytes of a PPM's header, comments included."""
MAX_SLOW_BYTES = 1_000_000
"""Bytes of a file that Pillow decodes step by step in Python: numbers written out in a PPM, run lengths in a BMP."""
MAX_PARTS = 250_000
"""Strips or tiles of a TIFF: the smallest tiles have 16 pixels a side, and 64 megapixels hold this many. They take Pillow a second."""

_START_OF_SCAN, _END_OF_IMAGE = b"\xff\xda", b"\xff\xd9"
_JPEG_MARK = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
"""A mark with a segment behind it, or the end of the image. Within a scan, a byte of 255 is followed by 0 or a restart mark."""
_JPEG_METADATA = re.compile(rb"\xff[\xe1-\xed\xef\xfe]")
_JPEG_COLOURS = {b"\xff\xe0": b"JFIF\0", b"\xff\xee": b"Adobe"}
"""The two application segments that say what the numbers of a pixel mean, and how they begin."""
_EXIF_MARK, _XMP_MARK = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
_PPM_COMMENT = re.compile(rb"#[^\r\n]*")
_PPM_HEADER = re.compile(rb"(P[56y0]\w{0,4})" + 3 * rb"\s+(?:#[^\r\n]*[\r\n]\s*)*(\d{1,10})" + rb"\s")
"""Of a PPM of bytes: what it is, its width and height, and the largest value of a colour."""
_PPM_BANDS = {b"P5": 1, b"P6": 3}

_INTEGERS, _BYTES, _RATIONALS = frozenset((1, 3, 4, 16)), frozenset((1, 7)), frozenset((3, 4, 5))
_TIFF_TAGS: dict[int, tuple[int, frozenset[int]]] = {
    256: (1, _INTEGERS),  # ImageWidth
    257: (1, _INTEGERS),  # ImageLength
    258: (16, _INTEGERS),  # BitsPerSample
    259: (1, _INTEGERS),  # Compression
    262: (1, _INTEGERS),  # PhotometricInterpretation
    266: (1, _INTEGERS),  # FillOrder
    273: (MAX_PARTS, _INTEGERS),  # StripOffsets
    277: (1, _INTEGERS),  # SamplesPerPixel
    278: (1, _INTEGERS),  # RowsPerStrip
    279: (MAX_PARTS, _INTEGERS),  # StripByteCounts
    284: (1, _INTEGERS),  # PlanarConfiguration
    292: (1, _INTEGERS),  # T4Options
    293: (1, _INTEGERS),  # T6Options
    317: (1, _INTEGERS),  # Predictor
    320: (3 * 65_536, _INTEGERS),  # ColorMap
    322: (1, _INTEGERS),  # TileWidth
    323: (1, _INTEGERS),  # TileLength
    324: (MAX_PARTS, _INTEGERS),  # TileOffsets
    325: (MAX_PARTS, _INTEGERS),  # TileByteCounts
    332: (1, _INTEGERS),  # InkSet
    338: (16, _INTEGERS),  # ExtraSamples
    339: (16, _INTEGERS),  # SampleFormat
    347: (65_536, _BYTES),  # JPEGTables
    512: (1, _INTEGERS),  # JPEGProc
    513: (1, _INTEGERS),  # JPEGInterchangeFormat
    514: (1, _INTEGERS),  # JPEGInterchangeFormatLength
    515: (1, _INTEGERS),  # JPEGRestartInterval
    519: (16, _INTEGERS),  # JPEGQTables
    520: (16, _INTEGERS),  # JPEGDCTables
    521: (16, _INTEGERS),  # JPEGACTables
    529: (3, _RATIONALS),  # YCbCrCoefficients
    530: (2, _INTEGERS),  # YCbCrSubSampling
    531: (1, _INTEGERS),  # YCbCrPositioning
    532: (6, _RATIONALS),  # ReferenceBlackWhite
}
"""The tags that say how pixels are stored: how many values each may have, and of which types."""
_COMPRESSION, _TILE_WIDTH, _TILE_LENGTH = 259, 322, 323
_JPEG_COMPRESSIONS = (6, 7)


class StructureError(ValueError):
    """A file that no encoder writes, in one sentence."""


@dataclass(frozen=True)
class BareImage:
    """An image file without its metadata. format: by its first bytes, as Pillow calls it. exif, xmp: what was taken out, unread."""

    format: str
    data: bytes
    exif: bytes = b""
    xmp: bytes = b""


def image_format(data: bytes) -> str:
    """Pillow's name of the format that a file's first bytes say it has, whatever its name or its sender says; empty for others."""
    return next((name for start, name in _STARTS if start.match(data)), "")


def bare_image(data: bytes, max_pixels: int) -> BareImage | None:
    """Take the metadata out of an image file; `None` where it is of no format known here.

    Args:
        data: the whole file; it may be broken in any way. max_pixels: of an image, and so of a TIFF's tile.

    Raises:
        StructureError: the file would cost its decoder far more than its pixels do; see the limits above.
    """
    name = image_format(data)
    return _WALKS[name](name, data, max_pixels) if name else None


def _bare_jpeg(name: str, data: bytes, max_pixels: int) -> BareImage:
    # What lies within a segment, as a thumbnail does, or behind the end mark, does not count.
    kept, exif, xmp = [data[:2]], list[bytes](), b""
    scans, place, first_scan = 0, 2, len(data)
    for _ in range(MAX_SEGMENTS):
        mark = _JPEG_MARK.search(data, place)
        start = len(data) if mark is None else mark.start()
        if not scans and start - place > MAX_JUNK:
            raise StructureError(f"the JPEG image has {start - place:,} bytes between two segments: save it again")
        if mark is None or mark[0] == _END_OF_IMAGE:
            break
        place = mark.end() + int.from_bytes(data[mark.end() : mark.end() + 2], "big")
        if mark[0] == _START_OF_SCAN:
            scans, first_scan = scans + 1, min(first_scan, start)
            _check_scans(scans, MAX_SCANS)
        elif not scans and _JPEG_METADATA.match(mark[0]):
            content = data[mark.end() + 2 : place]
            if mark[0] == b"\xff\xe1" and content.startswith(_EXIF_MARK):
                exif.append(content.removeprefix(_EXIF_MARK))
            elif mark[0] == b"\xff\xe1" and content.startswith(_XMP_MARK):
                xmp = content.removeprefix(_XMP_MARK)
        elif not scans and data.startswith(_JPEG_COLOURS.get(mark[0], b""), mark.end() + 2):
            kept.append(data[start:place])
    else:
        raise StructureError(f"the JPEG image has more than {MAX_SEGMENTS:,} segments: save it again")
    if (tables := sum(map(len, kept))) > MAX_TABLE_BYTES:
        raise StructureError(f"the JPEG image has {tables:,} bytes of tables, expected at most {MAX_TABLE_BYTES:,}: save it again")
    return BareImage(name, b"".join([*kept, memoryview(data)[first_scan:]]), b"".join(exif), xmp)


def _check_scans(found: int, allowed: int) -> None:
    if found > allowed:
        raise StructureError(f"the JPEG image has more than {allowed:,} scans: save it again")


def _bare_png(name: str, data: bytes, max_pixels: int) -> BareImage:
    view, kept = memoryview(data), [memoryview(data)[:8]]
    metadata: dict[bytes, bytes] = {}
    place = 8
    for _ in range(MAX_CHUNKS):
        kind = data[place + 4 : place + 8]
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        if kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            kept.append(view[place:end])
        elif kind == b"eXIf":
            metadata[b"exif"] = b"tEXt" + data[place + 8 : end - 4]
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            key = data[place + 8 : place + 88].partition(b"\0")[0]
            if key in (b"exif", b"Raw profile type exif", b"XML:com.adobe.xmp"):
                metadata[key] = kind + data[place + 8 + len(key) + 1 : end - 4]
        if end >= len(data) or kind == b"IEND":
            break
        place = end
    else:
        raise StructureError(f"the PNG image has more than {MAX_CHUNKS:,} chunks: save it again")
    texts = {key: _png_text(chunk) for key, chunk in metadata.items()}
    exif = texts.get(b"exif") or _unhex(texts.get(b"Raw profile type exif", b""))
    return BareImage(name, b"".join(kept), exif, texts.get(b"XML:com.adobe.xmp", b""))


def _png_text(chunk: bytes) -> bytes:
    """The text of a chunk of which its kind and all behind its key are given, unpacked as far as `MAX_TEXT_BYTES`."""
    kind, rest = chunk[:4], chunk[4:]
    packed = kind == b"zTXt" or (kind == b"iTXt" and rest[:1] == b"\1")
    if kind == b"zTXt":
        rest = rest[1:]
    elif kind == b"iTXt":  # two flags, then language and translated key, each ended by a zero
        rest = rest[2:].partition(b"\0")[2].partition(b"\0")[2]
    try:
        return zlib.decompressobj().decompress(rest, MAX_TEXT_BYTES) if packed else rest
    except zlib.error:
        return b""


def _unhex(text: bytes) -> bytes:
    """Exif data as ImageMagick writes it into a text: a line without anything, its name, its length, and then digits."""
    digits = b"".join(text.split(b"\n", 3)[3:]).replace(b"\n", b"")  # not a piece per line: a file may have 20 million
    try:
        return bytes.fromhex(digits.decode("ascii", "replace"))
    except ValueError:
        return b""


def _bare_tiff(name: str, data: bytes, max_pixels: int) -> BareImage:
    directory = read_directory(data)
    assert directory is not None, "the first bytes were those of a TIFF"
    if directory.count > MAX_TAGS:
        raise StructureError(f"the TIFF image has {directory.count:,} tags, expected at most {MAX_TAGS:,}: save it again")
    entries = {entry.tag: entry for entry in reversed(directory.entries) if entry.tag in _TIFF_TAGS and entry.size}
    for tag, entry in entries.items():
        most, types = _TIFF_TAGS[tag]
        if entry.count > most or entry.type not in types:
            found, known = f"{entry.count:,} values of type {entry.type}", ", ".join(map(str, sorted(types)))
            raise StructureError(f"the TIFF image has {found} in tag {tag}, expected at most {most:,} of type {known}: save it again")
    _check_tiff_parts(directory, entries, data, max_pixels)
    xmp = directory.find(XMP)
    return BareImage(name, _with_directory(data, directory, sorted(entries.items())), data, directory.content(xmp, data) if xmp else b"")


def _check_tiff_parts(directory: Directory, entries: dict[int, Entry], data: bytes, max_pixels: int) -> None:
    """Refuse tiles beyond an image's largest size, and strips or tiles that are JPEGs of too many scans."""

    def number(tag: int) -> int:
        content = directory.content(entries[tag], data) if tag in entries else b""
        return int.from_bytes(content, "little" if directory.order == "<" else "big")

    if number(_TILE_WIDTH) * number(_TILE_LENGTH) > max_pixels:
        tile = f"{number(_TILE_WIDTH)} x {number(_TILE_LENGTH)}"
        raise StructureError(f"the image has tiles of {tile} pixels, expected at most {max_pixels:,} in all: save it again")
    if number(_COMPRESSION) in _JPEG_COMPRESSIONS:
        parts = max((entries[tag].count for tag in (273, 324) if tag in entries), default=0)
        _check_scans(data.count(_START_OF_SCAN), MAX_SCANS + parts)


def _with_directory(data: bytes, directory: Directory, entries: list[tuple[int, Entry]]) -> bytes:
    """The file with a new first and only directory behind all else, so that whatever a place says stays true."""
    order, big = directory.order, directory.is_big
    head, place = (8, order + "Q") if big else (4, order + "I")
    padded = len(data) + len(data) % 2
    table = [struct.pack(order + ("HHQ8s" if big else "HHI4s"), tag, entry.type, entry.count, entry.value) for tag, entry in entries]
    number = struct.pack(order + ("Q" if big else "H"), len(table))
    start = data[:head] + struct.pack(place, padded)
    return b"".join([start, memoryview(data)[len(start) :], b"\0" * (padded - len(data)), number, *table, struct.pack(place, 0)])


def _bare_webp(name: str, data: bytes, max_pixels: int) -> BareImage:
    # Its decoder hands Exif data and XMP over as they stand, and nobody else reads them.
    place = 12
    for _ in range(MAX_CHUNKS):
        if place >= len(data):
            return BareImage(name, data)
        length = int.from_bytes(data[place + 4 : place + 8], "little")
        place += 8 + length + length % 2
    raise StructureError(f"the WebP image has more than {MAX_CHUNKS:,} chunks: save it again")


def _bare_avif(name: str, data: bytes, max_pixels: int) -> BareImage:
    """Rename its items of Exif data in place: the decoder then passes them by and says, as Exif data, how the file turns the image."""
    renamed = bytearray(data)
    left = MAX_BOXES
    inside = [(0, len(data))]
    while inside:
        place, end = inside.pop()
        while place + 8 <= end:
            left -= 1
            if left < 0:
                raise StructureError(f"the AVIF image has more than {MAX_BOXES:,} boxes: save it again")
            kind, content, following = _box(data, place, end)
            if kind in _BOXES_OF_BOXES:
                inside.append((content + _BOXES_OF_BOXES[kind], following))
            elif kind == b"iinf":  # version and flags, then 16 or 32 bits of a count
                inside.append((content + (6 if data[content : content + 1] == b"\0" else 8), following))
            elif kind == b"infe":  # version and flags, an id of 16 or 32 bits, 16 bits more, and the item's type
                at = content + (10 if data[content : content + 1] == b"\3" else 8)
                if data[at : at + 4] == b"Exif":
                    renamed[at : at + 4] = b"none"
            place = following
    return BareImage(name, bytes(renamed))


_BOXES_OF_BOXES = {b"moov": 0, b"trak": 0, b"meta": 4}
"""Boxes of an AVIF that hold the lists of its items, and how many bytes come before the boxes in them."""


def _box(data: bytes, place: int, end: int) -> tuple[bytes, int, int]:
    """Type of the box at a place, where its content begins and where the next box does.

    Raises:
        StructureError: it ends before it begins, or reaches beyond what it lies in.
    """
    size, kind, content = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8], place + 8
    if size == 1:  # the length has 64 bits and comes behind the type
        size, content = int.from_bytes(data[content : content + 8], "big"), content + 8
    following = place + size if size else end
    if not content <= following <= end:
        raise StructureError(f"the AVIF image has a box of {size:,} bytes where {end - place:,} are left: save it again")
    return kind, content, following


def _bare_gif(name: str, data: bytes, max_pixels: int) -> BareImage:
    flags = data[10] if len(data) > 10 else 0
    place = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    in_extension = False
    for _ in range(MAX_BLOCKS):
        if place >= len(data):
            return BareImage(name, data)
        first = data[place]
        if in_extension:  # parts with their lengths before them, up to an empty one
            in_extension, place = first > 0, place + 1 + first
        elif first == 0x21:  # and the extension's kind
            in_extension, place = True, place + 2
        elif first in (0x2C, 0x3B):  # a frame, or the end
            return BareImage(name, data)
        else:  # decoders pass over what stands between blocks
            place += 1
    raise StructureError(f"the GIF image has more than {MAX_BLOCKS:,} blocks before its first frame: save it again")


def _bare_bmp(name: str, data: bytes, max_pixels: int) -> BareImage:
    if len(data) > MAX_SLOW_BYTES and data[14:15] != b"\x0c" and data[30:34] in (b"\1\0\0\0", b"\2\0\0\0"):
        raise StructureError(f"the BMP image has {len(data):,} bytes of run lengths, expected at most {MAX_SLOW_BYTES:,}: save it as PNG")
    return BareImage(name, data)


def _bare_ppm(name: str, data: bytes, max_pixels: int) -> BareImage:
    if len(data) > MAX_SLOW_BYTES and data[1:2] in (b"1", b"2", b"3"):
        raise StructureError(f"the PPM image has {len(data):,} bytes of text, expected at most {MAX_SLOW_BYTES:,}: save it as PNG")
    wanted = 3 if data[1:2] in b"14" else 4  # bitmaps have no largest value
    if len(data) > MAX_PPM_HEADER and len(_PPM_COMMENT.sub(b"", data[:MAX_PPM_HEADER]).split()) < wanted:
        raise StructureError(f"the PPM image has a header of more than {MAX_PPM_HEADER:,} bytes: save it again")
    return BareImage(name, _ppm_of_whole_bytes(data) if data[1:2] in b"56y0" else data)


def _ppm_of_whole_bytes(data: bytes) -> bytes:
    """A PPM of bytes whose largest value is one that Pillow reads at once; others it reads value by value in Python, to these same numbers.

    Raises:
        StructureError: that would take long, and cannot be spared it: a header or a kind of file that only Pillow knows.
    """
    head = _PPM_HEADER.match(data)
    kind, largest = (head[1], int(head[4])) if head else (b"", 0)
    if largest == 255 or (kind, largest) == (b"P5", 65535):
        return data
    if head is None or kind not in _PPM_BANDS or not 0 < largest < 65536:
        if len(data) > MAX_SLOW_BYTES:
            raise StructureError(f"the PPM image has {len(data):,} bytes and an unusual header: save it as PNG")
        return data
    wide, width, height = largest > 255, int(head[2]), int(head[3])
    stored, scale = (">u2" if wide else "u1"), 65535 if wide and kind == b"P5" else 255
    count = min((len(data) - head.end()) // (1 + wide), width * height * _PPM_BANDS[kind])
    steps = np.rint(np.arange(65536 if wide else 256) / largest * scale).clip(max=scale).astype(">u2" if scale > 255 else "u1")
    return b"%s %d %d %d\n" % (kind, width, height, scale) + steps[np.frombuffer(data, stored, count, head.end())].tobytes()


_STARTS = tuple(
    (re.compile(start, re.DOTALL), name)
    for start, name in (
        (rb"\xff\xd8\xff", "JPEG"),
        (rb"\x89PNG\r\n\x1a\n", "PNG"),
        (rb"GIF8[79]a", "GIF"),
        (rb"RIFF....WEBPVP8[ LX]", "WEBP"),
        (rb"BM", "BMP"),
        (rb"II\*\0|MM\0\*|MM\*\0|II\0\*|II\+\0", "TIFF"),
        (rb"P[0-9fy]", "PPM"),
        (rb"....ftyp(?:avif|avis|mif1|msf1)", "AVIF"),
    )
)
_WALKS: dict[str, Callable[[str, bytes, int], BareImage]] = {
    "PNG": _bare_png,
    "JPEG": _bare_jpeg,
    "GIF": _bare_gif,
    "WEBP": _bare_webp,
    "BMP": _bare_bmp,
    "TIFF": _bare_tiff,
    "PPM": _bare_ppm,
    "AVIF": _bare_avif,
}
FORMATS = tuple(_WALKS)
