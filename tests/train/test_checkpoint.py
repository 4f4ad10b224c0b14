"""Folders that are complete or absent, and projector files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llava.durable import publish
from llava.model.projector import load_projector
from llava.train.checkpoint import (
    checkpoints,
    damaged_files,
    keep_newest,
    projector_weights,
    publish_into,
    read_manifest,
    restore_weights,
    save_projector,
    write_manifest,
)


def test_final_model_replaces_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    for name in ("config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        (tmp_path / name).write_text("old")
    staging = tmp_path / "staging"
    staging.mkdir()
    for name in ("config.json", "model.safetensors"):
        (staging / name).write_text("new")
    write_manifest(staging, "instruct", 3)
    publish_into(staging, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint.json", "config.json", "model.safetensors"]
    assert (tmp_path / "config.json").read_text() == "new"


def test_checksums_tell_what_is_missing_and_what_has_flipped(tmp_path: Path) -> None:
    (tmp_path / "global_step3").mkdir()
    names = ["global_step3/shard.pt", "model.safetensors", "optimizer.pt"]
    for name in names:
        (tmp_path / name).write_bytes(name.encode() * 3_000_000)
    assert read_manifest(tmp_path) is None
    write_manifest(tmp_path, "rglf", 3)
    manifest = read_manifest(tmp_path)
    assert manifest is not None and (manifest.stage, manifest.step) == ("rglf", 3) and sorted(manifest.sha256) == names
    assert damaged_files(tmp_path, manifest) == []
    with (tmp_path / names[0]).open("r+b") as file:
        file.seek(40_000_000)
        byte = file.read(1)[0]
        file.seek(40_000_000)
        file.write(bytes([byte ^ 1]))
    (tmp_path / names[2]).unlink()
    assert damaged_files(tmp_path, manifest) == [names[0], names[2]] and damaged_files(tmp_path, manifest, names[1:]) == names[2:]
    for text in ("", "[]", "{}", '{"stage": "rglf"}', '{"stage": 3, "step": 3, "sha256": {}}', '{"stage": "a", "step": "3", "sha256": {}}'):
        (tmp_path / "checkpoint.json").write_text(text)
        with pytest.raises(ValueError, match="checkpoint.json is damaged; resume from another checkpoint"):
            read_manifest(tmp_path)


def test_old_checkpoints_go(tmp_path: Path) -> None:
    for step in (2, 10, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
    keep_newest(tmp_path, None)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4", "checkpoint-10"]
    keep_newest(tmp_path, 1, keep="/the/folder/before/it/was/moved/checkpoint-2")
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
        write_manifest(staging, "align", 1)
        work(staging, tmp_path / name)
        assert (tmp_path / name / "model.safetensors").stat().st_mode == usual.stat().st_mode
