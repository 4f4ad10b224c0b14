"""The real harness in its own environment, offline: what the plug-in, the harness's own LLaVA and `eval_model` answer is the same.

The environment is made by its script (minutes, 2 GB, once); LMMS_EVAL_ENV names another folder for it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from llava.eval.run_llava import eval_model
from llava.inference import micro_model_path
from llava.tools.native_checkpoint import to_native
from tests.micro import llava_micro_folder

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 30
TASKS = ("playground", "easy_vqa")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="the scripts are for bash")]


@pytest.fixture(scope="module")
def environment():
    """Makes or finds the environment; the path of its interpreter."""
    subprocess.run(["bash", "scripts/eval/setup_lmms_eval.sh"], cwd=ROOT, check=True, timeout=1800)
    return Path(os.environ.get("LMMS_EVAL_ENV", ROOT / ".venv-lmms-eval")) / "bin" / "python"


def run(output, *flags, **knobs):
    """The runner's finished process."""
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OUTPUT": str(output), **knobs}
    command = ["bash", "scripts/eval/lmms_eval.sh", *flags]
    return subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=900)


def answers(output):
    """By task and document, what the harness took down."""
    said = {}
    for task in TASKS:
        (path,) = output.glob(f"*/*_samples_{task}.jsonl")
        for line in path.read_text().splitlines():
            sample = json.loads(line)
            said[task, sample["doc_id"]] = sample["filtered_resps"]
    return said


@pytest.fixture(scope="module")
def alone(environment, tmp_path_factory):
    """The plug-in at batch 1."""
    output = tmp_path_factory.mktemp("alone")
    finished = run(output, "--limit", str(LIMIT), BATCH_SIZE="1")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return output


def test_both_tasks_run_offline_and_are_scored(alone):
    (path,) = alone.glob("*/*_results.json")
    results = json.loads(path.read_text())["results"]
    assert results["playground"]["family_mean,none"] > 0.9 and results["easy_vqa"]["accuracy,none"] > 0.7
    (log,) = alone.glob("*_rank0.jsonl")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(lines) == 2 * LIMIT and all(line["visual_tokens"] <= line["full_visual_tokens"] and line["logits"] for line in lines)
    assert all("ttft" in line["milliseconds"] for line in lines)


@pytest.mark.parametrize(
    "knobs",
    [
        {"BATCH_SIZE": "8"},
        {"BATCH_SIZE": "8", "NUM_PROCESSES": "2"},
        {"BATCH_SIZE": "1", "MODEL": "llava", "MODEL_ARGS": "device=cpu,device_map=auto,conv_template=v1"},
    ],
    ids=["batch 8", "two processes", "the harness's own llava"],
)
def test_answers_are_those_of_batch_one(alone, tmp_path, knobs):
    finished = run(tmp_path, "--limit", str(LIMIT), **knobs)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert answers(tmp_path) == answers(alone)


@pytest.mark.parametrize("flags", [(), ("--force_simple",)], ids=["chat", "simple"])
def test_its_own_llava_hf_answers_alike_on_a_native_folder(alone, tmp_path, flags):
    to_native(llava_micro_folder(), tmp_path / "native")
    knobs = {"MODEL": "avg_llava_hf", "MODEL_PATH": str(tmp_path / "native"), "MODEL_ARGS": "device=cpu,device_map=auto", "BATCH_SIZE": "1"}
    finished = run(tmp_path / "out", "--limit", str(LIMIT), *flags, **knobs)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert answers(tmp_path / "out") == answers(alone)


def test_answers_are_those_of_eval_model(alone):
    for task, prompt in {"playground": "", "easy_vqa": "In the poster, "}.items():
        (path,) = alone.glob(f"*/*_samples_{task}.jsonl")
        for line in path.read_text().splitlines():
            sample = json.loads(line)
            image = sample["input_media"][0]
            arguments = SimpleNamespace(
                model_path=micro_model_path(),
                image_file=str(ROOT / "playground" / "eval" / image),  # an absolute path stays as it is
                query=sample["input"],
                max_new_tokens=16,
                device="cpu",
            )
            assert sample["input"].startswith(prompt)
            with contextlib.redirect_stdout(io.StringIO()):
                assert eval_model(arguments) == sample["filtered_resps"], (task, sample["doc_id"])


@pytest.mark.parametrize(
    ("flags", "knobs", "complaint"),
    [
        (["--tasks", "no_such_task"], {}, "no_such_task"),
        ([], {"MODEL_PATH": "no/such/model"}, "No checkpoint could be read at 'no/such/model'"),
        ([], {"MODEL_ARGS": "granularity=5"}, "this model has [4, 8, 16, 32, 64]"),
        ([], {"MODEL_ARGS": "granularity=576"}, "The granularity is 576, but this model has [4, 8, 16, 32, 64]"),
        ([], {"MODEL_ARGS": "max_visual_tokens=20"}, "playground: The model can answer none of the first 4 questions with these options"),
        ([], {"MODEL_ARGS": "max_visual_tokens=20", "NUM_PROCESSES": "2"}, "4 of 4 samples failed in generate_until, 0 were answered by 2"),
    ],
)  # fmt: skip
def test_a_failed_run_says_why_and_exits_with_an_error(environment, tmp_path, flags, knobs, complaint):
    finished = run(tmp_path, "--limit", "4", *flags, TASKS="playground", **knobs)
    assert finished.returncode != 0 and complaint in finished.stderr
    assert not list(tmp_path.glob("*/*_results.json"))


