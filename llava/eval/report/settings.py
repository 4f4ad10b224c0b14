"""A report's settings: its flags, read and checked as far as possible without the model."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields, replace
from pathlib import Path

from llava.eval.checks import check_server
from llava.eval.report.tasks import Task, open_task, read_task

TIMED = 40
"""Questions that times are measured on, where nothing else is said."""


@dataclass(frozen=True)
class Settings:
    """The flags of `python -m llava.eval.granularity_report`, with the questions that they name.

    task: the questions. output: the report's folder; overwrite: replace what it holds. model_path: `None` for the shipped model.
    answers: an answers.jsonl to reuse. baseline: an earlier report to compare with.
    engine, vllm: who answers, see `llava.eval.checks.check_server`.
    granularities: tokens per view to compare, `None` for all. biases: `None` for the usual ones.
    """

    task: Task
    output: Path
    model_path: str | None
    model_base: str | None
    device: str | None
    engine: str
    vllm: str | None
    answers: Path | None
    baseline: Path | None
    overwrite: bool
    granularities: list[int] | None
    biases: list[float] | None
    budgets: list[int]
    batch_size: int
    max_new_tokens: int
    timing_samples: int
    timing_repeats: int
    examples: int
    seed: int

    @classmethod
    def of(cls, args: argparse.Namespace) -> Settings:
        """Read the questions that the flags name, and take over the rest.

        Raises:
            ValueError: flags that contradict each other, an unknown task, or a question file with mistakes.
        """
        if args.task and args.image_folder:
            raise ValueError("--image-folder belongs to --questions; a task brings its own images.")
        task = open_task(args.task) if args.task else read_task(args.questions, args.image_folder)
        check_server(args.engine, args.vllm)
        if args.engine == "vllm" and args.timing_samples:
            raise ValueError(
                f"--timing-samples is {args.timing_samples}, but times are those of the model in this process, which --engine vllm does "
                "not load; leave it out."
            )
        if args.engine == "vllm" and args.model_base is not None:
            raise ValueError(f"--model-base is {args.model_base!r}, but --engine vllm asks a server of a whole model; leave it out.")
        if args.limit:
            task = replace(task, items=task.items[: args.limit])
        same = {field.name: getattr(args, field.name) for field in fields(cls) if field.name not in ("task", "budgets", "timing_samples")}
        usual = TIMED if args.engine == "embedded" else 0
        samples = usual if args.timing_samples is None else args.timing_samples
        return cls(task=task, budgets=args.budgets or [], timing_samples=samples, **same)
