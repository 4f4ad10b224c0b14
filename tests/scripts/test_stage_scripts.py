"""The four stage scripts: run one after the other, refuse what is missing in a sentence, and pass only flags that are read."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from llava.model.builder import load_pretrained_model
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments
from llava.train.run import parse_arguments
from llava.train.stages import STAGES
from tests.stage_runs import (
    ORACLE,
    ROOT,
    SCRIPTS,
    TOY_CANVASES,
    TOY_LEVELS,
    environment,
    losses,
    make_language_model,
    recorded_rows,
    run_well,
    script,
    write_rows,
)

STAGE_NAMES = list(SCRIPTS)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.json", recorded_rows())


# ---- all four, one after the other


@pytest.mark.slow
def test_four_scripts_in_a_row(tmp_path: Path, rows: Path) -> None:
    """Two processes, each stage from the one before; what should change changes, and every output loads for inference."""
    language_model = make_language_model(tmp_path / "llama")
    captions = [row for row in recorded_rows() if "image" in row and len(row["conversations"]) == 2]
    first = {
        "MODEL": language_model,
        "VISION_TOWER": ORACLE / "tiny-clip",
        "DATA_PATH": write_rows(tmp_path / "captions.json", captions),
    }
    steps = ("--max_steps", 3)
    out = {name: tmp_path / name for name in STAGE_NAMES}
    run_well("align", {**first, "OUTPUT_DIR": out["align"]}, (*steps, "--image_grid_pinpoints", TOY_CANVASES))
    before = "align"
    for name, variables, flags in (
        ("instruct", {"LEARNING_RATE": 1e-3}, ()),
        ("multi_granularity", {"LEARNING_RATE": 1e-3}, ()),
        ("rglf", {"SCORE": 1}, ("--router_hidden_size", 16)),
    ):
        given = {"MODEL": out[before], "DATA_PATH": rows, "OUTPUT_DIR": out[name], **variables}
        assert len(run_well(name, given, (*steps, *flags))) == 3
        before = name
    assert (out["align"] / "mm_projector.safetensors").is_file()
    assert Path(f"{out['rglf']}-scores.parquet").is_file()
    everything = {"llm", "model.mm_projector", "model.image_newline", "model.vision_tower"}
    assert changed_parts(out["align"], out["instruct"]) == everything
    assert changed_parts(out["instruct"], out["multi_granularity"]) == everything
    assert changed_parts(out["multi_granularity"], out["rglf"]) == {"model.router"}
    for folder in out.values():
        loads(folder)


def changed_parts(before: Path, after: Path) -> set[str]:
    """Which parts of the model a stage changed, by the prefix of their names."""
    old, new = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    changed = {name for name in new if name not in old or not torch.equal(old[name], new[name])}
    prefixes = ("model.mm_projector", "model.image_newline", "model.vision_tower", "model.router")
    return {next((prefix for prefix in prefixes if name.startswith(prefix)), "llm") for name in changed}


def loads(folder: Path) -> None:
    """A stage's output loads for inference and answers something."""
    tokenizer, model, processor, context = load_pretrained_model(str(folder), None, "any", device="cpu")
    assert processor is not None and context == 1024
    ids = tokenizer("Where is the man?", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape[0] == 1


def test_two_processes_start_from_one_script(tmp_path: Path, rows: Path) -> None:
    """The shortest run through bash and torchrun: two processes, one finished model, no leftovers."""
    found = run_well("rglf", {"DATA_PATH": rows, "OUTPUT_DIR": tmp_path / "out"}, ("--max_steps", 2))
    assert len(found) == 2
    loads_folder = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "trainer_state.json"} <= loads_folder
    assert not [name for name in loads_folder if name.startswith(".unfinished")]
    assert losses(tmp_path / "out") == found


# ---- what a script would start, without starting it


