"""Read every row as training does, and report what is broken: `python -m llava.train.check`, also `python -m llava.train.dataset`.

How: `data_check.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from llava.interrupts import run_program
from llava.train.flags import CheckArguments, DataArguments, FlagParser

PROG = "python -m llava.train.check"
FIRST = (
    *("--check", "--model_name_or_path", "--data_path", "--image_folder", "--version", "--output", "--num_workers", "--show"),
    *("--on_bad_sample", "--max_bad_share"),
)


def build_parser(prog: str = PROG) -> FlagParser:
    """The command line's flags."""
    return FlagParser((CheckArguments, DataArguments), prog, "Read every row as training does, and say what is broken.", FIRST)


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Run the command: the report, and a status that says whether training can start."""
    check_args, data_args = build_parser(prog).parse_args_into_dataclasses(argv)

    def work() -> None:
        from llava.train.data_check import run

        run(check_args, data_args)

    return run_program(work)


if __name__ == "__main__":
    sys.exit(main())
