"""Fixtures that every test may use."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def oracle() -> Path:
    """Folder of the recorded reference numbers; its README says what each file holds."""
    return Path(__file__).parent / "oracle"
