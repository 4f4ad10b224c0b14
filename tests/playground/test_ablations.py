"""The ablation table on answers made up by hand, and what its script would train."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llava.eval.report.outcomes import FEWEST_IMAGES
from llava.train.run import parse_arguments
from playground.ablations import markdown, spread, table
from playground.evaluate import Record, Results
from playground.world import COARSE_FAMILIES, FAMILIES

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "playground" / "ablations.sh"
LEVELS = [4, 16, 64]
NEEDED = ("data", "stage3", "paper-loss-0", "cost-aware-0", "other-axis-0", "no-instruction-0")


def made_up() -> Results:
    """Per family as many pictures as an interval needs: coarse questions are right everywhere, fine ones at the finest level only."""
    records = []
    for family in FAMILIES:
        right = [family in COARSE_FAMILIES] * 2 + [True]
        for number in range(len(records), len(records) + FEWEST_IMAGES):
            records.append(Record(number, f"{number}.png", "?", "x", family, ["", ""], right, [24, 88, 336]))
    return Results(records)


def test_a_router_of_fewer_granularities_chooses_among_its_own() -> None:
    wide = spread(np.array([[-5.0, -4.0], [2.0, -1.0]]), [4, 64], LEVELS)
    assert wide.argmax(1).tolist() == [2, 0] and np.isinf(wide[:, 1]).all()


def test_the_table_tells_a_router_from_chance() -> None:
    results = made_up()
    fine = ~np.isin(results.family, COARSE_FAMILIES)
    whole = np.stack([~fine, np.zeros_like(fine), fine], axis=1).astype(float)
    rows = table(results, LEVELS, {"whole": whole, "blind": np.tile([1.0, 0.0, 0.0], (len(fine), 1))})
    assert list(rows) == ["fixed 4", "fixed 16", "fixed 64", "random at the tokens of whole", "whole", "blind", "cheapest correct"]
    assert rows["whole"]["accuracy"] == 100.0 and rows["whole"]["tokens"] == pytest.approx(0.6 * 24 + 0.4 * 336)
    assert rows["random at the tokens of whole"]["tokens"] == pytest.approx(rows["whole"]["tokens"])
    assert rows["blind"]["above chance"] == 0.0 and rows["whole"]["above chance"] > 20 and rows["blind"]["fine"] == 0.0
    page = markdown(rows, LEVELS)
    assert page.count("\n") == 9 and "| whole | 100.0 [100.0, 100.0] | 100.0 | 149 | 56 % |" in page


def test_a_choice_without_an_interval_is_a_line_all_the_same() -> None:
    line = {"accuracy": 50.0, "interval": None, "tokens": 24.0, "saved": 93.0, "above chance": 0.0, "fine": 0.0, "choices": [100.0]}
    assert "| fixed 4 | 50.0 | 0.0 | 24 | 93 % | 0.0 | 100 |" in markdown({"fixed 4": line}, [4])


def run(folder: Path, **variables: object) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **{key: str(value) for key, value in variables.items()}}
    return subprocess.run(["bash", str(SCRIPT), str(folder)], env=environment, text=True, capture_output=True, timeout=120)


def test_a_folder_of_no_recipe_is_one_sentence(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 1 and "has no data/stage4.json; run bash playground/train_micro.sh first" in done.stderr


def test_each_router_is_trained_with_one_thing_changed(tmp_path: Path) -> None:
    """An interpreter that notes what it is asked to run stands in; every flag is then parsed as the trainer would."""
    for name in NEEDED:
        (tmp_path / name).mkdir()
    for name in ("data/stage4.json", "data/test.jsonl", "records.json"):
        (tmp_path / name).write_text("[]")
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(
        f"""#!{sys.executable}
import json, os, pathlib, sys
if sys.argv[1] == "-c":
    os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])
with open({str(calls)!r}, "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
for flag, value in zip(sys.argv, sys.argv[1:]):
    if flag == "--output_file":
        pathlib.Path(value).touch()
    if flag == "--output":
        pathlib.Path(value, "ablations.md").write_text("the table")
"""
    )
    python.chmod(0o755)
    done = run(tmp_path, PYTHON=python, STEPS=7)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = [json.loads(line) for line in calls.read_text().splitlines()]
    trained = [parse_arguments(words[1:]) for words in runs if words[0].endswith("train_mem.py")]
    usual = {"rank_loss_weight": 1.0, "ce_loss_weight": 0.1, "router_without_instruction": False, "granularity_cost_weight": 0.0}
    changes = {}
    for model, _, training in trained:
        values = {name: getattr(training, name) for name in usual}
        changes[Path(training.output_dir).name] = {name: value for name, value in values.items() if value != usual[name]}
        assert training.max_steps == 7 and training.learning_rate == 3e-3 and Path(training.granularity_scores).is_file()
        assert (model.granularities == [4, 16, 64]) == ("range" in training.output_dir)
    assert changes == {
        "without-ranking": {"rank_loss_weight": 0.0},
        "without-cross-entropy": {"ce_loss_weight": 0.0},
        "without-instruction": {"router_without_instruction": True},
        "range-4,16,64": {},
    }
    (last,) = [words for words in runs if words[:2] == ["-m", "playground.ablations"]]
    assert last.count("--router") == 8, shlex.join(last)
