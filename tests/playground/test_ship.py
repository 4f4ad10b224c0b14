"""The shipped folder is what the recipe's last step writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava.constants import MICRO_MODEL
from playground import ship as ship_module
from playground.ship import ship
from tests.micro import llava_micro_folder


def test_shipping_writes_the_folder_that_ships(tmp_path: Path) -> None:
    """From a checkpoint as the stages leave it, to the byte; what was at the target is gone."""
    target = tmp_path / MICRO_MODEL.name
    target.mkdir()
    (target / "stale.bin").touch()
    size = ship(llava_micro_folder(), target)
    assert size == sum(file.stat().st_size for file in target.iterdir())
    assert {file.name for file in target.iterdir()} == {file.name for file in MICRO_MODEL.iterdir()}
    for file in MICRO_MODEL.iterdir():
        assert (target / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_checkpoint_that_is_too_large_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ship_module, "LARGEST", 1000)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "config.json").touch()
    with pytest.raises(ValueError, match=r"expected at most 1,000"):
        ship(llava_micro_folder(), tmp_path / "kept")
    assert [file.name for file in (tmp_path / "kept").iterdir()] == ["config.json"]
