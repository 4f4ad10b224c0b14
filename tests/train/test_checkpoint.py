"""Folders that are complete or absent, and projector files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llava.durable import publish
from llava.train.checkpoint import (
    checkpoints,
    keep_newest,
    load_projector,
    projector_weights,
    publish_into,
    restore_weights,
    save_projector,
)


def test_final_model_replaces_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    for name in ("config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        (tmp_path / name).write_text("old")
    staging = tmp_path / "staging"
    staging.mkdir()
    for name in ("config.json", "model.safetensors"):
        (staging / name).write_text("new")
    publish_into(staging, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "config.json", "model.safetensors"]
    assert (tmp_path / "config.json").read_text() == "new"


def test_old_checkpoints_go(tmp_path: Path) -> None:
    for step in (2, 10, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
    keep_newest(tmp_path, None)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4", "checkpoint-10"]
    keep_newest(tmp_path, 1, keep=str(tmp_path / "checkpoint-2"))
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-10"]


def test_projector_round_trip(tiny_model: Any, tmp_path: Path) -> None:
    saved = {name: tensor.clone() for name, tensor in projector_weights(tiny_model.state_dict()).items()}
    save_projector(tiny_model.state_dict(), tmp_path)
    torch.save({f"base_model.{name}": tensor for name, tensor in saved.items()}, tmp_path / "mm_projector.bin")
    for path, allow_bin in ((tmp_path, False), (tmp_path / "mm_projector.bin", True)):
        with torch.no_grad():
            for parameter in tiny_model.model.mm_projector.parameters():
                parameter.zero_()
        load_projector(tiny_model, path, allow_bin)
        for name, tensor in projector_weights(tiny_model.state_dict()).items():
            assert torch.equal(tensor, saved[name])
    with pytest.raises(ValueError, match="--allow_bin_weights True"):
        load_projector(tiny_model, tmp_path / "mm_projector.bin")
    with pytest.raises(ValueError, match="there is no projector file"):
        load_projector(tiny_model, tmp_path / "elsewhere")
    tiny_model.model.mm_projector = torch.nn.Linear(24, 32)
    with pytest.raises(ValueError, match="does not fit this projector"):
        load_projector(tiny_model, tmp_path)


def test_weights_are_restored_exactly(tiny_model: Any, tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path)
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    with torch.no_grad():
        for parameter in tiny_model.parameters():
            parameter.add_(1)
    restore_weights(tiny_model, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_model.state_dict().items())
    tiny_model.model.router = None
    with pytest.raises(ValueError, match="differ in"):
        restore_weights(tiny_model, tmp_path)


def test_published_files_are_as_readable_as_others(tmp_path: Path) -> None:
    usual = tmp_path / "usual"
    usual.touch()
    for name, work in (("a", publish), ("b", publish_into)):
        staging = tmp_path / f"staging-{name}"
        staging.mkdir()
        (staging / "model.safetensors").touch(mode=0o600)
        work(staging, tmp_path / name)
        assert (tmp_path / name / "model.safetensors").stat().st_mode == usual.stat().st_mode
