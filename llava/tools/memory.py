"""What a model takes of memory to answer, at every granularity: `python -m llava.tools.memory MODEL`. Computed from its configuration."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from llava.flags import Parser
from llava.interrupts import run_program
from llava.train.presets import PRESETS

PROG = "python -m llava.tools.memory"
DESCRIPTION = """Memory of weights and KV cache for one image at every granularity, computed from the configuration.

Needs: a checkpoint folder, of which config.json alone is read, or the name of a published shape. Working memory of a forward pass, the
text of a prompt and what a framework keeps for itself are not in it."""


def build_parser(prog: str = PROG) -> Parser:
    """The command line's flags."""
    parser = Parser(prog, DESCRIPTION)
    parser.add_argument("model", metavar="MODEL", help=f"checkpoint folder, or one of {', '.join(PRESETS)}")
    parser.add_argument("--image-size", metavar="WxH", help="width and height in pixels (default: of the largest canvas)")
    return parser


def show(args: argparse.Namespace) -> None:
    """Print the table of the model that the flags name.

    Raises:
        ValueError: no model of ours, or a size that is none.
    """
    from llava.tools.memory_table import read_config, table
    from llava.train.estimation import parse_size

    print(table(read_config(args.model), None if args.image_size is None else parse_size(args.image_size)))


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Run the command; 0, or 1 with one sentence on standard error."""
    args = build_parser(prog).parse_args(argv)
    return run_program(lambda: show(args))


if __name__ == "__main__":
    sys.exit(main())
