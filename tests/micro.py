"""The shipped micro model, which is stored native, in LLaVA's layout."""

from __future__ import annotations

import atexit
import tempfile
from functools import cache
from pathlib import Path

from llava.constants import MICRO_MODEL


@cache
def llava_micro_folder() -> Path:
    """A converted copy, made once per run and removed at its end."""
    from llava.tools.native_checkpoint import from_native

    kept = tempfile.TemporaryDirectory(prefix="micro-")
    atexit.register(kept.cleanup)
    folder = Path(kept.name) / "avg-llava-micro"
    from_native(MICRO_MODEL, folder)
    return folder
