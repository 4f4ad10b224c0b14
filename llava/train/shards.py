"""Where images come from: a folder, a zip or tar shard, or several of these under prefixes.

Nothing is extracted to disk. The members of a shard are listed once in an index that all processes map into memory; loading an image is
then one read at an offset. Its size is checked before it is read, and `llava.images` checks the rest.
"""

from __future__ import annotations

import bisect
import hashlib
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
from PIL import Image

from llava.images import MAX_BYTES, ImageError, load_image
from llava.train.derived_files import derived_file, read_arrow, write_arrow

SHARD_SCHEMA = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("stored", pa.int64(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("method", pa.int16(), nullable=False),
        pa.field("crc", pa.uint32(), nullable=False),
    ]
)
"""Members sorted by name: where each starts, its bytes there, its bytes unpacked, and how it is packed."""

RAW = -1
"""Method of a tar's members: the image itself is at the offset. A zip has a header there, and its own methods 0 and 8."""
_ZIP_HEADER = struct.Struct("<4s22xHH")
_ZIP_MAGIC = b"PK\x03\x04"


class MissingImageError(ImageError):
    """There is no image of this name."""


class ImageSource(Protocol):
    """A place that images are loaded from by name."""

    @property
    def fingerprint(self) -> str:
        """A digest of the images, as far as they are known without reading them; part of the fingerprint of the data."""

    def key(self, name: str) -> str:
        """A name that is unique among all sources."""

    def has(self, name: str) -> bool:
        """Whether there is such an image."""

    def load(self, name: str) -> Image.Image:
        """The image as RGB.

        Raises:
            MissingImageError: there is none of this name.
            ImageError: it is broken, or too large.
        """


@dataclass(frozen=True)
class ImageFolder:
    """Images as files.

    Attributes:
        path: what their names are relative to.
    """

    path: Path = Path()

    @property
    def fingerprint(self) -> str:
        """Empty: the files of a folder are not looked at."""
        return ""

    def key(self, name: str) -> str:
        """The file's path."""
        return str(self.path / name)

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        return (self.path / name).is_file()

    def load(self, name: str) -> Image.Image:
        """See `ImageSource.load`."""
        try:
            return load_image(self.path / name)
        except ImageError as error:
            if self.has(name):
                raise ImageError(f"image {name!r}: {error}") from error
            raise MissingImageError(str(error)) from error


class _Member(NamedTuple):
    name: str
    offset: int
    stored: int
    size: int
    method: int
    crc: int


class ImageShard:
    """Images in a zip or an uncompressed tar. Every process opens the file for itself when it first reads from it.

    Args:
        path: the shard.
        cache: folder for its index, see `llava.train.derived_files`.

    Raises:
        ValueError: not a zip or tar that allows random access.
    """

    def __init__(self, path: Path, cache: str | Path | None = None) -> None:
        self.path = path
        self._index = derived_file(path, "shard", cache, build_shard_index)
        _, self._table, facts = read_arrow(self._index)
        self._names = self._table.column("name")
        self.fingerprint: str = facts["fingerprint"]
        self._file: Any = None
        self._process = -1

    def __reduce__(self) -> tuple[Any, ...]:
        return ImageShard, (self.path, self._index.parent)

    def key(self, name: str) -> str:
        """The shard's path and the name."""
        return f"{self.path}/{name}"

    def has(self, name: str) -> bool:
        """Whether the shard has such a member."""
        return self._find(name) is not None

    def load(self, name: str) -> Image.Image:
        """See `ImageSource.load`."""
        member = self._find(name)
        if member is None:
            raise MissingImageError(f"there is no image {name!r} in {self.path}: check the names and the shard")
        if max(member.size, member.stored) > MAX_BYTES:
            raise ImageError(f"image {name!r} in {self.path} has {member.size:,} bytes, expected at most {MAX_BYTES:,}: scale it down")
        try:
            return load_image(self._read(member))
        except ImageError as error:
            raise ImageError(f"image {name!r} in {self.path}: {error}") from error

    def _find(self, name: str) -> _Member | None:
        place = bisect.bisect_left(range(len(self._names)), name, key=lambda index: self._names[index].as_py())
        if place == len(self._names) or self._names[place].as_py() != name:
            return None
        return _Member(**self._table.slice(place, 1).to_pylist()[0])

    def _read(self, member: _Member) -> bytes:
        if self._process != os.getpid():
            self._file, self._process = self.path.open("rb"), os.getpid()
        file, offset = self._file.fileno(), member.offset
        if member.method == RAW:
            data = os.pread(file, member.stored, offset)
        else:
            header = os.pread(file, 30, offset)
            if len(header) < 30 or not header.startswith(_ZIP_MAGIC):
                raise ImageError("the shard is broken or was modified: write it again")
            _, name_length, extra_length = _ZIP_HEADER.unpack(header)
            data = os.pread(file, member.stored, offset + 30 + name_length + extra_length)
        if len(data) < member.stored:
            raise ImageError(f"the shard ends after {len(data):,} of {member.stored:,} bytes: copy it again")
        return data if member.method == RAW else _unpacked(data, member)


