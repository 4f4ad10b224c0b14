"""Files that are built once from a source file and then mapped into memory by every process: the indices of rows and of shards.

A derived file is an Arrow stream in a hidden folder beside its source (or in a cache folder). Its name is made of the source's path, size
and modification time, so a changed source gets a new one. Whoever comes first builds it under a lock; the others wait and map it. Nothing
here knows what the columns mean.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import filelock
import pyarrow as pa

from llava.durable import whole_file, write_whole

logger = logging.getLogger(__name__)

FORMAT = "3"
"""Raised when the content of any derived file changes, so that files of an earlier version are rebuilt."""
HIDDEN_FOLDER = ".avg-llava-index"
LOCK_SECONDS = 3600.0
"""How long a process waits for another one that builds the same file."""


def derived_file(
    source: Path,
    kind: str,
    cache: str | Path | None,
    build: Callable[[Path, Path], None],
    wait_seconds: float = LOCK_SECONDS,
) -> Path:
    """Path of the file that `build(source, target)` makes from a source, built now if no process has built it before.

    Raises:
        ValueError: there is no such source, no folder to write to, or the source changed during the build.
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
                _ignored_by_git(folder)
        except OSError:
            continue
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise ValueError(f"an index cannot be written to {' or '.join(map(str, folders))}; name another folder with --index_cache.")


def _ignored_by_git(folder: Path) -> None:
    if not (folder / ".gitignore").exists():
        write_whole(folder / ".gitignore", "*\n", shared=True)


def _build(source: Path, target: Path, kind: str, build: Callable[[Path, Path], None]) -> None:
    """Build under a hidden name, and rename the file once it is complete and the source is still the same."""
    start = time.perf_counter()
    with whole_file(target) as unfinished:
        build(source, unfinished)
        if _derived_name(source, kind) != target.name:
            raise ValueError(f"{source} changed while it was being indexed; start again when it is complete.")
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
    """Map a file of `write_arrow` into memory, copying nothing: the mapping, its table and its facts.

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
        raise ValueError(f"the index {path} is broken ({error}); delete it, and it is rebuilt.") from error
    if facts is None:
        raise ValueError(f"the index {path} is incomplete; delete it, and it is rebuilt.")
    return mapped, pa.Table.from_batches(batches), {key.decode(): value.decode() for key, value in dict(facts).items()}
