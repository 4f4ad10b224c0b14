"""The offline pass of stage 4: what every row's answer costs at every granularity, written to Parquet once.

How: `scores.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from llava.interrupts import run_program
from llava.train.flags import FlagParser, ScoreArguments

PROG = "python -m llava.train.score_granularities"
FIRST = ("--model_name_or_path", "--data_path", "--output_file", "--image_folder", "--batch_size", "--device", "--dtype")


def build_parser(prog: str = PROG) -> FlagParser:
    """The command line's flags."""
    return FlagParser((ScoreArguments,), prog, "Score every row at every granularity, for training the router alone.", FIRST)


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Run the command; one sentence per error, one line after Ctrl-C, and an exit status."""
    (args,) = build_parser(prog).parse_args_into_dataclasses(argv)

    def work() -> None:
        from llava.train.scores import run

        run(args)

    return run_program(work)


if __name__ == "__main__":
    sys.exit(main())