def _unpacked(data: bytes, member: _Member) -> bytes:
    try:
        if member.method == zipfile.ZIP_DEFLATED:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, member.size + 1)
    except zlib.error as error:
        raise ImageError("the compressed bytes are broken: write the shard again") from error
    if len(data) != member.size or zlib.crc32(data) != member.crc:
        raise ImageError("the bytes do not have the size and checksum that the shard states: write it again")
    return data


@dataclass(frozen=True)
class ImageMap:
    """Several sources, chosen by the prefix of a name.

    Attributes:
        sources: (prefix, sources) with the longest prefix first; the prefix is removed before the sources are asked in order.
    """

    sources: tuple[tuple[str, tuple[ImageSource, ...]], ...]

    @property
    def fingerprint(self) -> str:
        """Prefixes and the fingerprints of their sources."""
        return ";".join(f"{prefix}={','.join(source.fingerprint for source in sources)}" for prefix, sources in self.sources)

    def key(self, name: str) -> str:
        """The key at the source that has the image."""
        source, rest = self._choose(name)
        return source.key(rest)

    def has(self, name: str) -> bool:
        """Whether one of the sources has it."""
        try:
            source, rest = self._choose(name)
        except MissingImageError:
            return False
        return source.has(rest)

    def load(self, name: str) -> Image.Image:
        """See `ImageSource.load`."""
        source, rest = self._choose(name)
        return source.load(rest)

    def _choose(self, name: str) -> tuple[ImageSource, str]:
        for prefix, sources in self.sources:
            if name.startswith(prefix):
                rest = name[len(prefix) :]
                return next((source for source in sources[:-1] if source.has(rest)), sources[-1]), rest
        raise MissingImageError(
            f"image {name!r} starts with none of {', '.join(repr(prefix) for prefix, _ in self.sources)}: add its prefix to the manifest"
        )


def open_images(path: str | Path, cache: str | Path | None = None) -> ImageSource:
    """A folder or shard of images.

    Raises:
        ValueError: there is neither at the path.
    """
    path = Path(path)
    if path.is_dir():
        return ImageFolder(path)
    if not path.exists():
        raise ValueError(f"there is no folder or shard of images at {path}; check the path.")
    return ImageShard(path, cache)


def map_images(sources: Mapping[str, Sequence[ImageSource]]) -> ImageMap:
    """Sources by prefix; the longest prefix that fits a name decides."""
    return ImageMap(tuple((prefix, tuple(sources[prefix])) for prefix in sorted(sources, key=len, reverse=True)))


def build_shard_index(shard: Path, target: Path) -> None:
    """Write the index of a shard.

    Raises:
        ValueError: not a zip or an uncompressed tar, or one with encrypted members or an unsupported compression.
    """
    try:
        members = {member.name.removeprefix("./"): member for member in _members(shard)}
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise ValueError(
            f"{shard} cannot be read as a zip or an uncompressed tar ({error}); pack the images again, without compressing the tar."
        ) from error
    names = sorted(members)
    digest = hashlib.sha256()
    columns: list[list[Any]] = [names, [], [], [], [], []]
    for name in names:
        member = members[name]
        for column, value in zip(columns[1:], member[1:], strict=True):
            column.append(value)
        digest.update(f"{name} {member.size} {member.crc}\n".encode())
    batch = pa.record_batch(columns, schema=SHARD_SCHEMA)
    write_arrow(target, SHARD_SCHEMA, [batch], lambda: {"fingerprint": digest.hexdigest()})


def _members(shard: Path) -> Iterator[_Member]:
    if zipfile.is_zipfile(shard):
        yield from _zip_members(shard)
        return
    with tarfile.open(shard, "r:", errors="replace") as tar:
        for entry in tar:
            if entry.isreg() and not entry.issparse():
                yield _Member(entry.name, entry.offset_data, entry.size, entry.size, RAW, 0)
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every entry it has seen; a shard has too many


def _zip_members(shard: Path) -> Iterator[_Member]:
    with zipfile.ZipFile(shard) as archive:
        for entry in archive.infolist():
            if entry.is_dir():
                continue
            if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(
                    f"{entry.filename!r} in {shard} is encrypted or compressed by method {entry.compress_type}, expected stored or "
                    "deflated; pack the images again."
                )
            yield _Member(entry.filename, entry.header_offset, entry.compress_size, entry.file_size, entry.compress_type, entry.CRC)
