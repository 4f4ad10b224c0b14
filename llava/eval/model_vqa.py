"""Questions in, answers out: `python -m llava.eval.model_vqa`, with LLaVA's file formats and flags.

    python -m llava.eval.model_vqa --question-file rows.jsonl --image-folder images --answers-file answers.jsonl
    python -m llava.eval.model_vqa --question-file rows.jsonl --answers-file answers.jsonl --engine vllm --vllm http://localhost:8000

What a question is, and how the processes of a run share a file of them: `answer_file.py`.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from llava.flags import Parser, add_answer_flags, add_engine_flags, add_log_level, add_model_flags, add_routing_flags, start_logging
from llava.interrupts import run_program

logger = logging.getLogger("llava.eval.model_vqa")

PROG = "python -m llava.eval.model_vqa"
FIRST = (
    *("--model-path", "--question-file", "--image-folder", "--answers-file", "--granularity", "--max-visual-tokens"),
    *("--max-new-tokens", "--batch-size", "--engine", "--vllm"),
)


def build_parser(prog: str = PROG) -> Parser:
    """The command line's flags, under LLaVA's names."""
    parser = Parser(prog, "Answer a file of questions about images.", FIRST)
    questions = parser.add_argument_group("questions and answers")
    questions.add_argument("--question-file", type=Path, required=True, metavar="FILE",
                           help="JSON objects, one per question: question_id, image (name, list or missing), text")  # fmt: skip
    questions.add_argument("--image-folder", type=Path, metavar="FOLDER",
                           help="folder that image names are relative to (default: that of the question file)")  # fmt: skip
    questions.add_argument("--answers-file", type=Path, required=True, metavar="FILE",
                           help="file for the answers; an unfinished run keeps its parts in ANSWERS_FILE.parts")  # fmt: skip
    questions.add_argument("--num-chunks", type=int, default=1, metavar="N", help="split the questions into N chunks, one run each")
    questions.add_argument("--chunk-idx", type=int, default=0, metavar="I", help="the chunk to answer, from 0")
    questions.add_argument("--batch-size", type=int, metavar="N",
                           help="questions answered together (embedded: 1 by default) or asked at once (vllm: 256 by default); greedy "
                                "answers do not depend on it")  # fmt: skip
    model = parser.add_argument_group("model")
    add_model_flags(model)
    add_engine_flags(model)
    add_answer_flags(parser.add_argument_group("decoding"))
    add_routing_flags(parser.add_argument_group("visual tokens"))
    add_log_level(parser)
    return parser


def answer(args: argparse.Namespace) -> int:
    """Answer this process's share; 0, or 1 if the run is complete and a question failed.

    Raises:
        ValueError: input that cannot work, or an answers file of another run.
    """
    from llava.eval.answer_file import run

    start_logging(args, logger)
    return run(args)


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Run the command; 0, or 1 with a sentence on standard error, or 130 after Ctrl-C."""
    args = build_parser(prog).parse_args(argv)
    return run_program(lambda: answer(args))


if __name__ == "__main__":
    sys.exit(main())
