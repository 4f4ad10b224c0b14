"""What a run will need: parameters, operations and GPU memory, for a configuration and a machine, before anything is loaded.

How: `estimation.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from llava.interrupts import run_program
from llava.train.flags import EstimateArguments, FlagParser

PROG = "python -m llava.train.estimate"
FIRST = (
    *("--model_name_or_path", "--preset", "--stage", "--num_gpus", "--gpu_memory_gb", "--per_device_train_batch_size", "--dtype"),
    *("--gradient_checkpointing", "--zero", "--lora_r"),
)


def build_parser(prog: str = PROG) -> FlagParser:
    """The command line's flags."""
    return FlagParser((EstimateArguments,), prog, "Parameters, operations and memory of a run, without its weights.", FIRST)


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Run the command: tables on standard output, one sentence per error, and an exit status."""
    (args,) = build_parser(prog).parse_args_into_dataclasses(argv)

    def work() -> None:
        from llava.train.estimation import run

        run(args)

    return run_program(work)


if __name__ == "__main__":
    sys.exit(main())
