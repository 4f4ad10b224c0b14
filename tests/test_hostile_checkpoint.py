"""Every program that loads a checkpoint tells a hostile one in one sentence and ends with a status that says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava.eval import granularity_report, model_vqa, run_llava
from llava.inference import MICRO_MODEL
from llava.serve import cli, model_worker
from llava.train import train

QUESTIONS = MICRO_MODEL.parent / "eval" / "test.jsonl"


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in MICRO_MODEL.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "config.json").unlink()
    stored = json.loads((MICRO_MODEL / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**stored, "text_config": {**stored["text_config"], "num_hidden_layers": 10**7}}))
    return folder


@pytest.mark.parametrize("program", ["run_llava", "model_vqa", "granularity_report", "model_worker", "cli", "train"])
def test_programs_end_with_one_sentence(
    program: str, hostile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = str(hostile), str(tmp_path / "out")
    picture = str(MICRO_MODEL.parent / "images" / "scene_pink.png")
    folder = str(MICRO_MODEL.parent / "eval")
    starts = {
        "run_llava": lambda: run_llava.main(["--model-path", model, "--image-file", picture, "--query", "Which colour?"]),
        "model_vqa": lambda: model_vqa.main(
            ["--model-path", model, "--image-folder", folder, "--question-file", str(QUESTIONS), "--answers-file", f"{out}.jsonl"]
        ),
        "granularity_report": lambda: granularity_report.main(
            ["--model-path", model, "--questions", str(QUESTIONS), "--image-folder", folder, "--output", out]
        ),
        "model_worker": lambda: model_worker.main(["--model-path", model, "--no-register", "--port", "1"]),
        "cli": lambda: cli.main(["--model-path", model]),
        "train": train.main,
    }
    flags = ["--model_name_or_path", model, "--data_path", str(QUESTIONS), "--output_dir", out, "--stage", "instruct", "--use_cpu", "True"]
    monkeypatch.setattr("sys.argv", ["train", *flags])
    monkeypatch.setattr("builtins.input", lambda *_: (_ for _ in ()).throw(EOFError))
    status = 0
    told = ""
    try:
        status = starts[program]()
    except SystemExit as ended:
        told, status = str(ended.code), 1 if isinstance(ended.code, str) else int(ended.code or 0)
    captured = capsys.readouterr()
    told += captured.err + captured.out
    assert status == 1 and "Traceback" not in told
    assert told.count("text_config.num_hidden_layers is 10000000, expected a whole number from 1 to 2048") == 1, told
