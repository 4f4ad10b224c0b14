"""Train one stage: flags and `main`; `run.py` has the run itself.

    python -m llava.train.train --stage multi_granularity --model_name_or_path DIR --data_path rows.json \
        --image_folder images --output_dir out ...

`llava/train/train_mem.py` is the same program under LLaVA's name.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from llava.interrupts import run_program
from llava.train.flags import DataArguments, FlagParser, LoraFlags, ModelArguments, RouterFlags, StageFlags

PROG = "python -m llava.train.train"
FIRST = (
    *("--model_name_or_path", "--data_path", "--image_folder", "--stage", "--vision_tower", "--vis_token_granularity", "--learning_rate"),
    *("--model_max_length", "--lora_enable", "--help_all"),
)
EPILOG = """\
All flags of transformers.TrainingArguments are accepted too. Used most: --output_dir, --num_train_epochs, --per_device_train_batch_size,
--gradient_accumulation_steps, --bf16, --gradient_checkpointing, --deepspeed, --save_steps, --logging_steps, --resume_from_checkpoint."""


LLAVA_NAMES = {
    **dict.fromkeys(("DataCollatorForSupervisedDataset", "LazySupervisedDataset", "make_supervised_data_module"), "supervised"),
    **dict.fromkeys(("preprocess", "preprocess_llama_2", "preprocess_mpt", "preprocess_multimodal"), "supervised"),
    **dict.fromkeys(("preprocess_plain", "preprocess_v1", "find_all_linear_names"), "supervised"),
    **dict.fromkeys(("safe_save_model_for_hf_trainer", "smart_tokenizer_and_embedding_resize"), "supervised"),
    **{"LLaVATrainer": "llava_trainer", "TrainingArguments": "arguments", "train": "run"},
}
"""What LLaVA's module of this name has, and the module of `llava.train` that has it here."""
__all__ = ["DataArguments", "ModelArguments", "build_parser", "main", *LLAVA_NAMES]


def __getattr__(name: str) -> Any:
    """Import LLaVA's names on first use, so that `--help` loads no torch."""
    if name in LLAVA_NAMES:
        return getattr(importlib.import_module(f"llava.train.{LLAVA_NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _HelpAll(argparse.Action):
    """Shows transformers' flags too, which takes the seconds that torch needs."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from llava.train.arguments import whole_parser

        whole_parser(parser.prog).print_help()
        parser.exit()


def build_parser(prog: str = PROG) -> FlagParser:
    """Our own flags, for `--help`; `arguments.parse_arguments` reads them together with transformers'."""
    fields = (ModelArguments, DataArguments, StageFlags, RouterFlags, LoraFlags)
    parser = FlagParser(fields, prog, "Train one stage.", FIRST, epilog=EPILOG)
    parser.add_argument("--help_all", action=_HelpAll, help="show the flags of transformers.TrainingArguments too")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Run the command: one sentence per error, one line after Ctrl-C, and an exit status."""
    build_parser(prog).parse_known_args(argv)  # answers --help and names what is missing, before torch is imported

    def work() -> None:
        from llava.train.run import run

        run(argv)

    return run_program(work)


if __name__ == "__main__":
    sys.exit(main())
