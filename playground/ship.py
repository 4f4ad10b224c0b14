"""Copy a finished checkpoint for shipping, in the native layout, without traces of the machine it was trained on.

python -m playground.ship FROM TO
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from llava.model.builder import load_pretrained_model
from llava.tools.native_checkpoint import to_native

DESCRIPTION = (
    "A small model for demonstration, trained on drawn scenes of 128 x 128 pixels. It names their shapes, colours, numbers, digits and "
    "arrows in a word, and knows nothing else."
)
LARGEST = 15_000_000
"""Bytes a shipped checkpoint may have."""


def ship(source: Path, target: Path) -> int:
    """Write a checkpoint of LLaVA's layout, as the stages make it, anew as a native one, and return its size in bytes.

    Args:
        target: is replaced.

    Raises:
        ValueError: a checkpoint larger than `LARGEST`, or that the native layout cannot hold.
    """
    tokenizer, model, _, _ = load_pretrained_model(str(source), device="cpu")
    model.config.mm_vision_tower = None  # its configuration and weights travel inside
    model.config._name_or_path = ""
    model.config.use_cache, model.config.description = True, DESCRIPTION
    with tempfile.TemporaryDirectory() as scratch:
        cleaned, made = Path(scratch) / "cleaned", Path(scratch) / target.name
        model.save_pretrained(cleaned)
        tokenizer.save_pretrained(cleaned)
        to_native(cleaned, made)
        size = sum(file.stat().st_size for file in made.iterdir())
        if size > LARGEST:
            raise ValueError(f"{source} takes {size:,} bytes, expected at most {LARGEST:,}.")
        if target.exists():
            shutil.rmtree(target)
        shutil.copytree(made, target)
    return size


if __name__ == "__main__":
    print(f"{ship(Path(sys.argv[1]), Path(sys.argv[2])):,} bytes")
