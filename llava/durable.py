"""Results on disk: files and folders that are there whole or not at all, and one sentence where there is no room for them.

What is written goes beside its place under a hidden name and takes its own name when its bytes are on the disk, so a reader finds the
old one, none, or the new one, also after a kill or a power cut. What grows line by line grows by whole pieces (`append_whole`). Nothing
here knows what is written.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

logger = logging.getLogger(__name__)

STAGING_PREFIX = ".unfinished-"

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_ROOM_SAID = re.compile(
    rf"\b(?:os error|errno) (?:{'|'.join(map(str, _NO_ROOM))})\b|No space left on device|File too large|Disk quota exceeded|"
    r"PytorchStreamWriter failed|enforce fail at inline_container",
    re.IGNORECASE,
)
"""How libraries that raise errors of their own (safetensors, torch, Arrow) report a write that found no room."""


class NoSpaceError(OSError):
    """There is no room for a file: the disk is full, a quota is used up, or the file would be longer than it may."""


@contextmanager
def room_for(path: Path) -> Iterator[None]:
    """Let a block that writes `path` fail in one sentence where there is no room for it, whatever library writes.

    Raises:
        NoSpaceError: there was no room.
    """
    try:
        yield
    except NoSpaceError:
        raise
    except Exception as error:
        reason = _lack_of_room(error)
        if reason is None:
            raise
        raise NoSpaceError(
            f"no space for {path} ({reason}); nothing half is left and what was whole is kept: free some space, then run the same command "
            "again."
        ) from error


def _lack_of_room(error: BaseException) -> str | None:
    """What the system said, where an error or one that it stems from is about room."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _NO_ROOM:
            return os.strerror(seen.errno)
        found = None if isinstance(seen, ValueError) else _NO_ROOM_SAID.search(str(seen))  # ours, which may quote a file's own text
        if found is not None:
            return found[0]
        seen = seen.__cause__ or seen.__context__
    return None


@contextmanager
def held_alone(lock: Path, what: str) -> Iterator[None]:
    """Keep other processes from the same work while the block runs. The lock is the living process's: one that died holds nothing.

    Args:
        lock: the lock's file; its folder is made where there is none.
        what: what is held, for the sentence.

    Raises:
        ValueError: another process holds it.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    held = filelock.FileLock(lock)
    try:
        held.acquire(timeout=0)
    except filelock.Timeout as error:
        raise ValueError(f"another process is at work on {what}; wait for it or stop it, or choose another place.") from error
    try:
        yield
    finally:
        held.release()


# ---- files


@contextmanager
def whole_file(path: Path, shared: bool = False) -> Iterator[Path]:
    """Write a file so that a reader sees all of it or nothing of it.

    Args:
        path: the name in the end.
        shared: other processes may write the same file at this moment, so the draft has a name that no other has; a kill may then
            leave it. Otherwise the next writer replaces it.

    Yields:
        The draft to write to; it takes the name `path` when the block ends without an error, and is removed otherwise.

    Raises:
        NoSpaceError: there is no room.
    """
    draft = path.with_name(f"{STAGING_PREFIX}{path.name}" + (f".{uuid.uuid4().hex}" if shared else ""))
    try:
        with room_for(path):
            yield draft
            sync(draft)
            os.replace(draft, path)
            sync(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def write_whole(path: Path, data: str | bytes, shared: bool = False) -> None:
    """Write a file that is there whole or not at all; text as UTF-8. See `whole_file`.

    Raises:
        NoSpaceError: there is no room.
    """
    with whole_file(path, shared) as draft:
        draft.write_bytes(data.encode() if isinstance(data, str) else data)


def write_pieces(path: Path, pieces: Iterable[bytes], shared: bool = False) -> None:
    """Write a file piece by piece that is there whole or not at all, so that it need not fit into memory. See `whole_file`.

    Raises:
        NoSpaceError: there is no room.
    """
    with whole_file(path, shared) as draft:
        draft.touch()
        for piece in pieces:
            append_whole(draft, piece)


def append_whole(path: Path, data: str | bytes) -> None:
    """Append to a file that no other process writes to: all of `data`, or nothing of it where that fails; text as UTF-8.

    Only a kill within the write can leave a part.

    Raises:
        NoSpaceError: there is no room.
    """
    left = memoryview(data.encode() if isinstance(data, str) else data)
    with room_for(path), path.open("ab", buffering=0) as file:
        end = os.fstat(file.fileno()).st_size
        try:
            while left:  # a disk that fills takes a part without an error, and refuses the rest
                left = left[os.write(file.fileno(), left) :]
        except BaseException:
            os.ftruncate(file.fileno(), end)
            raise


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- folders


def staging_folder(folder: Path) -> Path:
    """Where `folder` is written until it is complete: beside it, hidden."""
    return folder.parent / f"{STAGING_PREFIX}{folder.name}"


@contextmanager
def whole_folder(folder: Path, writes: bool = True) -> Iterator[Path]:
    """Write a folder so that a reader sees all of it or nothing of it.

    Args:
        folder: the name in the end.
        writes: `False` in a process that only helps to gather what another one writes; it touches no file.

    Yields:
        The staging folder to write to; it takes the name `folder` when the block ends without an error, and a folder
        that had the name is replaced. After an error it is removed.

    Raises:
        NoSpaceError: there is no room.
    """
    staging = staging_folder(folder)
    if not writes:
        yield staging
        return
    shutil.rmtree(staging, ignore_errors=True)
    try:
        with room_for(folder):
            staging.mkdir(parents=True)
            yield staging
            publish(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def publish(staging: Path, folder: Path) -> None:
    """Give a finished staging folder its name, after its bytes are on the disk."""
    sync_tree(staging)
    if folder.exists():
        remove_folder(folder)
    os.replace(staging, folder)
    sync(folder.parent)


def sync_tree(folder: Path) -> None:
    """Wait until a folder and all in it are on the disk, with the modes that new files have here."""
    for path in [*folder.rglob("*"), folder]:
        _open_to_readers(path)
        sync(path)


def remove_folder(folder: Path) -> None:
    """Delete a folder without ever leaving half of it under its name."""
    doomed = staging_folder(folder).with_name(f"{STAGING_PREFIX}old-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def remove_unfinished(folder: Path) -> None:
    """Clear what killed runs left in a folder."""
    for leftover in folder.glob(f"{STAGING_PREFIX}*"):
        logger.info("removing %s, which a stopped run left unfinished", leftover)
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _open_to_readers(path: Path) -> None:
    """Give a file the mode that new files have here; weights are written through a temporary file that only its owner may read."""
    if path.is_file():
        mask = os.umask(0)
        os.umask(mask)
        path.chmod(0o666 & ~mask)
