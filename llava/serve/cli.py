"""Chat with a model in the terminal: `python -m llava.serve.cli --model-path PATH --image-file image.png`.

The model runs in this process. Ctrl-C stops an answer; `/help` lists the commands. Questions may also come through a pipe, one a line.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from llava.flags import Parser, add_answer_flags, add_log_level, add_model_flags, add_routing_flags, start_logging
from llava.interrupts import run_program

logger = logging.getLogger("llava.serve.cli")

PROG = "python -m llava.serve.cli"
FIRST = (
    *("--model-path", "--model-base", "--image-file", "--granularity", "--max-visual-tokens", "--max-new-tokens", "--temperature"),
    *("--device", "--load-4bit", "--log-level"),
)


def build_parser(prog: str = PROG) -> Parser:
    """LLaVA's flags, and the routing's; no beams, which cannot be streamed, and no bias, which no command of the chat changes."""
    parser = Parser(prog, "Chat with a model in the terminal.", FIRST)
    parser.add_argument("--image-file", nargs="+", default=[], metavar="IMAGE", help="files or URLs for the first question")
    add_model_flags(parser.add_argument_group("model"))
    add_answer_flags(parser.add_argument_group("decoding"), with_beams=False)
    add_routing_flags(parser.add_argument_group("visual tokens"), with_bias=False)
    add_log_level(parser, default="warning")
    parser.add_argument("--debug", dest="log_level", action="store_const", const="debug", help=argparse.SUPPRESS)
    return parser


def chat(args: argparse.Namespace) -> int:
    """Chat until the input ends or the user leaves; 0, or 1 where questions came through a pipe and one of them failed.

    Raises:
        ValueError: flags, a checkpoint or an image that cannot work. OSError: files that cannot be read.
    """
    from llava.serve.terminal import run_chat

    start_logging(args, logger)
    return run_chat(args)


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Run the command; 0, or 1 with one sentence on standard error."""
    args = build_parser(prog).parse_args(argv)
    return run_program(lambda: chat(args), nothing_kept="nothing was asked")


if __name__ == "__main__":
    sys.exit(main())
