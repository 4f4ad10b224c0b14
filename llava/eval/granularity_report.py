"""What adaptivity buys on a set of questions: accuracy and cost of every policy for choosing a granularity, as a table, JSON and a page.

    python -m llava.eval.granularity_report --task playground --output report
    python -m llava.eval.granularity_report --model-path DIR --questions mine.jsonl --image-folder images --output report

How it is made: `report/run.py`.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llava.eval.report.tasks import TASKS
from llava.flags import Parser, add_engine_flags, add_log_level, start_logging
from llava.interrupts import run_program

logger = logging.getLogger("llava.eval.granularity_report")

PROG = "python -m llava.eval.granularity_report"
FIRST = (
    *("--model-path", "--task", "--questions", "--image-folder", "--output", "--limit", "--granularities", "--budgets", "--baseline"),
    "--batch-size",
)


def build_parser(prog: str = PROG) -> Parser:
    """The command line's flags."""
    parser = Parser(prog, str(__doc__).split("\n")[0], FIRST, usage="%(prog)s (--task TASK | --questions FILE) --output FOLDER [flags]")
    model = parser.add_argument_group("model")
    model.add_argument("--model-path", metavar="PATH", help="checkpoint folder or hub id; without it the micro model that ships with us")
    model.add_argument("--model-base", metavar="PATH", help="base model of a projector-only or adapter checkpoint")
    model.add_argument("--device", help="cuda, mps or cpu; without it the best there is")
    model.add_argument("--threads", type=_positive, metavar="N", help="CPU threads; without it PyTorch's choice")
    add_engine_flags(model, in_process=False)
    questions = parser.add_argument_group("questions")
    source = questions.add_mutually_exclusive_group(required=True)
    source.add_argument("--task", help=f"questions that need no download: {', '.join(TASKS)}")
    source.add_argument("--questions", type=Path, metavar="FILE",
                        help="JSON objects with question_id, image, text, answer and optionally family")  # fmt: skip
    questions.add_argument("--image-folder", type=Path, metavar="FOLDER",
                           help="folder that image names are relative to (default: that of --questions)")  # fmt: skip
    questions.add_argument("--limit", type=_positive, metavar="N", help="take the first N questions only")
    questions.add_argument("--batch-size", type=_positive, default=80, metavar="N", help="questions answered together")
    questions.add_argument("--max-new-tokens", type=_positive, default=16, metavar="N", help="longest answer, in tokens")
    policies = parser.add_argument_group("policies")
    policies.add_argument("--granularities", type=_numbers(_positive), metavar="N,M",
                          help="compare only these tokens per view, as in 36,144,576 (default: all of the model's)")  # fmt: skip
    policies.add_argument("--biases", type=_numbers(_finite), metavar="B,B",
                          help="add a row of the router with each of these biases, as in --biases=-0.5,0.5")  # fmt: skip
    policies.add_argument("--budgets", type=_numbers(_positive), metavar="N,M",
                          help="add a row of the router within each of these visual-token budgets, as in 48,96")  # fmt: skip
    report = parser.add_argument_group("report")
    report.add_argument("--output", type=Path, required=True, metavar="FOLDER",
                        help="for report.json, .md, .html and .csv, and answers.jsonl; a stopped run resumes")  # fmt: skip
    report.add_argument("--overwrite", action="store_true", help="replace the report or the other run that the folder of --output holds")
    report.add_argument("--answers", type=Path, metavar="FILE", help="answers.jsonl of an earlier report on this model with the same "
                        "granularities and --max-new-tokens: reuse its answers")  # fmt: skip
    report.add_argument("--baseline", type=Path, metavar="FOLDER",
                        help="an earlier report on these questions: paired differences to it, with intervals")  # fmt: skip
    report.add_argument("--timing-samples", type=_count, metavar="N",
                        help="questions to measure times on, 40 by default; 0: none, as with --engine vllm always")  # fmt: skip
    report.add_argument("--timing-repeats", type=_positive, default=3, metavar="N",
                        help="requests per timed question and row; the one of median time counts")  # fmt: skip
    report.add_argument("--examples", type=_count, default=12, metavar="N", help="example images on the page")
    report.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the timing sample and of the intervals")
    add_log_level(parser)
    return parser


def _numbers(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [kind(part.strip()) for part in text.split(",")]


def _finite(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return number


def _count(text: str, least: int = 0) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least} or more")
    return int(text)


def _positive(text: str) -> int:
    return _count(text, least=1)


def make(args: argparse.Namespace) -> int:
    """Make the report; 0, or 1 with one sentence on standard error where something crashed.

    Raises:
        ValueError: flags, questions or a model that cannot work. OSError: files that cannot be read or written.
    """
    import torch

    from llava.eval.report.run import run
    from llava.eval.report.settings import Settings

    start_logging(args, logger)
    if args.threads:
        torch.set_num_threads(args.threads)
    failure = run(Settings.of(args))
    if failure is not None:
        print(f"error: {failure}", file=sys.stderr)
    return 0 if failure is None else 1


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Run the command; 0, or 1 with one sentence on standard error where something failed or crashed, or 130 after Ctrl-C."""
    args = build_parser(prog).parse_args(argv)
    return run_program(lambda: make(args))


if __name__ == "__main__":
    sys.exit(main())
