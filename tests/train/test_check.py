"""The check reads every row as training does, names what is broken, and its exit status says so."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import llava.train.data_check as check_module
from llava.train.arguments import DataArguments
from llava.train.build import model_outline, read_model_config
from llava.train.check import main
from llava.train.data_check import check
from llava.train.flags import CheckArguments
from llava.train.rows import visual_token_costs

ROOT = Path(__file__).parents[2]
ORACLE = ROOT / "tests" / "oracle"
MICRO = ROOT / "playground" / "avg-llava-micro"
IMAGES = ROOT / "playground" / "images"


def row(question: str, answer: str = "Red.", **more: Any) -> dict[str, Any]:
    return {**more, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """One row of every kind, of two files, and the images that they name."""
    shutil.copy(IMAGES / "scene_pink.png", tmp_path / "scene.png")
    (tmp_path / "text.png").write_text("not an image")
    rows = [
        row("<image>\nWhat colour?", id="good", image="scene.png"),
        row("<image>\nWhat colour?", id="missing", image="none.png"),
        row("<image>\nWhat colour?", id="no-image", image="text.png"),
        row("<image>\nWhat colour?", id="placeholder"),
        row("Say " + "red " * 3000, id="long"),
        row("Say nothing.", "", id="empty"),
    ]
    (tmp_path / "one.json").write_text(json.dumps(rows))
    (tmp_path / "two.jsonl").write_text(json.dumps(row("Hello?", id="text")) + "\n{broken\n")
    (tmp_path / "mix.yaml").write_text("sources: [{file: one.json, name: one, weight: 0.5, images: .}, {file: two.jsonl, weight: 3}]")
    return tmp_path


KINDS = {
    "missing": "missing picture",
    "no-image": "broken picture",
    "placeholder": "broken row",
    "long": "too long",
    "empty": "no labels",
    "1": "broken row",
}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_kind_of_finding(num_workers: int, broken: Path) -> None:
    args = CheckArguments(str(MICRO), check=True, output=str(broken / "report"), num_workers=num_workers)
    report = check(args, DataArguments(str(broken / "mix.yaml")))
    assert {finding.id: finding.kind for finding in report.findings} == KINDS
    for finding in report.findings:
        assert f"row {finding.row} of {finding.file} (id {finding.id})" in finding.message
    assert report.is_broken(0.5) and report.totals["rows read"] == 8 and report.totals["rows per epoch"] == 9
    assert report.sources["one"]["pictures"] == 3 and report.sources["two.jsonl"]["text-only rows"] == 2
    stored = json.loads((broken / "report" / "report.json").read_text())
    assert len(stored["findings"]) == 6 and stored["granularities"] == [4, 8, 16, 32, 64] and stored["context"] == 2048
    lengths = stored["histograms"]["tokens per row"]
    assert sum(lengths["counts"]) == lengths["rows"] == 4 and lengths["longest"] > 2048
    visual = stored["histograms"]["visual tokens per row with pictures"]
    costs = visual_token_costs(model_outline(read_model_config(str(MICRO))), (128, 128))
    assert [visual[level]["longest"] for level in ("4", "8", "16", "32", "64")] == costs
    assert (broken / "report" / "report.png").read_bytes().startswith(b"\x89PNG")
    shown = report.text(show=2)
    assert shown.count("(id ") == 2 and "... and 4 more" in shown and "the context is 2048" in shown


def test_rows_that_name_an_image_that_is_not_read(tmp_path: Path) -> None:
    """Counts by key, and an example of each; a placeholder in the answer is named too."""
    rows = [row("What colour?", id=f"blind-{number}", images=["scene_pink.png"]) for number in range(3)]
    rows += [row("What happens?", id="film", video="film.mp4"), row("What?", "<image> Red.", id="answer", image="scene_pink.png")]
    (tmp_path / "ROWS.JSON").write_text(json.dumps(rows))
    report = check(CheckArguments(str(MICRO), check=True), DataArguments(str(tmp_path / "ROWS.JSON"), image_folder=str(IMAGES)))
    assert report.is_broken(1.0) and report.totals["unread key images"] == 3 and report.totals["unread key video"] == 1
    shown = report.text(show=10)
    assert "3 rows with the unread key 'images', 1 row with the unread key 'video', 1 broken row" in shown
    assert "turn 1 is an answer (gpt) with <image> in it" in shown
    assert "row with the unread key 'video': row 3 of" in shown and "the row's key 'video' is not read" in shown


def test_the_recorded_rows_have_the_recorded_lengths(tmp_path: Path) -> None:
    """What the check calls a row's length is what training sees: ids less placeholders, plus visual tokens."""
    args = CheckArguments(str(ORACLE / "checkpoint"), check=True, version="v1")
    report = check(args, DataArguments(str(ORACLE / "train_data.json"), image_folder=str(ORACLE / "images"), index_cache=str(tmp_path)))
    assert report.levels == [9, 18, 36, 72, 144] and report.totals["rows read"] == 7
    assert not [finding for finding in report.findings if finding.kind != check_module.NO_LABELS]


