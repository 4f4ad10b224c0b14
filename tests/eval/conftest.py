"""Disks that fill up."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest


class FullDisk:
    """Stands in for `os` in `llava.durable`: appending takes so many bytes, the last write a part of what it is given, and then no more."""

    def __init__(self, room: int) -> None:
        self.room = room

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def write(self, descriptor: int, data: memoryview) -> int:
        if self.room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = os.write(descriptor, data[: self.room])
        self.room -= taken
        return taken


@pytest.fixture
def disk_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int | None], None]]:
    """Gives what is appended so many bytes of room; `None` gives it all there is."""
    yield lambda room: monkeypatch.setattr("llava.durable.os", os if room is None else FullDisk(room))
