"""Merge an adapter folder (LoRA or QLoRA) into the model underneath and write a full checkpoint: flags and `main`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from llava.flags import Parser
from llava.interrupts import run_program

PROG = "python scripts/merge_lora_weights.py"
DESCRIPTION = """Merge an adapter folder (LoRA or QLoRA) into the model underneath and write a full checkpoint.

Needs: the adapter folder and the model it was trained over, which the adapter names itself where --model-base is left out. Costs: the
memory of the model in its own dtype on the CPU, and its size on the disk. Each sum is computed in float32 and rounded once, so the merged
model's logits are the adapter's up to the rounding of that dtype. An adapter of QLoRA is merged into the whole weights, which differ from
the quantised ones it was trained over."""


def build_parser(prog: str = PROG) -> Parser:
    """The command line's flags."""
    parser = Parser(prog, DESCRIPTION, ("--model-path", "--model-base", "--save-model-path"))
    parser.add_argument("--model-path", required=True, metavar="PATH", help="adapter folder")
    parser.add_argument("--model-base", metavar="PATH", help="the model underneath; without it the one that the adapter names")
    parser.add_argument("--save-model-path", required=True, type=Path, metavar="FOLDER", help="folder to write; must not exist")
    return parser


def merge(args: argparse.Namespace) -> None:
    """Merge what the flags name.

    Raises:
        ValueError: no adapter, a folder that exists already, or parts that do not fit together. OSError: files that cannot be read.
    """
    from llava.tools.adapter_merge import merge_lora

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    merge_lora(args.model_path, args.model_base, args.save_model_path)
    print(f"{args.model_path} merged into {args.save_model_path}")


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Run the command; 0, or 1 with one sentence on standard error."""
    args = build_parser(prog).parse_args(argv)
    return run_program(lambda: merge(args))


if __name__ == "__main__":
    sys.exit(main())
