"""Convert checkpoints between the native layout, LLaVA's and transformers' LLaVA-NeXT: `python -m llava.convert SOURCE OUTPUT --to LAYOUT`.

What a layout has no place for, and what becomes of it: `llava/tools/native_checkpoint.py` and `llava/tools/llava_next.py`.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llava.flags import Parser
from llava.interrupts import run_program

PROG = "python -m llava.convert"
FIRST = ("--to", "--conv-version", "--drop-router", "--with-code", "--report", "--license", "--base-model", "--max-shard-gb")
FOR_NATIVE: dict[str, Any] = {"with_code": False, "report": None, "license": None, "base_model": []}
"""Settings of a native folder besides its weights, with their defaults."""
LAYOUTS = {"avg_llava": "native", "llava_llama": "llava", "llava_mistral": "llava", "llava_next": "transformers"}
"""Model type in a config.json -> the layout that it is of."""
DESCRIPTION = """Convert a checkpoint to another layout: native (avg_llava, for transformers, PEFT and TRL), llava (this project's
programs and released checkpoints), transformers (LlavaNextForConditionalGeneration, one granularity and no router). A native folder gets a
model card, and may be written anew as a native one.

Needs: a local folder with config.json, safetensors, the tokenizer and the image processor's settings. Costs: the memory of one shard and
one copy of the checkpoint on the disk, two where LLaVA's layout lies between; no weight is computed anew."""


def build_parser(prog: str = PROG) -> Parser:
    """The command line's flags."""
    parser = Parser(prog, DESCRIPTION, FIRST)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="checkpoint folder to read")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder to write; must not exist")
    parser.add_argument("--to", required=True, choices=sorted(set(LAYOUTS.values())), help="which layout is written")
    parser.add_argument("--conv-version", metavar="NAME",
                        help="from transformers: conversation template of the model, such as v1 or mistral_instruct")  # fmt: skip
    parser.add_argument("--drop-router", action="store_true", help="to transformers: leave out router and coarser granularities")
    parser.add_argument("--with-code", action="store_true",
                        help="to native: also write the code that trust_remote_code=True needs where this package is missing")  # fmt: skip
    parser.add_argument("--report", type=Path, metavar="FILE", help="to native: report.json of a granularity report, for the model card")
    parser.add_argument("--license", metavar="NAME", help="to native: of the weights, for the model card, such as apache-2.0")
    parser.add_argument("--base-model", action="append", metavar="NAME",
                        help="to native: what the model was trained from, for the model card; may be repeated")  # fmt: skip
    parser.add_argument("--max-shard-gb", type=float, default=5.0, metavar="GB",
                        help="largest weight file, and about the memory needed")  # fmt: skip
    parser.set_defaults(**FOR_NATIVE)
    return parser


def layout_of(source: Path) -> str:
    """The layout of a checkpoint folder, by the model type in its config.json.

    Raises:
        ValueError: no checkpoint folder, a config.json that cannot be read, or one of another model type.
    """
    from llava.model.loading import read_stored_config

    if not source.is_dir():
        raise ValueError(f"{source} is not a folder; give a downloaded checkpoint (hf download NAME --local-dir FOLDER).")
    kind = read_stored_config(source).get("model_type")
    if kind not in LAYOUTS:
        raise ValueError(f"{source} is of model type {str(kind)[:100]!r}, expected {', '.join(LAYOUTS)}.")
    return LAYOUTS[kind]


def convert(args: argparse.Namespace) -> None:
    """Convert the folder that the flags name, through LLaVA's layout where neither end is that.

    Raises:
        ValueError: a folder that cannot be converted, or flags for another layout.
    """
    found = layout_of(args.source)
    if found == args.to != "native":
        raise ValueError(f"{args.source} has the {found} layout already; choose another with --to.")
    if not 1e-9 <= args.max_shard_gb < 1e9:
        raise ValueError(f"--max-shard-gb is {args.max_shard_gb}, expected the size of a weight file in GB, such as 5.")
    for_native = [name for name in FOR_NATIVE if getattr(args, name)]
    if for_native and args.to != "native":
        raise ValueError(f"--{for_native[0].replace('_', '-')} is for native folders; leave it out, or use --to native.")
    from llava.checkpoint_files import read_object
    from llava.model.native import AvgLlavaConfig
    from llava.tools.llava_next import check_for_transformers, check_new, to_llava, to_transformers
    from llava.tools.native_checkpoint import Extras, copy_native, from_native, read_as_llava, to_native

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    shard_bytes = int(args.max_shard_gb * 10**9)
    extras = Extras(args.with_code, None if args.report is None else read_object(args.report), args.license, args.base_model)
    reading: dict[str, Callable[[Path, Path], None]] = {
        "native": lambda source, output: from_native(source, output, shard_bytes),
        "transformers": lambda source, output: to_llava(source, output, args.conv_version, shard_bytes),
    }
    writing: dict[str, Callable[[Path, Path], None]] = {
        "native": lambda source, output: to_native(source, output, shard_bytes, extras),
        "transformers": lambda source, output: to_transformers(source, output, args.drop_router, shard_bytes),
    }
    if found == args.to:
        copy_native(args.source, args.output, shard_bytes, extras)
    elif args.to == "llava":
        reading[found](args.source, args.output)
    elif found == "llava":
        writing[args.to](args.source, args.output)
    else:
        check_new(args.output)  # here what the second step would refuse only after the first has copied the weights
        if found == "native":
            check_for_transformers(read_as_llava(args.source, AvgLlavaConfig.from_pretrained(args.source)), args.source, args.drop_router)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=args.output.parent) as folder:
            reading[found](args.source, Path(folder) / args.source.name)
            writing[args.to](Path(folder) / args.source.name, args.output)
    print(f"{args.source} converted to {args.output}")


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Run the command; 0, or 1 with one sentence on standard error."""
    args = build_parser(prog).parse_args(argv)
    return run_program(lambda: convert(args))


if __name__ == "__main__":
    sys.exit(main())
