"""The Chromium of this machine, for tests that look at pages as a visitor's browser does."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A browser until the block ends: Chromium named by the variable CHROMIUM, or the one on the path; skips without playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright")
    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    assert path, "there is no Chromium: install it, or name its program in the variable CHROMIUM"
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=list(FLAGS))
        yield browser
        browser.close()
