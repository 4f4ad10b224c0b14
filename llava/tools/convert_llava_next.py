"""Convert checkpoints between transformers' `LlavaNextForConditionalGeneration` and this project's LLaVA layout: flags and `main`.

What has no counterpart on the other side, and what becomes of it: `llava_next.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llava.flags import Parser
from llava.interrupts import run_program

PROG = "python scripts/convert_llava_next.py"
FIRST = ("--direction", "--source", "--output", "--conv-version", "--drop-router", "--max-shard-gb")
DESCRIPTION = """Convert checkpoints between transformers' LlavaNextForConditionalGeneration and this project's LLaVA layout.

Needs: a local folder with config.json, safetensors, the tokenizer and (to-llava) the image processor. Costs: the memory of one shard and
one copy of the checkpoint on the disk; no weight is computed anew, so logits stay the same at full granularity."""


def build_parser(prog: str = PROG) -> Parser:
    """The command line's flags."""
    parser = Parser(prog, DESCRIPTION, FIRST)
    parser.add_argument("--direction", required=True, choices=("to-llava", "to-transformers"), help="which layout is written")
    parser.add_argument("--source", required=True, type=Path, metavar="FOLDER", help="checkpoint folder to read")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="folder to write; must not exist")
    parser.add_argument("--conv-version", metavar="NAME",
                        help="to-llava: conversation template of the model, such as v1 or mistral_instruct")  # fmt: skip
    parser.add_argument("--drop-router", action="store_true", help="to-transformers: leave out router and coarser granularities")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, metavar="GB",
                        help="largest weight file, and about the memory needed")  # fmt: skip
    return parser


def convert(args: argparse.Namespace) -> None:
    """Convert the folder that the flags name, as `llava.convert` does.

    Raises:
        ValueError: a folder that cannot be converted.
    """
    from llava import convert as program

    program.convert(argparse.Namespace(**program.FOR_NATIVE, **vars(args), to=args.direction.removeprefix("to-")))


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Run the command; 0, or 1 with one sentence on standard error."""
    args = build_parser(prog).parse_args(argv)
    return run_program(lambda: convert(args))


if __name__ == "__main__":
    sys.exit(main())
