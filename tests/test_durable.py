"""Files and folders are whole or not there, whatever breaks; a full disk is one sentence."""

from __future__ import annotations

import errno
import os
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from llava.durable import (
    NoSpaceError,
    append_whole,
    remove_folder,
    remove_unfinished,
    room_for,
    sync_tree,
    whole_file,
    whole_folder,
    write_whole,
)


@contextmanager
def longest_file(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size` bytes: the write that crosses it is cut short, the next one fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    with pytest.raises(KeyboardInterrupt), whole_file(file) as draft:
        draft.write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    write_whole(file, "ä")
    with pytest.raises(RuntimeError), whole_file(file) as draft:
        draft.write_text("half")
        assert file.read_text(encoding="utf-8") == "ä"
        raise RuntimeError
    write_whole(file, b"\x00\n", shared=True)
    assert file.read_bytes() == b"\x00\n" and list(tmp_path.iterdir()) == [file]


def test_writers_of_one_file_have_drafts_of_their_own(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    with whole_file(file, shared=True) as first, whole_file(file, shared=True) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert file.read_text() == "first" and list(tmp_path.iterdir()) == [file]


def test_what_is_appended_is_there_whole_or_not(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    append_whole(file, "first line\n")
    with longest_file(20), pytest.raises(NoSpaceError, match=r"no space for .*a\.jsonl \(File too large\).*run the same command again"):
        append_whole(file, "a second line that does not fit\n")
    assert file.read_text() == "first line\n"
    append_whole(file, "second line\n")
    assert file.read_text() == "first line\nsecond line\n"


def test_short_writes_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, bytes(data[:3])))
    append_whole(tmp_path / "a.jsonl", b"0123456789\n")
    assert (tmp_path / "a.jsonl").read_bytes() == b"0123456789\n"


WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda path: path.write_text("x" * 10_000),
    "safetensors": lambda path: save_file({"a": torch.zeros(10_000)}, path),
    "torch": lambda path: torch.save(torch.zeros(10_000), path),
    "arrow": lambda path: pa.OSFile(str(path), "wb").write(b"x" * 10_000),
    "parquet": lambda path: pq.write_table(pa.table({"a": np.random.RandomState(0).rand(10_000)}), path),
}


@pytest.mark.parametrize("library", WRITERS)
def test_no_room_is_said_whatever_writes(library: str, tmp_path: Path) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("old")
    with longest_file(5000):
        with pytest.raises(NoSpaceError, match=r"^no space for .*/file \("), whole_file(file) as draft:
            WRITERS[library](draft)
        with pytest.raises(NoSpaceError, match=r"^no space for .*/folder \("), whole_folder(folder) as staging:
            (staging / "small").write_text("x")
            WRITERS[library](staging / "large")
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]
    with whole_folder(folder) as staging:
        WRITERS[library](staging / "large")
    assert (folder / "large").stat().st_size > 5000


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_what_the_system_calls_no_room(number: int, tmp_path: Path) -> None:
    with pytest.raises(NoSpaceError, match=f"no space for .*{re.escape(os.strerror(number))}"), room_for(tmp_path):
        try:
            raise OSError(number, os.strerror(number))
        except OSError as error:
            raise RuntimeError("a library's own words") from error


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "Permission denied"), ValueError("row 'No space left on device'"), KeyError("a")])
def test_other_errors_stay_what_they_are(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as raised, room_for(tmp_path):
        raise error
    assert raised.value is error


def test_a_full_disk_while_bytes_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Network disks say only then that there was no room."""

    def refuse(descriptor: int) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(NoSpaceError, match="Disk quota exceeded"):
        write_whole(tmp_path / "a", "x")
    assert not list(tmp_path.iterdir())


def test_folders(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint-1"
    with pytest.raises(RuntimeError), whole_folder(target) as staging:
        (staging / "half").write_text("x")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    for text in ("one", "two"):
        with whole_folder(target) as staging:
            (staging / "whole").write_text(text)
        assert (target / "whole").read_text() == text and list(tmp_path.iterdir()) == [target]
    with whole_folder(tmp_path / "others", writes=False) as staging:
        assert not staging.exists()
    remove_folder(target)
    assert not list(tmp_path.iterdir())


def test_leftovers_of_a_kill_go(tmp_path: Path) -> None:
    (tmp_path / ".unfinished-checkpoint-1").mkdir()
    (tmp_path / ".unfinished-checkpoint-1" / "half").write_text("x")
    (tmp_path / ".unfinished-a.json").write_text("x")
    (tmp_path / "kept").write_text("x")
    remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_published_files_are_open_to_readers(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("x")
    (tmp_path / "a" / "file").chmod(0o600)
    sync_tree(tmp_path)
    (tmp_path / "new").write_text("x")
    assert (tmp_path / "a" / "file").stat().st_mode == (tmp_path / "new").stat().st_mode
