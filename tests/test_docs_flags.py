"""The pages and `--help` name the same flags: none that no program has, and of the programs that the pages present, all."""

from __future__ import annotations

import argparse
import functools
import re
import runpy
import sys
from pathlib import Path

import pytest

from llava.train.arguments import whole_parser

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "tests/oracle/README.md")),
    *sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("[!.]*/README.md")]),
]
PRESENTED = {
    "llava.eval.run_llava": ["README.md", "docs/Evaluation.md"],
    "llava.eval.model_vqa": ["docs/Evaluation.md"],
    "llava.eval.granularity_report": ["docs/Evaluation.md"],
    "llava.serve": ["docs/Operating.md"],
    "llava.serve.cli": ["docs/Serving.md"],
    "llava.serve.controller": ["docs/Operating.md"],
    "llava.serve.gradio_web_server": ["docs/Operating.md"],
    "llava.serve.model_worker": ["docs/Operating.md"],
    "llava.serve.sglang_worker": ["docs/Operating.md"],
    "llava.train.dataset": ["docs/Data.md", "docs/Training.md"],
    "llava.train.estimate": ["docs/Training.md"],
    "scripts/quickstart.py": ["README.md"],
    "scripts/merge_lora_weights.py": ["docs/LoRA.md"],
}
"""Programs, and the pages that name all of their flags between them."""
OTHERS = (
    "llava.train.train",
    "llava.train.score_granularities",
    "llava.convert",
    "llava.tools.memory",
    "scripts/convert_llava_next.py",
    "scripts/eval/prepare.py",
    "scripts/mutation.py",
)
"""Programs of which the pages name some flags: transformers has 150 of its own, and the scripts say theirs in their headers."""
COMMON = {
    *("model_path", "model_base", "conv_mode", "temperature", "top_p", "max_new_tokens", "seed", "device", "load_8bit", "load_4bit"),
    "log_level",
}
"""What `llava.flags` gives every command; a page says of them that they are the same everywhere."""
FOREIGN = {
    "--help", "--upgrade", "--no-build-isolation",  # Python's and pip's
    "--nproc_per_node", "--multi_gpu", "--num_processes",  # torchrun's and accelerate's
    "--tasks", "--model_args", "--output_path", "--log_samples", "--include_path", "--use_cache", "--offset",  # lmms-eval's
    "--shell", "--home-dir", "--system", "--now", "--gpus", "--rm", "--stop-timeout",  # useradd's, systemctl's and docker's
    "--partition", "--gres",  # Slurm's
    "--enable-prompt-tokens-details", "--trust-request-mm-kwargs", "--enable-mm-embeds", "--limit-mm-per-prompt",  # vllm serve's
    "--tensor-parallel-size", "--gpu-memory-utilization", "--served-model-name", "--max-model-len", "--mm-processor-kwargs",
    "--additional-config", "--media-io-kwargs", "--max-num-seqs", "--max-num-batched-tokens", "--mm-processor-cache-gb",
    "--api-server-count", "--pipeline-parallel-size", "--profile", "--from-file",  # of docker compose and kubectl the last two
    "--replicas", "--split",  # scripts/serve_vllm.sh's
    "--local-dir",  # hf download's
    "--slow", "--serve",  # scripts/test.sh's and scripts/docs.sh's
}  # fmt: skip
"""Flags of other people's programs, and of shell scripts."""


class _FoundError(BaseException):
    """Carries a program's parser out of it."""


@functools.cache
def flags_of(program: str) -> tuple[tuple[str, ...], ...]:
    """Each flag that a program's `--help` shows, in all its spellings, `--help` apart."""

    def stop(parser: argparse.ArgumentParser, *args: object, **kwargs: object) -> None:
        raise _FoundError(parser)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(_FoundError) as found:
        patch.setattr(sys, "argv", [program])
        for name in ("parse_args", "parse_known_args"):
            patch.setattr(argparse.ArgumentParser, name, stop)
        if program.endswith(".py"):
            runpy.run_path(str(ROOT / program), run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__")
    actions = found.value.args[0]._actions
    shown = [action for action in actions if action.option_strings and action.dest != "help" and action.help != argparse.SUPPRESS]
    return tuple(tuple(action.option_strings) for action in shown)


def named(text: str) -> set[str]:
    """The flags that a text names."""
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_flags_that_the_pages_name_are_some_programs() -> None:
    flags = {flag for program in (*PRESENTED, *OTHERS) for spellings in flags_of(program) for flag in spellings}
    flags |= set(whole_parser()._option_string_actions)
    known = flags | {f"--{flag[2:].replace('-', '_')}" for flag in flags} | FOREIGN | {"--use-flash-attn", "--multi-modal"}
    unknown = {str(page.relative_to(ROOT)): sorted(named(page.read_text(encoding="utf-8")) - known) for page in PAGES}
    assert {page: flags for page, flags in unknown.items() if flags} == {}


@pytest.mark.parametrize("program", PRESENTED)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_a_programs_flags_are_named_by_its_pages(program: str) -> None:
    pages = named("\n".join((ROOT / page).read_text(encoding="utf-8") for page in PRESENTED[program]))
    missing = [
        spellings[0]
        for spellings in flags_of(program)
        if not pages & set(spellings) and not spellings[0].startswith("--no_") and spellings[0].strip("-").replace("-", "_") not in COMMON
    ]
    assert missing == []


def test_flags_of_others_are_no_programs_of_ours() -> None:
    """An entry that a program of ours has taken up is checked no longer; it must go."""
    own = {flag for program in PRESENTED for spellings in flags_of(program) for flag in spellings}
    assert own & FOREIGN == set()
