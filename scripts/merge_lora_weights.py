"""Merge an adapter folder (LoRA or QLoRA) into the model underneath and write a full checkpoint.

    python scripts/merge_lora_weights.py --model-path avg-lora --model-base vicuna-7b --save-model-path avg-merged

Needs: the adapter folder and the model it was trained over, which the adapter names itself where --model-base is left out. Costs:
the memory of the model in its own dtype on the CPU, and its size on the disk. Each sum is made in float32 and rounded once, so the
merged model's logits are the adapter's up to the rounding of that dtype. An adapter of QLoRA is merged into the whole weights, which
differ from the quantised ones it was trained over.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from llava.durable import whole_folder
from llava.model.adapter import is_adapter
from llava.model.builder import load_pretrained_model


def merge_lora(model_path: str, model_base: str | None, save_model_path: Path) -> None:
    """Write the merged model, its tokenizer and its config, all or nothing.

    Args:
        model_path: adapter folder. model_base: the model underneath; `None`: the one that the adapter names.
        save_model_path: folder to write; must not exist.

    Raises:
        ValueError: no adapter, a folder that exists already, or parts that do not fit together.
    """
    if not is_adapter(model_path):
        raise ValueError(f"--model-path {model_path} holds no adapter_config.json; give an adapter folder.")
    if save_model_path.exists():
        raise ValueError(f"--save-model-path {save_model_path} exists already; give a new folder.")
    tokenizer, model, _, _ = load_pretrained_model(model_path, model_base, None, device="cpu")
    with whole_folder(save_model_path) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; a refusal is one sentence on standard error and exit status 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True, help="adapter folder")
    parser.add_argument("--model-base", help="the model underneath; by default the one that the adapter names")
    parser.add_argument("--save-model-path", required=True, type=Path, help="folder to write; must not exist")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        merge_lora(options.model_path, options.model_base, options.save_model_path)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{options.model_path} merged into {options.save_model_path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