def test_the_walk_through_of_the_readme_leads_to_a_task(environment, tmp_path):
    folder = tmp_path / "my_tasks"
    shutil.copytree(ROOT / "lmms-eval" / "avg_llava_lmms_eval" / "tasks" / "my_questions", folder)
    config = (folder / "my_questions.yaml").rename(folder / "receipts.yaml")
    config.write_text(config.read_text().replace("task: my_questions", "task: receipts"))
    finished = run(tmp_path / "template", "--include_path", str(folder), TASKS="receipts")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    shutil.copy(ROOT / "playground" / "images" / "scene_beige.png", folder / "1.png")
    rows = [
        {"question_id": 1, "image": "1.png", "text": "Which number does the sign show?", "answer": 658},
        {"question_id": "2", "image": ["1.png"], "text": "Which large shape is there?", "answer": "circle", "family": "seeing"},
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    finished = run(tmp_path / "out", "--include_path", str(folder), TASKS="receipts")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    (path,) = (tmp_path / "out").glob("*/*_results.json")
    scores = json.loads(path.read_text())["results"]["receipts"]
    assert [scores[f"{name},none"] for name in ("accuracy", "all", "seeing")] == [1.0, 1.0, 1.0]
    (folder / "questions.jsonl").write_text('{"question_id": 1, "text": "Which?"}\n')
    finished = run(tmp_path / "wrong", "--include_path", str(folder), TASKS="receipts")
    assert finished.returncode == 1 and "line 1: answer is missing" in finished.stderr


@pytest.mark.parametrize("kept", [False, True], ids=["each asks its share", "all answers of the first are kept ones"])
def test_a_failure_waits_for_the_other_process_and_the_counts_are_the_whole_runs(environment, tmp_path, kept):
    """A truncated picture, which lmms-eval would have Pillow fill up, in the share of the second of two processes."""
    folder = tmp_path / "pictures"
    shutil.copytree(ROOT / "lmms-eval" / "avg_llava_lmms_eval" / "tasks" / "my_questions", folder)
    whole = (ROOT / "playground" / "images" / "scene_beige.png").read_bytes()
    (folder / "whole.png").write_bytes(whole)
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    texts = ["Which number does the sign show?", "Which large shape is there?"] * 5

    def ask(*names):
        rows = [{"question_id": i, "image": names[i % 2], "text": text, "answer": "658"} for i, text in enumerate(texts)]
        (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags = ["--include_path", str(folder), "--use_cache", str(tmp_path / "cache")]
        return run(tmp_path / "out", *flags, TASKS="my_questions", NUM_PROCESSES="2", LMMS_CACHE_RUN_ID=names[1])

    if kept:
        assert ask("whole.png", "whole.png").returncode == 0
        texts[1::2] = ["What is the background colour?"] * 5
    finished = ask("whole.png", "cut.png")
    asked, answered = (5, 0) if kept else (10, 5)
    assert finished.returncode != 0
    sentence = f"error: 5 of {asked} samples failed in generate_until, {answered} were answered by 2 processes; no score is given."
    assert sentence in finished.stderr and "document 1: ImageError: the PNG image is truncated" in finished.stderr
    if not kept:
        logs = [[json.loads(line) for line in path.read_text().splitlines()] for path in sorted((tmp_path / "out").glob("*_rank?.jsonl"))]
        assert [len(log) for log in logs] == [5, 5] and not any("error" in line for line in logs[0])
        assert not list((tmp_path / "out").glob("*/*_results.json"))
        # what failed is not kept as an empty answer: the next run asks it again
        assert ask("whole.png", "cut.png").returncode != 0


CHOICES = """
task: arrows
dataset_path: json
dataset_kwargs: {data_files: {test: arrows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_choice: ["up", "down", "left", "right"]
doc_to_target: place
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def test_the_harness_takes_the_likeliest_choice(environment, tmp_path):
    folder = tmp_path / "arrows"
    shutil.copytree(ROOT / "lmms-eval" / "avg_llava_lmms_eval" / "tasks" / "my_questions", folder)
    rows = [json.loads(line) for line in (ROOT / "playground" / "eval" / "test.jsonl").read_text().splitlines()]
    arrows = [row for row in rows if row["family"] == "arrow"][:12]
    for row in arrows:
        row["image"] = str(ROOT / "playground" / "eval" / row["image"])
        row["place"] = ["up", "down", "left", "right"].index(row["answer"])
    (folder / "arrows.yaml").write_text(CHOICES)
    (folder / "arrows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in arrows))
    finished = run(tmp_path / "out", "--include_path", str(folder), TASKS="arrows")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    (path,) = (tmp_path / "out").glob("*/*_results.json")
    assert json.loads(path.read_text())["results"]["arrows"]["acc,none"] == 1.0
    (log,) = (tmp_path / "out").glob("*_rank0.jsonl")
    chosen = [json.loads(line)["granularity"] for line in log.read_text().splitlines()]
    assert [chosen[place : place + 4] for place in range(0, 48, 4)] == [[chosen[place]] * 4 for place in range(0, 48, 4)]


def test_the_harness_alone_also_fails_when_a_sample_fails(environment, tmp_path):
    command = [
        str(environment), "-m", "lmms_eval", "--model", "avg_llava",
        "--model_args", f"pretrained={micro_model_path()},max_visual_tokens=20",
        "--tasks", "playground", "--include_path", str(ROOT / "lmms-eval" / "avg_llava_lmms_eval" / "tasks"), "--limit", "2",
    ]  # fmt: skip
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 1 and "The model can answer none of the first 2 questions" in finished.stderr
