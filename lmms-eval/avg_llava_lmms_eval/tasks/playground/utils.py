"""The micro world's questions for the harness."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from avg_llava_lmms_eval.local_tasks import doc_to_text, mean_over_families, open_image, process_results
from PIL import Image

__all__ = ["doc_to_text", "doc_to_visual", "mean_over_families", "process_results"]

IMAGES = Path(__file__).resolve().parents[4] / "playground" / "eval"


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    """The document's image, from the repository's playground."""
    return [open_image(IMAGES / doc["image"])]
