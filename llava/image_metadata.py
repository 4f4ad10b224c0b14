"""The orientation of an image, the only thing that is read of its metadata, by a reader whose work is bounded.

Exif data is a TIFF directory: a list of tags, each with its value or with the place where its value lies. Places may overlap, so that a
library that reads all values of a small file can be led to take gigabytes. Here only entries are looked at, and no value is followed that
is not asked for.

Sources: TIFF 6.0, section 2, and its 64-bit form, BigTIFF; Exif 3.0 (CIPA DC-008), section 4.6; XMP's `tiff:Orientation`.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

MAX_TAGS = 4_096
"""Tags of one directory; cameras write some sixty."""

ORIENTATION, XMP = 274, 700
TYPE_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
"""Bytes of one value of each type."""
_INTEGERS = {3: "H", 4: "I", 8: "h", 9: "i"}
_ORDERS = {b"II": "<", b"MM": ">"}
_VERSIONS = {b"*\0": False, b"\0*": False, b"+\0": True}
"""Whether the numbers have 64 bits. Pillow takes BigTIFF in this byte order alone, and the other mark in both."""
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')


@dataclass(frozen=True)
class Entry:
    """One tag of a directory. value: the field that holds the value itself, or, where it is too short for that, the value's place."""

    tag: int
    type: int
    count: int
    value: bytes

    @property
    def size(self) -> int:
        """Bytes of the value; 0 for a type that nobody knows."""
        return self.count * TYPE_SIZES.get(self.type, 0)

    @property
    def is_inline(self) -> bool:
        return self.size <= len(self.value)


@dataclass(frozen=True)
class Directory:
    """The first directory of a TIFF file or of Exif data. order: `<` or `>`, as `struct` has it. is_big: BigTIFF, with 64-bit numbers.

    entries: at most `MAX_TAGS`. count: how many the file says there are.
    """

    order: str
    is_big: bool
    entries: tuple[Entry, ...]
    count: int

    def find(self, tag: int) -> Entry | None:
        return next((entry for entry in self.entries if entry.tag == tag), None)

    def content(self, entry: Entry, data: bytes) -> bytes:
        """An entry's value, as far as the file that the directory was read from reaches."""
        if entry.is_inline:
            return entry.value[: entry.size]
        (place,) = struct.unpack(self.order + ("Q" if self.is_big else "I"), entry.value)
        return data[place : place + entry.size]


def read_directory(data: bytes) -> Directory | None:
    """Read the first directory of a TIFF file or of Exif data without its prefix; `None` where there is none."""
    order, is_big = _ORDERS.get(data[:2]), _VERSIONS.get(data[2:4])
    if order is None or is_big is None:
        return None
    form = struct.Struct(order + ("HHQ8s" if is_big else "HHI4s"))
    place, number = (_number(data, 8, order + "Q"), "Q") if is_big else (_number(data, 4, order + "I"), "H")
    count = _number(data, place, order + number)
    begin = place + struct.calcsize(number)
    whole = min(count, MAX_TAGS, max(0, len(data) - begin) // form.size)
    entries = tuple(Entry(*fields) for fields in form.iter_unpack(data[begin : begin + whole * form.size]))
    return Directory(order, is_big, entries, count)


def _number(data: bytes, place: int, form: str) -> int:
    """An unsigned number of the file; 0 beyond its end."""
    size = struct.calcsize(form)
    return int.from_bytes(data[place : place + size], "little" if form[0] == "<" else "big") if place + size <= len(data) else 0


def read_orientation(exif: bytes, xmp: bytes) -> int:
    """How an image is to be turned: 1 (not at all) to 8, as Exif numbers it.

    Args:
        exif: Exif data with or without its prefix, or a TIFF file, or nothing. xmp: an XMP packet, looked at where Exif does not say.
    """
    for _ in range(2):
        exif = exif.removeprefix(b"Exif\0\0")
    directory = read_directory(exif)
    entry = directory.find(ORIENTATION) if directory else None
    if directory and entry and entry.type in _INTEGERS and entry.count >= 1:
        size = TYPE_SIZES[entry.type]
        value = directory.content(entry, exif)[:size]
        found = struct.unpack(directory.order + _INTEGERS[entry.type], value)[0] if len(value) == size else 1
    else:
        match = _XMP_ORIENTATION.search(xmp)
        found = int(match[1]) if match else 1
    return found if 1 <= found <= 8 else 1
