"""Rows of LLaVA's JSON or JSONL as an Arrow file that every process maps into memory and nobody holds.

A source file is read once, piece by piece. What is kept per row is its JSON text as it stands there, its pictures and its
length in words, so that lengths and groups come from columns and a row is parsed when it is learnt from. The index lies in
a hidden folder beside the source (or in a cache folder) under a name made of the source's path, size and time of change;
whoever comes first builds it under a lock, all others wait and map it. It is an ordinary Arrow stream:
`datasets.Dataset.from_file` opens it too.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import filelock
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llava.durable import whole_file
from llava.json_rows import JsonRow, iter_rows, parse_row
from llava.train.targets import count_words, has_answer

logger = logging.getLogger(__name__)

Row = dict[str, Any]

FORMAT = "3"
"""Raised when what an index holds changes; older ones are then built anew."""
HIDDEN_FOLDER = ".avg-llava-index"
LOCK_SECONDS = 3600.0
"""How long a process waits for another one that builds the same index."""

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
"""A row's JSON text; its picture names as a JSON list, empty without any; words of its turns; whether it has an answer to learn; the place
in `UNREAD_KEYS` of a key that is not read, -1 without one; the line of the source that it starts in."""

_RENAME = "name images under 'image', one name or a list of them"
_DROP = "only images are read, so drop such rows, or give single frames as images"
UNREAD_KEYS: dict[str, str] = {
    "images": _RENAME, "image_path": _RENAME, "image_paths": _RENAME, "image_file": _RENAME, "img": _RENAME,
    "video": _DROP, "videos": _DROP, "audio": _DROP, "audios": _DROP,
}  # fmt: skip
"""Keys under which other trainers' rows hold what a row is about, and what to do: without it the row would be learnt blind."""

_READS_BETWEEN_RELEASES = 32
_BATCH_ROWS = 2**16
_BATCH_CHARACTERS = 2**25


class RowIndex(Sequence[Row]):
    """The rows of one file; a row is parsed when it is asked for. Pickles as its path, so workers map the same memory.

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
            ValueError: the row is not JSON; the sentence names its line.
        """
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        index = range(len(self))[index]
        text = self._rows[index].as_py()
        self._reads += 1
        if self._reads % _READS_BETWEEN_RELEASES == 0:
            self._map.madvise(mmap.MADV_DONTNEED)  # pages stay in the system's cache, but no longer count as this process's
        try:
            return parse_row(text)
        except ValueError as error:
            raise ValueError(f"line {self._lines[index].as_py()} cannot be read: {error}.") from error

    @property
    def words(self) -> np.ndarray:
        """(R,) words of every row."""
        return self._words.to_numpy()

    @property
    def pictured(self) -> np.ndarray:
        """(R,) whether a row has pictures."""
        return pc.not_equal(self._images, "").to_numpy()

    @property
    def picture_groups(self) -> np.ndarray:
        """(R,) the same number for rows about the same pictures, in the order of their names; -1 without a picture."""
        return picture_groups(self._images)

    @property
    def answered(self) -> np.ndarray:
        """(R,) whether a row has an answer to learn."""
        return self._answered.to_numpy()

    @property
    def unread(self) -> np.ndarray:
        """(R,) the place in `UNREAD_KEYS` of a key that is not read, -1 without one."""
        return self._unread.to_numpy()


