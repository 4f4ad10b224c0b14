"""Copy a finished checkpoint for shipping: weights, configuration and tokenizer, without traces of the machine it was trained on.

    python -m playground.ship FROM TO
"""

from __future__ import annotations

import sys
from pathlib import Path

from llava.model.builder import load_pretrained_model

DESCRIPTION = (
    "A small model for demonstration, trained on drawn scenes of 128 x 128 pixels. It names their shapes, colours, numbers, digits and "
    "arrows in a word, and knows nothing else."
)
LARGEST = 15_000_000
"""Bytes a shipped checkpoint may have."""


def ship(source: Path, target: Path) -> int:
    """Write the checkpoint anew and return its size in bytes.

    Raises:
        ValueError: a checkpoint larger than `LARGEST`.
    """
    tokenizer, model, _, _ = load_pretrained_model(str(source), device="cpu")
    model.config.mm_vision_tower = None  # its configuration and weights travel inside
    model.config._name_or_path = ""
    model.config.use_cache, model.config.description = True, DESCRIPTION
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    size = sum(file.stat().st_size for file in target.iterdir())
    if size > LARGEST:
        raise ValueError(f"{source} takes {size:,} bytes, expected at most {LARGEST:,}.")
    return size


if __name__ == "__main__":
    print(f"{ship(Path(sys.argv[1]), Path(sys.argv[2])):,} bytes")
