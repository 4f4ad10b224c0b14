"""The benchmark scripts: eleven pinned stock tasks, run slice by slice, without starting the harness."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from llava.inference import MICRO_MODEL

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "scripts" / "eval"
BENCHMARKS = ("gqa", "scienceqa_img", "vizwiz", "textvqa", "chartqa", "docvqa", "ai2d", "mme", "mmbench", "pope", "mmmu")
FIELDS = ("task", "dataset", "revision", "split", "metric")


def facts(benchmark: str) -> dict[str, str]:
    """What a script says about its benchmark."""
    text = (FOLDER / f"{benchmark}.sh").read_text(encoding="utf-8")
    found = {name: re.search(rf"^{name}=(\S+)$", text, flags=re.MULTILINE) for name in ("benchmark", *FIELDS)}
    configs = re.search(r"^configs=\((.+)\)$", text, flags=re.MULTILINE)
    assert configs and all(found.values()), benchmark
    return {**{name: match[1] for name, match in found.items() if match}, "configs": configs[1]}


def run(benchmark: str, *flags: object, **variables: object) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": os.environ.get("HOME", "/"),
        **{name: str(value) for name, value in variables.items()},
    }
    command = ["bash", str(FOLDER / f"{benchmark}.sh"), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize("script", ["lib", *BENCHMARKS])
def test_a_script_is_valid_bash(script: str) -> None:
    assert subprocess.run(["bash", "-n", str(FOLDER / f"{script}.sh")], check=False).returncode == 0


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_a_script_is_a_table_row_and_one_call(benchmark: str) -> None:
    said = facts(benchmark)
    assert said["benchmark"] == benchmark and re.fullmatch("[0-9a-f]{40}", said["revision"])
    lines = [line for line in (FOLDER / f"{benchmark}.sh").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[-1] == 'run_benchmark "$@"' and len(lines) == 10


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_a_dry_run_prints_data_metric_and_a_command_that_the_plug_in_understands(benchmark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run(
        benchmark, "--limit", 8, DRY_RUN=1, GRANULARITY="36:144", MODEL_ARGS="max_visual_tokens=500,dtype=bfloat16", MODEL_PATH="some/model"
    )
    assert done.returncode == 0, done.stderr
    said = facts(benchmark)
    for name in FIELDS:
        assert said[name] in done.stdout, name
    words = shlex.split(done.stdout.split("run: ")[1])
    variables = dict(word.split("=", 1) for word in words[: words.index("bash")])
    assert words[words.index("bash") :] == ["bash", "scripts/eval/lmms_eval.sh", "--limit", "8"]
    assert variables["TASKS"] == said["task"] and variables["HF_HUB_OFFLINE"] == "1"
    assert variables["HF_DATASETS_CACHE"].endswith(f"{benchmark}-{said['revision'][:8]}")
    assert variables["OUTPUT"].endswith(f"runs/eval/model-36-144-max_visual_tokens=500-dtype=bfloat16/{benchmark}")
    header = (FOLDER / "lmms_eval.sh").read_text(encoding="utf-8")
    known = {"HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_DATASETS_CACHE", "LMMS_EVAL_DATASETS_CACHE"}  # the libraries' own
    assert [name for name in set(variables) - known if f"{name}:" not in header and f"{name} (" not in header] == []
    monkeypatch.syspath_prepend(str(ROOT / "lmms-eval"))
    from avg_llava_lmms_eval.arguments import parse_arguments

    given = dict(pair.split("=", 1) for pair in variables["MODEL_ARGS"].split(","))
    arguments = parse_arguments({"pretrained": variables["MODEL_PATH"], "batch_size": variables["BATCH_SIZE"], **given})
    assert arguments.routing.granularity == (36, 144) and arguments.routing.max_visual_tokens == 500 and arguments.batch_size == 8


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"REVISION": "main"}, "REVISION is main, expected a commit of lmms-lab-encoder/MME in full"),
        ({"SLICE": 7}, "SLICE is 7, expected an even number"),
        ({"SLICE": "many"}, "SLICE is many, expected an even number"),
        ({"GRANULARITY": "foo", "DRY_RUN": 1}, "GRANULARITY is foo, expected auto, tokens per view such as 36, or several"),
        ({"GRANULARITY": "36:", "DRY_RUN": 1}, "GRANULARITY is 36:, expected"),
        ({"MODEL": "llava", "GRANULARITY": 36}, "the model llava has no such argument"),
        ({"LMMS_EVAL_ENV": "/nowhere"}, "run: bash scripts/eval/setup_lmms_eval.sh"),
    ],
)
def test_what_cannot_work_is_one_sentence(variables: dict[str, object], sentence: str) -> None:
    done = run("mme", **variables)
    assert done.returncode == 1 and sentence in done.stderr


# ---- what is asked of the harness, without the harness


@pytest.fixture
def harness(tmp_path: Path) -> Path:
    """An environment whose Python notes the harness's calls; it fails where the file `fail` names the offset."""
    python = tmp_path / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        f"""#!/usr/bin/env bash
case "$1 $2" in
  *prepare.py*) echo "10 state-$(cat {tmp_path}/state 2>/dev/null)"; printf '%s\\n' "$*" >>{tmp_path}/prepared; exit 0 ;;
  -c*device_count*) echo 2; exit 0 ;;
  -c*) exit 1 ;;
  "- "*) exec {shlex.quote(sys.executable)} "$@" ;;
esac
printf '%s\\n' "$* | $TASKS $HF_HUB_OFFLINE $HF_DATASETS_CACHE $OUTPUT" >>{tmp_path}/calls
[[ ! -e {tmp_path}/fail || " $* " != *" --offset $(cat {tmp_path}/fail) "* ]] || exit 1
[[ -n $OUTPUT ]] || exit 0
mkdir -p "$OUTPUT/model"
echo '{{"results": {{"mme": {{"mme_perception_score,none": 1500.25}}}}}}' >"$OUTPUT/model/1_results.json"
"""
    )
    python.chmod(0o755)
    return tmp_path