def picture_groups(images: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """(R,) a number per distinct text of the `image` column in alphabetical order, -1 for the empty one."""
    ranks = pc.rank(images, tiebreaker="dense").to_numpy().astype(np.int64)
    return np.where(pc.equal(images, "").to_numpy(zero_copy_only=False), -1, ranks)


class RowMeasures(NamedTuple):
    """What is known of a row without its pictures: the columns of these names in `SCHEMA`."""

    image: str
    words: int
    answered: bool
    unread: int


def measure(row: Any) -> RowMeasures:
    """The measured columns of a row. A broken row has no words and no answer; what is wrong is said when it is read."""
    image = row.get("image") if isinstance(row, dict) else None
    names = image if isinstance(image, list) else [] if image is None else [image]
    try:
        words, answered = count_words(row["conversations"]), has_answer(row["conversations"])
    except (TypeError, KeyError, AttributeError):
        words, answered = 0, False
    key = unread_key(row) if isinstance(row, dict) else None
    return RowMeasures(json.dumps(names) if names else "", words, answered, -1 if key is None else _UNREAD_PLACES[key])


_UNREAD_PLACES = {key: place for place, key in enumerate(UNREAD_KEYS)}


def unread_key(row: Row) -> str | None:
    """A key that says what the row is about, has a value, and is not read; one for images counts only where `image` is missing."""
    for key in UNREAD_KEYS.keys() & row.keys():
        if row[key] and not (UNREAD_KEYS[key] is _RENAME and row.get("image")):
            return key
    return None


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


# ---- files derived from a source, built once


def derived_file(
    source: Path,
    kind: str,
    cache: str | Path | None,
    build: Callable[[Path, Path], None],
    wait_seconds: float = LOCK_SECONDS,
) -> Path:
    """Path of what `build(source, target)` makes of a source, made now if no process has made it before.

    Raises:
        ValueError: there is no such source, no folder to write to, or the source changed meanwhile.
        TimeoutError: another process has been building for longer than `wait_seconds`.
    """
    if not source.is_file():
        raise ValueError(f"there is no file {source}; check the path.")
    name = _derived_name(source, kind)
    folders = _cache_folders(source, cache)
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    target = _first_writable(folders) / name
    try:
        with filelock.FileLock(f"{target}.lock", timeout=wait_seconds):
            if not target.is_file():
                _build(source, target, kind, build)
    except filelock.Timeout as error:
        raise TimeoutError(
            f"another process has been indexing {source} for {wait_seconds:.0f} s; wait for it, or stop it and start again."
        ) from error
    return target


def _derived_name(source: Path, kind: str) -> str:
    stat = source.stat()
    identity = json.dumps([str(source.resolve()), stat.st_size, stat.st_mtime_ns, FORMAT])
    return f"{source.name}.{hashlib.sha256(identity.encode()).hexdigest()[:16]}.{kind}.arrow"


def _cache_folders(source: Path, cache: str | Path | None) -> list[Path]:
    if cache is not None:
        return [Path(cache)]
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return [source.resolve().parent / HIDDEN_FOLDER, user_cache / "avg-llava" / "index"]


def _first_writable(folders: Sequence[Path]) -> Path:
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if folder.name == HIDDEN_FOLDER:
                (folder / ".gitignore").write_text("*\n")
        except OSError:
            continue
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise ValueError(f"an index cannot be written to {' or '.join(map(str, folders))}; name another folder with --index_cache.")


def _build(source: Path, target: Path, kind: str, build: Callable[[Path, Path], None]) -> None:
    """Build under a hidden name, and rename what is complete and still true."""
    start = time.perf_counter()
    with whole_file(target) as unfinished:
        build(source, unfinished)
        if _derived_name(source, kind) != target.name:
            raise ValueError(f"{source} changed while it was indexed; start again when it is complete.")
    logger.info("indexed %s in %.1f s: %s", source, time.perf_counter() - start, target)


def write_arrow(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch], facts: Callable[[], dict[str, str]]) -> None:
    """Write an Arrow stream whose last, empty batch carries the facts that are known only at the end.

    Raises:
        OSError: the disk is full.
    """
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
        end = pa.RecordBatch.from_pylist([], schema=schema)
        writer.write_batch(end, custom_metadata=facts())


def read_arrow(path: Path) -> tuple[mmap.mmap, pa.Table, dict[str, str]]:
    """Map a file of `write_arrow` into memory: the mapping, its table, of which nothing is copied, and its facts.

    Raises:
        ValueError: the file is broken or incomplete.
    """
    batches, facts = [], None
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        with pa.ipc.open_stream(pa.py_buffer(mapped)) as stream:
            while True:
                found = stream.read_next_batch_with_custom_metadata()
                batches.append(found.batch)
                facts = found.custom_metadata
    except StopIteration:
        pass
    except (pa.ArrowInvalid, ValueError, OSError) as error:
        raise ValueError(f"the index {path} is broken ({error}); delete it, and it is built anew.") from error
    if facts is None:
        raise ValueError(f"the index {path} is incomplete; delete it, and it is built anew.")
    return mapped, pa.Table.from_batches(batches), {key.decode(): value.decode() for key, value in dict(facts).items()}


# ---- the columns of a source


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
