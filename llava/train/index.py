"""Rows of LLaVA's JSON or JSONL as an Arrow file that every process maps into memory and none holds.

A source file is read once, piece by piece. Kept for each row are its JSON text as it stands there, its image names and its length in
words, so that lengths and groups come from columns and a row is parsed only when it is read. The file is an ordinary Arrow stream;
`derived_files.py` says where it lies.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llava.json_rows import JsonRow, iter_rows, parse_row
from llava.train.derived_files import LOCK_SECONDS, derived_file, read_arrow, write_arrow
from llava.train.rows import Row, measure

SCHEMA = pa.schema(
    [
        pa.field("row", pa.string(), nullable=False),
        pa.field("image", pa.string(), nullable=False),
        pa.field("words", pa.int32(), nullable=False),
        pa.field("answered", pa.bool_(), nullable=False),
        pa.field("unread", pa.int8(), nullable=False),
        pa.field("line", pa.int64(), nullable=False),
    ]
)
"""A row's JSON text, the fields of `RowMeasures`, and the line of the source that it starts in."""

_READS_BETWEEN_RELEASES = 32
_BATCH_ROWS = 2**16
_BATCH_CHARACTERS = 2**25


class RowIndex(Sequence[Row]):
    """The rows of one file; a row is parsed when it is asked for. Pickled as its path, so that workers map the same memory.

    Args:
        path: the Arrow file.
        source: the file it was made from.

    Raises:
        ValueError: the index is broken.
    """

    def __init__(self, path: Path, source: Path) -> None:
        self.path = path
        self.source = source
        self._map, table, facts = read_arrow(path)
        self.sha256: str = facts["sha256"]
        self._reads = 0
        self._rows, self._images, self._words, self._answered, self._unread, self._lines = (table.column(name) for name in SCHEMA.names)

    def __reduce__(self) -> tuple[Any, ...]:
        return RowIndex, (self.path, self.source)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        """Parse a row.

        Raises:
            ValueError: the row is not JSON; the message names its line.
        """
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        index = range(len(self))[index]
        text = self._rows[index].as_py()
        self._reads += 1
        if self._reads % _READS_BETWEEN_RELEASES == 0:
            self._map.madvise(mmap.MADV_DONTNEED)  # pages stay in the system's cache, but no longer count as this process's memory
        try:
            return parse_row(text)
        except ValueError as error:
            raise ValueError(f"line {self._lines[index].as_py()} cannot be read: {error}.") from error

    @property
    def words(self) -> np.ndarray:
        """(R,) words of every row."""
        return self._words.to_numpy()

    @property
    def has_image(self) -> np.ndarray:
        """(R,) whether a row has images."""
        return pc.not_equal(self._images, "").to_numpy()

    @property
    def image_groups(self) -> np.ndarray:
        """(R,) the same number for rows about the same images, in the order of their names; -1 without an image."""
        return image_groups(self._images)

    @property
    def answered(self) -> np.ndarray:
        """(R,) whether a row has an answer to train on."""
        return self._answered.to_numpy()

    @property
    def unread(self) -> np.ndarray:
        """(R,) position in `UNREAD_KEYS` of a key that is not read, -1 without one."""
        return self._unread.to_numpy()


def image_groups(images: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """(R,) a number per distinct text of the `image` column in alphabetical order, -1 for the empty one."""
    ranks = pc.rank(images, tiebreaker="dense").to_numpy().astype(np.int64)
    return np.where(pc.equal(images, "").to_numpy(zero_copy_only=False), -1, ranks)


def open_index(source: str | Path, cache: str | Path | None = None, wait_seconds: float = LOCK_SECONDS) -> RowIndex:
    """The index of a JSON or JSONL file, built if there is none.

    Args:
        source: LLaVA's JSON (one list) or JSONL (a row per line); see `llava.json_rows` for what is read.
        cache: folder for the index; by default a hidden one beside the source, or the user's cache.
        wait_seconds: how long to wait for another process that builds it.

    Raises:
        ValueError: no such file, or not one of rows.
        TimeoutError: another process builds and does not finish.
    """
    source = Path(source)
    return RowIndex(derived_file(source, "rows", cache, build_index, wait_seconds), source)


def build_index(source: Path, target: Path) -> None:
    """Write the index of a source file.

    Raises:
        ValueError: not UTF-8, not a file of rows, or no row at all.
    """
    digest = hashlib.sha256()
    with source.open("rb") as file:
        rows = iter_rows(file, str(source), digest=digest)
        write_arrow(target, SCHEMA, _batches(rows, source), lambda: {"sha256": digest.hexdigest()})


def _batches(rows: Iterator[JsonRow], source: Path) -> Iterator[pa.RecordBatch]:
    """Record batches of rows; the first row decides whether the file is one of conversations."""
    columns: tuple[list[Any], ...] = tuple([] for _ in SCHEMA)
    characters = count = 0
    for count, row in enumerate(rows, start=1):
        if count == 1 and not isinstance(row.value, dict):
            reason = f" (line {row.line}: {row.problem})" if row.problem else ""
            raise ValueError(
                f"{source} starts with {row.text[:40]!r}{reason}, expected rows such as {{'conversations': [...]}}, in one list or one per "
                "line."
            )
        for column, value in zip(columns, (row.text, *measure(row.value), row.line), strict=True):
            column.append(value)
        characters += len(row.text)
        if len(columns[0]) >= _BATCH_ROWS or characters >= _BATCH_CHARACTERS:
            yield pa.record_batch(list(columns), schema=SCHEMA)
            columns, characters = tuple([] for _ in SCHEMA), 0
    if not count:
        raise ValueError(f"{source} holds no rows; expected a list of conversations.")
    yield pa.record_batch(list(columns), schema=SCHEMA)
