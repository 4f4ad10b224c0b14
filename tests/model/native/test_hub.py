"""What saving and uploading write beside the weights, against a hub that is a folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from llava.model.native import AvgLlavaForConditionalGeneration, hub
from llava.model.native.llava_layout import native_config
from llava.model.native.model_card import model_card
from tests.model.conftest import tiny_config
from tests.model.native.conftest import IMAGE

REPORT = {
    "task": "signs",
    "answered": 20,
    "device": "cpu",
    "dtype": "float32",
    "rows": [
        {"name": "fixed 4", "kind": "fixed", "accuracy": 61.25, "interval": [50.0, 72.5], "tokens": 24.0},
        {"name": "oracle", "kind": "oracle", "accuracy": 99.0, "interval": [98.0, 100.0], "tokens": 30.0},
        {"name": "adaptive", "kind": "adaptive", "accuracy": 90.0, "interval": None, "tokens": 40.5},
    ],
}


class FolderHub:
    """`HfApi` over a folder."""

    root: Path
    made: list[dict[str, Any]]

    def __init__(self, token: Any = None) -> None:
        pass

    def create_repo(self, repo_id: str, **options: Any) -> SimpleNamespace:
        self.made.append(options)
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=repo_id)

    def file_exists(self, repo_id: str, name: str, revision: str | None = None) -> bool:
        return (self.root / repo_id / name).exists()

    def upload_folder(self, repo_id: str, folder_path: Path, allow_patterns: list[str], **options: Any) -> str:
        for name in allow_patterns:
            shutil.copyfile(folder_path / name, self.root / repo_id / name)
        return options["commit_message"]


@pytest.fixture
def uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "hub"
    monkeypatch.setattr(hub, "HfApi", type("Hub", (FolderHub,), {"root": root, "made": []}))
    return root


@pytest.fixture
def model() -> AvgLlavaForConditionalGeneration:
    config = tiny_config()
    return AvgLlavaForConditionalGeneration(native_config(config, IMAGE, config.vocab_size))


def test_a_saved_folder_has_a_card_with_computed_costs(model: AvgLlavaForConditionalGeneration, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "mine")
    assert {file.name for file in (tmp_path / "mine").iterdir()} == {
        *("README.md", "config.json", "generation_config.json", "model.safetensors"),
    }
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "image-text-to-text")
    assert card.data.license is None and "Measured" not in card.text
    level, layout = model.model.levels[0], model.model.layouts(5, (64, 64))[0]
    cache = 2 * 2 * layout.num_tokens * 32 * 2 / 2**20  # keys and values, 2 layers, 32 wide, 2 bytes
    assert f"| {level.tokens} | {level.grid[0]} x {level.grid[1]} | {layout.num_tokens} | {cache:.2f} |" in card.text
    assert 'from_pretrained("path/to/this/folder")' in card.text


def test_a_card_that_is_there_stays(model: AvgLlavaForConditionalGeneration, uploads: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("Mine.")
    model.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="me/model")
    assert (tmp_path / "mine" / "README.md").read_text() == "Mine."
    (uploads / "me/model/README.md").write_text("The repository's.")
    assert model.push_to_hub("me/model") == "Upload model"
    assert (uploads / "me/model/README.md").read_text() == "The repository's."


def test_uploading_writes_the_folder_and_its_card(model: AvgLlavaForConditionalGeneration, uploads: Path) -> None:
    assert model.push_to_hub("me/model", commit_message="First", private=True, tags=["signs"]) == "First"
    assert {file.name for file in (uploads / "me/model").iterdir()} == {
        *("README.md", "config.json", "generation_config.json", "model.safetensors"),
    }
    card = ModelCard.load(uploads / "me/model/README.md")
    assert "signs" in card.data.tags and 'from_pretrained("me/model")' in card.text
    loaded = AvgLlavaForConditionalGeneration.from_pretrained(uploads / "me/model").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_uploading_a_saved_folder_leaves_other_files_at_home(
    model: AvgLlavaForConditionalGeneration, uploads: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("Not for others.")
    model.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="me/model", private=True)
    assert not (uploads / "me/model/notes.txt").exists() and (uploads / "me/model/model.safetensors").exists()


def test_another_process_writes_nothing(model: AvgLlavaForConditionalGeneration, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "README.md").exists()


def test_a_report_gives_its_measured_rows_and_no_yardsticks(model: AvgLlavaForConditionalGeneration) -> None:
    card = ModelCard(model_card(model, "mine", REPORT, "apache-2.0", ["some/base"]))
    assert (card.data.license, card.data.base_model) == ("apache-2.0", ["some/base"])
    assert "signs, 20 questions, cpu, float32" in card.text
    assert "| fixed 4 | 61.2 | 50.0 to 72.5 | 24.0 |" in card.text and "| adaptive | 90.0 |  | 40.5 |" in card.text
    assert "oracle" not in card.text


@pytest.mark.parametrize("report", [{}, {"rows": [{}]}, {**REPORT, "rows": [{"kind": "fixed"}]}, {**REPORT, "rows": 3}])
def test_a_file_that_is_no_report_is_refused(model: AvgLlavaForConditionalGeneration, report: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected report.json of llava.eval.granularity_report"):
        model_card(model, "mine", report)
