"""A hub's cache on disk, so that a hub id is read without a network."""

from __future__ import annotations

import shutil
from pathlib import Path


def put_into_cache(cache: Path, repository: str, folder: Path) -> None:
    """Lay the files of a folder into a cache as the main revision of `owner/name`."""
    stored = cache / f"models--{repository.replace('/', '--')}"
    revision = "a" * 40
    (stored / "refs").mkdir(parents=True)
    (stored / "refs" / "main").write_text(revision)
    shutil.copytree(folder, stored / "snapshots" / revision)