def calls(folder: Path) -> list[str]:
    """Each call's offset, or `all`."""
    lines = (folder / "calls").read_text(encoding="utf-8").splitlines()
    (folder / "calls").unlink()
    return [(re.search(r"--offset (\d+)", line) or ["", "all"])[1] for line in lines]


def given(harness: Path, **more: object) -> dict[str, object]:
    return {"LMMS_EVAL_ENV": harness / "env", "OUTPUT": harness / "out", "DATA": harness / "data", "MODEL_PATH": "m", "SLICE": 4, **more}


def test_questions_are_asked_slice_by_slice_and_scored_whole(harness: Path) -> None:
    done = run("mme", **given(harness))
    assert done.returncode == 0, done.stderr
    assert "mme mme_perception_score: 1500.2500" in done.stdout
    lines = (harness / "calls").read_text(encoding="utf-8").splitlines()
    cache = re.search(r"--use_cache (\S+)", lines[0])
    assert cache and all(f"--use_cache {cache[1]} " in line + " " for line in lines)
    assert all(re.search("--(nproc_per_node|num_processes) 2 .*--tasks mme ", line) for line in lines)
    assert all(f"granularity=auto --tasks mme --batch_size 8 --output_path {harness}/out" in line for line in lines)
    assert calls(harness) == ["0", "4", "8", "all"]
    assert "--limit 4" in lines[0] and "--limit" not in lines[-1] and "out/slices" not in lines[-1]
    assert f"--cache {harness}/data/mme-d6c9023f --model m --config default" in (harness / "prepared").read_text()


def test_a_failed_run_goes_on_with_its_slice(harness: Path) -> None:
    (harness / "fail").write_text("4")
    done = run("mme", **given(harness))
    assert done.returncode == 1 and "The same command resumes" in done.stderr
    assert calls(harness) == ["0", "4"]
    (harness / "fail").unlink()
    assert run("mme", **given(harness)).returncode == 0
    assert calls(harness) == ["4", "8", "all"]
    assert run("mme", **given(harness)).returncode == 0
    assert calls(harness) == ["all"]
    (harness / "state").write_text("retrained")  # other weights in the same folder: nothing of the old cache is used
    assert run("mme", **given(harness)).returncode == 0
    assert calls(harness) == ["0", "4", "8", "all"]
    assert run("mme", **given(harness, GRANULARITY=36)).returncode == 0
    assert calls(harness) == ["0", "4", "8", "all"]


def test_another_granularity_model_or_argument_has_another_folder() -> None:
    wishes: list[dict[str, object]] = [
        {}, {"GRANULARITY": 36}, {"GRANULARITY": "36:144"}, {"MODEL_ARGS": "max_visual_tokens=48"}, {"MODEL_ARGS": "granularity_bias=-1"},
        {"MODEL": "llava"}, {"MODEL_PATH": "other"},
    ]  # fmt: skip
    outputs = [re.search(r" OUTPUT=(\S+)", run("mme", **{"DRY_RUN": 1, "MODEL_PATH": "a/m", **wish}).stdout) for wish in wishes]
    names = [found and found[1].split("/runs/eval/")[1] for found in outputs]
    assert names[:3] == ["m-auto/mme", "m-36/mme", "m-36-144/mme"] and len(set(names)) == len(wishes)