@pytest.fixture
def recorder(tmp_path: Path) -> Path:
    """An interpreter that notes what it is asked to run, and answers the scripts' small questions like the real one."""
    file = tmp_path / "bin" / "python"
    file.parent.mkdir()
    file.write_text(
        f"""#!/usr/bin/env bash
if [[ $1 == -c && $2 == *deepspeed* ]]; then
  exit 0 # it is there, as far as the scripts are concerned
elif [[ $1 == -c ]]; then
  exec {shlex.quote(sys.executable)} "$@"
fi
printf '%s\\n' "$@" >>{shlex.quote(str(tmp_path / "calls"))}
for word in "$@"; do
  [[ ${{previous:-}} != --output_file ]] || touch "$word"
  previous=$word
done
printf 'ENV %s\\n' "${{RANK:-}}" "${{DS_ACCELERATOR:-}}" >>{shlex.quote(str(tmp_path / "environment"))}
printf -- '---\\n' >>{shlex.quote(str(tmp_path / "calls"))}
"""
    )
    file.chmod(file.stat().st_mode | stat.S_IEXEC)
    return file


def would_run(stage: str, recorder: Path, *flags: str, **variables: object) -> list[list[str]]:
    """The commands that a script gives to its interpreter."""
    done = subprocess.run(
        ["bash", str(script(stage)), *flags], env=environment(**{"PYTHON": recorder, "MASTER_PORT": 29400, **variables}), cwd=ROOT,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    calls = (recorder.parents[1] / "calls").read_text().split("---\n")
    return [call.splitlines() for call in calls if call]


def training_flags(command: list[str]) -> list[str]:
    """The flags behind train_mem.py in a command."""
    return command[command.index(str(ROOT / "llava" / "train" / "train_mem.py")) + 1 :]


def toy(stage: str, rows: Path, out: Path) -> dict[str, object]:
    """Variables that every stage accepts."""
    return {"DATA_PATH": rows, "OUTPUT_DIR": out, "VISION_TOWER": ORACLE / "tiny-clip" if stage == "align" else None}


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_published_hyper_parameters(stage: str, recorder: Path, rows: Path, tmp_path: Path) -> None:
    """The defaults of each script are the published ones, and they parse as the stage they are meant for."""
    published: dict[str, dict[str, Any]] = {
        "align": {"learning_rate": 1e-3, "global": 256, "version": "plain"},
        "instruct": {"learning_rate": 2e-5, "mm_vision_tower_lr": 2e-6, "global": 128, "version": "v1"},
        "multi_granularity": {"learning_rate": 1e-5, "mm_vision_tower_lr": 2e-5, "global": 128, "version": "v1"},
        "rglf": {"learning_rate": 1e-3, "global": 128, "version": "v1", "margin": 1, "rank_loss_weight": 1, "ce_loss_weight": 0.1},
    }
    wanted = published[stage]
    unset = {name: None for name in ("GLOBAL_BATCH", "BATCH", "MODEL_MAX_LENGTH", "WORKERS", "VIS_TOKEN_GRANULARITY", "FILTERED_TEXT_NUM")}
    (command,) = would_run(stage, recorder, **{**toy(stage, rows, tmp_path / "o"), **unset, "NPROC": 8})
    model_args, _, args = parse_arguments(training_flags(command))
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps * 8 == wanted.pop("global")
    assert model_args.version == wanted.pop("version")
    for name, value in wanted.items():
        assert getattr(args, name) == value
    assert (args.stage, args.lr_scheduler_type, args.weight_decay, args.warmup_steps) == (stage, "cosine", 0.0, 0.03)
    assert args.num_train_epochs == 1 and args.model_max_length == 4096 and args.gradient_checkpointing
    assert args.group_by_modality_length == (stage != "align")
    if stage == "multi_granularity":
        assert model_args.granularities == [36, 72, 144, 288, 576]
    if stage == "rglf":
        assert model_args.filtered_text_num == 32
    rates = STAGES[stage]
    assert args.learning_rates["llm"] == rates.learning_rate


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_every_flag_is_read(stage: str, recorder: Path, rows: Path, tmp_path: Path) -> None:
    """Each flag is a field, and each field of ours is used somewhere beyond its declaration."""
    variables = {**toy(stage, rows, tmp_path / "o"), "SCORES": rows if stage == "rglf" else None, "RESUME": 1, "ZERO": "2"}
    (command,) = would_run(stage, recorder, **variables)
    names = {flag.removeprefix("--") for flag in training_flags(command) if flag.startswith("--")}
    own = {item.name for kind in (ModelArguments, DataArguments, TrainingArguments) for item in dataclasses.fields(kind)}
    stock = {item.name for item in dataclasses.fields(transformers.TrainingArguments)}
    assert names <= own
    sources = "\n".join(path.read_text() for path in (ROOT / "llava" / "train").rglob("*.py"))
    for name in names - stock:
        uses = re.findall(rf"(?:\.|\"){name}\b", sources)
        assert uses, f"--{name} is declared, but nothing reads it"


def test_variables_reach_the_flags(recorder: Path, rows: Path, tmp_path: Path) -> None:
    (command,) = would_run(
        "instruct", recorder, "--seed", "7", "--learning_rate", "3e-4", **toy("instruct", rows, tmp_path / "o"),
        LAUNCHER="python", NPROC=None, LEARNING_RATE="1e-4", TOWER_LEARNING_RATE="1e-6", EPOCHS=3, SAVE_STEPS=11, RESUME=1, GLOBAL_BATCH=6,
    )  # fmt: skip
    _, data_args, args = parse_arguments(training_flags(command))
    assert (args.seed, args.learning_rate, args.mm_vision_tower_lr) == (7, 3e-4, 1e-6)  # what follows the script's name wins
    assert (args.num_train_epochs, args.save_steps, args.resume_from_checkpoint) == (3, 11, "True")
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (2, 3)
    assert args.use_cpu and not args.bf16 and data_args.data_path == str(rows)
    environments = (tmp_path / "environment").read_text().splitlines()
    assert environments == ["ENV 0", "ENV cpu"]


def test_gpu_runs_are_bf16(recorder: Path, rows: Path, tmp_path: Path) -> None:
    (command,) = would_run("instruct", recorder, **toy("instruct", rows, tmp_path / "o"), DEVICE="cuda")
    flags = training_flags(command)
    assert flags[flags.index("--bf16") + 1] == "True" and flags[flags.index("--tf32") + 1] == "True" and "--use_cpu" not in flags


def test_a_projector_that_lies_alone(recorder: Path, rows: Path, tmp_path: Path) -> None:
    variables = {**toy("instruct", rows, tmp_path / "o"), "PROJECTOR": rows, "VISION_TOWER": ORACLE / "tiny-clip"}
    (command,) = would_run("instruct", recorder, **variables)
    model_args, data_args, _ = parse_arguments(training_flags(command))
    assert model_args.pretrain_mm_mlp_adapter == str(rows) and model_args.mm_projector_type == "mlp2x_gelu"
    assert data_args.image_aspect_ratio == "anyres" and len(data_args.canvases or ()) == 5


def test_scores_are_made_first(recorder: Path, rows: Path, tmp_path: Path) -> None:
    scoring, training = would_run("rglf", recorder, **toy("rglf", rows, tmp_path / "o"), SCORE=1)
    assert "llava.train.score_granularities" in scoring and "--nproc_per_node" in scoring
    assert scoring[scoring.index("--output_file") + 1] == f"{tmp_path / 'o'}-scores.parquet"
    assert training[training.index("--granularity_scores") + 1] == f"{tmp_path / 'o'}-scores.parquet"


@pytest.mark.parametrize("zero", ["2", "3", "3_offload"])
def test_zero_chooses_a_file(zero: str, recorder: Path, rows: Path, tmp_path: Path) -> None:
    (command,) = would_run("align", recorder, **toy("align", rows, tmp_path / "o"), ZERO=zero)
    flags = training_flags(command)
    settings = json.loads(Path(flags[flags.index("--deepspeed") + 1]).read_text())
    assert str(settings["zero_optimization"]["stage"]) == zero[0]
    assert ("offload_optimizer" in settings["zero_optimization"]) == zero.endswith("offload")
    for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"):
        assert settings[name] == "auto"


# ---- launchers


def test_torchrun_on_two_nodes(recorder: Path, rows: Path, tmp_path: Path) -> None:
    (command,) = would_run(
        "instruct", recorder, **toy("instruct", rows, tmp_path / "o"), NNODES=2, NODE_RANK=1, MASTER_ADDR="10.0.0.1", MASTER_PORT=1234,
        NPROC=1,
    )  # fmt: skip
    launcher = command[: command.index(str(ROOT / "llava" / "train" / "train_mem.py"))]
    assert launcher == [
        "-m", "torch.distributed.run", "--nproc_per_node", "1", "--nnodes", "2", "--node_rank", "1", "--master_addr", "10.0.0.1",
        "--master_port", "1234",
    ]  # fmt: skip


def test_deepspeed_on_two_nodes(recorder: Path, rows: Path, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=1\nb slots=1\n")
    given = {**toy("instruct", rows, tmp_path / "o"), "LAUNCHER": "deepspeed", "NNODES": 2, "NPROC": 1, "HOSTFILE": hosts}
    by_ssh, by_hand = [
        would_run("instruct", recorder, **given, **more)[-1]
        for more in ({}, {"NODE_RANK": 0, "MASTER_ADDR": "10.0.0.1"})
    ]
    assert by_ssh[:2] == ["-m", "deepspeed.launcher.runner"] and "--no_ssh" not in by_ssh
    assert by_ssh[by_ssh.index("--hostfile") + 1] == str(hosts)
    assert "--no_ssh" in by_hand and by_hand[by_hand.index("--node_rank") + 1] == "0"


def test_srun_starts_one_torchrun_per_node(recorder: Path, rows: Path, tmp_path: Path) -> None:
    """A stand-in for SLURM: `srun` runs the command once per node, `scontrol` knows the nodes' names."""
    for name, text in {
        "srun": f'printf "%s\\n" "$@" >{tmp_path}/srun\n'
        'while [[ $1 != bash ]]; do shift; done\nfor SLURM_NODEID in 0 1; do SLURM_NODEID=$SLURM_NODEID "$@"; done',
        "scontrol": "printf 'alpha\\nbeta\\n'",
    }.items():
        file = recorder.parent / name
        file.write_text(f"#!/usr/bin/env bash\nexport SLURM_NODEID SLURM_JOB_NODELIST=list\n{text}\n")
        file.chmod(0o755)
    calls = would_run(
        "instruct", recorder, **toy("instruct", rows, tmp_path / "a folder"), LAUNCHER="srun", NNODES=2, NPROC=1,
        PATH=f"{recorder.parent}:{os.environ['PATH']}", SRUN_ARGS="--partition=gpu --gres=gpu:1",
    )  # fmt: skip
    assert [call[call.index("--node_rank") + 1] for call in calls] == ["0", "1"]
    assert all(call[call.index("--master_addr") + 1] == "alpha" for call in calls)
    assert all(call[call.index("--output_dir") + 1] == str(tmp_path / "a folder") for call in calls)
    asked = (tmp_path / "srun").read_text().splitlines()
    assert asked[:7] == ["--nodes", "2", "--ntasks-per-node", "1", "--kill-on-bad-exit=1", "--partition=gpu", "--gres=gpu:1"]


# ---- what stops a script before anything starts


@pytest.mark.parametrize(
    ("stage", "variables", "sentence"),
    [
        ("align", {"DATA_PATH": None}, "DATA_PATH is not set; give the rows to train on"),
        ("align", {"DATA_PATH": "none.json"}, "DATA_PATH is none.json, which does not exist"),
        ("align", {"VISION_TOWER": "./clip"}, "VISION_TOWER is ./clip, which is not a folder."),
        ("align", {"MODEL": "./vicuna"}, "MODEL is ./vicuna, which is not a folder."),
        ("instruct", {"IMAGE_FOLDER": "no/such"}, "IMAGE_FOLDER is no/such, which does not exist"),
        ("instruct", {"MODEL": None}, "run scripts/avg_llava/stage1_align.sh first"),
        ("multi_granularity", {"MODEL": None}, "run scripts/avg_llava/stage2_instruct.sh first"),
        ("rglf", {"MODEL": None}, "run scripts/avg_llava/stage3_multi_granularity.sh first"),
        ("instruct", {"PROJECTOR": "p.bin"}, "PROJECTOR is p.bin, which does not exist"),
        ("rglf", {"SCORES": "s.parquet"}, "SCORES is s.parquet, which does not exist"),
        ("rglf", {"OUTPUT_DIR": ORACLE / "checkpoint"}, "holds an earlier run (config.json); choose another OUTPUT_DIR"),
        ("instruct", {"LAUNCHER": "mpirun"}, "LAUNCHER is mpirun, expected one of: deepspeed torchrun srun python."),
        ("instruct", {"ZERO": "1"}, "ZERO is 1, expected one of: none 2 3 3_offload."),
        ("instruct", {"DEVICE": "tpu"}, "DEVICE is tpu, expected one of: cuda cpu."),
        ("instruct", {"PRECISION": "int8"}, "PRECISION is int8, expected one of: bf16 fp16 fp32."),
        ("instruct", {"NPROC": "two"}, "NPROC is two, expected a whole number of 1 or more."),
        ("instruct", {"GLOBAL_BATCH": 6}, "GLOBAL_BATCH is 6, no multiple of BATCH (2) x 2 processes"),
        ("instruct", {"LAUNCHER": "python"}, "LAUNCHER is python, which is one process, but NPROC x NNODES is 2"),
        ("instruct", {"NNODES": 2}, "NODE_RANK is not set; give this node's number, 0 to 1."),
        ("instruct", {"NNODES": 2, "NODE_RANK": 0}, "MASTER_ADDR is not set; give the address of node 0."),
        ("instruct", {"NNODES": 2, "NODE_RANK": 2, "MASTER_ADDR": "a"}, "NODE_RANK is 2, expected a number from 0 to 1."),
        ("instruct", {"NNODES": 2, "LAUNCHER": "deepspeed"}, "HOSTFILE is not set, but LAUNCHER=deepspeed on 2 nodes needs"),
        ("rglf", {"SCORE": 1, "NNODES": 2, "NODE_RANK": 1, "MASTER_ADDR": "a", "NPROC": 1}, "SCORE=1 needs one command that starts"),
        ("instruct", {"LAUNCHER": "srun", "PATH": "/usr/bin:/bin"}, "this machine has no srun"),
        ("instruct", {"NPROC": None, "DEVICE": "cuda", "PYTHON": "no-python"}, "no-python has no working torch"),
    ],
)
def test_one_sentence_and_nothing_started(
    stage: str, variables: dict[str, object], sentence: str, recorder: Path, rows: Path, tmp_path: Path
) -> None:
    given = {"PYTHON": recorder, "CUDA_VISIBLE_DEVICES": "", **toy(stage, rows, tmp_path / "o"), **variables}
    done = subprocess.run(
        ["bash", str(script(stage))], env=environment(**given), cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and sentence in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "calls").exists()


def test_an_earlier_run_is_gone_on_with_or_overwritten(recorder: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    (out / "checkpoint-3").mkdir(parents=True)
    given = toy("rglf", rows, out)
    command = ["bash", str(script("rglf"))]
    refused = subprocess.run(command, env=environment(PYTHON=recorder, **given), cwd=ROOT, capture_output=True, text=True, check=False)
    assert refused.returncode == 1 and "holds an earlier run (checkpoint-3)" in refused.stderr
    assert len(would_run("rglf", recorder, **given, RESUME=1)) == 1
    assert len(would_run("rglf", recorder, **given, OVERWRITE=1)) == 2
    assert len(would_run("rglf", recorder, "--resume_from_checkpoint", "True", **given)) == 3


@pytest.mark.parametrize("name", ["lib.sh", *SCRIPTS.values()])
def test_scripts_say_what_they_are(name: str) -> None:
    """Bash accepts each file; a stage's header says what it needs, costs and makes, and names every variable it reads."""
    file = ROOT / "scripts" / "avg_llava" / name
    assert subprocess.run(["bash", "-n", str(file)], check=False).returncode == 0
    if name == "lib.sh":
        return
    text = file.read_text()
    header, body = text.split("set -euo pipefail")
    for word in ("# Needs", "# Costs", "# Makes", "# Knobs", f"bash scripts/avg_llava/{name}"):
        assert word in header
    for variable in re.findall(r"\$\{([A-Z_]+):-", body):
        assert variable in header, variable


def test_levels_of_the_toy_are_the_recorded_ones() -> None:
    config = json.loads((ORACLE / "checkpoint" / "config.json").read_text())
    assert TOY_LEVELS in (str(config["vis_token_granularity"]).strip("[]").replace(" ", ""), config["vis_token_granularity"])