def test_no_weights_are_read(tmp_path: Path) -> None:
    for name in ("config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MICRO / name, tmp_path)
    assert {parameter.device.type for parameter in model_outline(read_model_config(str(tmp_path))).parameters()} == {"meta"}
    (tmp_path / "rows.json").write_text(json.dumps([row("<image>\nWhat?", image="scene_pink.png")]))
    args = CheckArguments(str(tmp_path), check=True, model_max_length=50, vis_token_granularity="16,64")
    report = check(args, DataArguments(str(tmp_path / "rows.json"), image_folder=str(IMAGES)))
    assert report.levels == [16, 64] and [finding.kind for finding in report.findings] == ["too long"]
    with pytest.raises(ValueError, match="no config can be read"):
        read_model_config(str(tmp_path / "none"))


def test_rows_without_labels_are_refused_above_a_share(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([row("Hello?")] * 3 + [row("Hello?", "")]))
    report = check(CheckArguments(str(MICRO), check=True), DataArguments(str(tmp_path / "rows.json")))
    assert report.totals["no labels"] == 1 and report.is_broken(0.2) and not report.is_broken(0.3)


def test_matplotlib_is_asked_for_before_hours_are_spent(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_module, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs matplotlib; pip install"):
        check(CheckArguments(str(MICRO), check=True, output="x"), DataArguments(str(broken / "one.json")))


def test_command_line(broken: Path) -> None:
    command = [sys.executable, "-m", "llava.train.dataset", "--data_path", str(broken / "mix.yaml")]
    model = ["--model_name_or_path", str(MICRO), "--check", "--show", "1"]
    counted = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert counted.returncode == 0 and "one: 6 rows in the file, 3 rows per epoch, sha256 " in counted.stdout, counted.stderr
    checked = subprocess.run(command + model, cwd=ROOT, capture_output=True, text=True, check=False)
    assert checked.returncode == 1 and "broken: 6 findings" in checked.stderr and "one.json (id missing)" in checked.stdout
    assert "reading" in checked.stderr and "Traceback" not in checked.stderr


def test_refusals_are_sentences(broken: Path, monkeypatch: pytest.MonkeyPatch, language_model: Path) -> None:
    def run(*flags: str) -> str:
        monkeypatch.setattr(sys, "argv", ["check", "--data_path", str(broken / "one.json"), "--check", *flags])
        with pytest.raises(SystemExit) as stopped:
            main()
        return str(stopped.value)

    assert "give its folder as --model_name_or_path" in run()
    assert "is of model type 'llama'" in run("--model_name_or_path", str(language_model))
    assert "--version is 'x'" in run("--model_name_or_path", str(MICRO), "--version", "x")
    assert "no folder or shard of images" in run("--model_name_or_path", str(MICRO), "--image_folder", "none")