def test_local_tasks_of_another_granularity_have_another_folder(harness: Path) -> None:
    for arguments in ("", "granularity=4:16", "granularity=4"):
        environment = {"PATH": os.environ["PATH"], "LMMS_EVAL_ENV": str(harness / "env"), "MODEL_ARGS": arguments, "OUTPUT": ""}
        subprocess.run(["bash", str(FOLDER / "lmms_eval.sh")], check=False, env=environment, capture_output=True)
    outputs = re.findall(r"--output_path (\S+)", (harness / "calls").read_text(encoding="utf-8"))
    assert [Path(output).name for output in outputs] == [f"avg-llava-micro-{name}" for name in ("auto", "4-16", "4")]


def test_a_limit_or_slice_0_asks_once(harness: Path) -> None:
    assert run("mme", "--limit", 2, **given(harness)).returncode == 0
    assert run("mme", **given(harness, SLICE=0)).returncode == 0
    assert calls(harness) == ["all", "all"]


def test_fetching_alone_runs_nothing(harness: Path) -> None:
    assert run("gqa", **given(harness, FETCH_ONLY=1, OFFLINE=1)).returncode == 0
    assert not (harness / "calls").exists()
    prepared = (harness / "prepared").read_text()
    assert "--config testdev_balanced_instructions --config testdev_balanced_images --offline" in prepared


def test_a_result_without_the_papers_metric_is_an_error(harness: Path) -> None:
    done = run("pope", **given(harness))
    assert done.returncode == 1 and done.stderr


# ---- fetching


@pytest.fixture
def prepare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare", FOLDER / "prepare.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Split(list[int]):
    """Rows that say where they are stored."""

    def __init__(self, rows: int, file: Path) -> None:
        super().__init__(range(rows))
        self.cache_files = [{"filename": str(file)}]


REVISION = "0123456789" * 4


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Stands in for the `datasets` library; the list notes what was loaded."""
    loaded: list[Any] = []

    def load_dataset(name: str, config: str | None, revision: str) -> dict[str, Split]:
        loaded.append((name, config, revision))
        return {"test": Split(5, tmp_path / "a" / REVISION / "x.arrow"), "val": Split(3, tmp_path / "a" / REVISION / "y.arrow")}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    for name in ("HF_DATASETS_CACHE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))  # the program sets them; this puts them back
    return loaded


def wish(tmp_path: Path, *more: str, revision: str = REVISION) -> list[str]:
    fixed = ["--dataset", "a/b", "--revision", revision, "--split", "val", "--cache", str(tmp_path / "cache"), "--model", str(MICRO_MODEL)]
    return [*fixed, "--config", "default", "--config", "two", *more]


def test_data_is_fetched_once_and_then_offline(
    prepare: ModuleType, fetched: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare.main(wish(tmp_path, "--offline")) == 1
    assert "does not hold a/b" in capsys.readouterr().err
    assert prepare.main(wish(tmp_path)) == 0
    rows, state = capsys.readouterr().out.split()
    assert rows == "3" and state.startswith(str(MICRO_MODEL)) and fetched == [("a/b", None, REVISION), ("a/b", "two", REVISION)]
    assert json.loads((tmp_path / "cache" / "pinned.json").read_text())["rows"] == {"test": 5, "val": 3}
    assert prepare.main(wish(tmp_path, "--offline")) == 0
    assert len(fetched) == 2 and os.environ["HF_DATASETS_CACHE"] == str(tmp_path / "cache")


def test_another_revision_or_split_is_refused(
    prepare: ModuleType, fetched: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare.main(wish(tmp_path, revision="main")) == 1
    assert "expected a commit of a/b in full" in capsys.readouterr().err
    assert prepare.main(wish(tmp_path, revision="f" * 40)) == 1
    assert "does not lie under the revision" in capsys.readouterr().err
    assert prepare.main(wish(tmp_path)) == 0
    assert prepare.main(wish(tmp_path, revision="f" * 40)) == 1
    assert "give DATA another folder" in capsys.readouterr().err
    assert prepare.main([*wish(tmp_path), "--split", "train"]) == 1
    assert "has the splits test, val, expected train" in capsys.readouterr().err
