"""Runs of the stage scripts at toy size, as a user starts them: variables, bash, a launcher, processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[1]
ORACLE = ROOT / "tests" / "oracle"
SCRIPTS = {
    "align": "stage1_align.sh",
    "instruct": "stage2_instruct.sh",
    "multi_granularity": "stage3_multi_granularity.sh",
    "rglf": "stage4_rglf.sh",
}
TOY_CANVASES = "[[48, 96], [96, 48], [96, 96]]"
TOY_LEVELS = "9,18,36,72,144"
QUIET = ("--report_to", "none", "--disable_tqdm", "True")


def script(stage: str) -> Path:
    """The bash file of a stage."""
    return ROOT / "scripts" / "avg_llava" / SCRIPTS[stage]


def environment(**variables: object) -> dict[str, str]:
    """The environment of a script run on a CPU; keywords are the scripts' variables."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "TORCH_EXTENSIONS_DIR") if name in os.environ}
    toy = {
        "PYTHON": sys.executable, "DEVICE": "cpu", "LAUNCHER": "torchrun", "NPROC": 2, "ZERO": "none", "GLOBAL_BATCH": 4, "BATCH": 2,
        "MODEL_MAX_LENGTH": 1024, "WORKERS": 0, "VIS_TOKEN_GRANULARITY": TOY_LEVELS, "FILTERED_TEXT_NUM": 24,
        "MODEL": ORACLE / "checkpoint", "IMAGE_FOLDER": ORACLE / "images", "OMP_NUM_THREADS": 1, "HF_HUB_OFFLINE": 1,
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    return kept | {name: str(value) for name, value in {**toy, **variables}.items() if value is not None}


def start(
    stage: str, variables: Mapping[str, object], flags: Sequence[object] = (), prefix: Sequence[str] = (), log: Path | None = None
) -> subprocess.Popen[str]:
    """Start a stage's script in a process group of its own."""
    output = log.open("w") if log else subprocess.PIPE
    return subprocess.Popen(
        [*prefix, "bash", str(script(stage)), *QUIET, *map(str, flags)],
        env=environment(**variables), cwd=ROOT, text=True, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def stop_group(process: subprocess.Popen[str], patience: float = 20) -> None:
    """End everything that a script started: launchers end their workers, which have sessions of their own, when asked kindly."""
    for number, seconds in ((signal.SIGTERM, patience), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
            process.wait(seconds)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def run(
    stage: str, variables: Mapping[str, object], flags: Sequence[object] = (), timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run a stage's script to its end; a run that hangs is ended and fails the test."""
    process = start(stage, variables, flags)
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        stop_group(process)
    return subprocess.CompletedProcess(process.args, process.returncode, output, "")


def run_well(stage: str, variables: Mapping[str, object], flags: Sequence[object] = (), timeout: float = 300) -> list[float]:
    """Run a stage's script, which must succeed, and return its losses."""
    done = run(stage, variables, flags, timeout)
    assert done.returncode == 0, done.stdout[-6000:]
    return losses(Path(str(variables["OUTPUT_DIR"])))


def losses(folder: Path) -> list[float]:
    """The loss of every step of a finished run."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def make_language_model(folder: Path) -> Path:
    """A plain random Llama folder to start a multimodal model from."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=420, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(ORACLE / "checkpoint" / name, folder)
    return folder


def recorded_rows() -> list[dict[str, Any]]:
    """Seven conversations, two of them without an image (the third and the last)."""
    return json.loads((ORACLE / "train_data.json").read_text())


def write_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows as LLaVA's JSON."""
    file.write_text(json.dumps(list(rows)))
    return file
