"""easy-VQA's questions for the harness, read from its package."""

from __future__ import annotations

from typing import Any

import datasets
import easy_vqa
from avg_llava_lmms_eval.local_tasks import doc_to_text, mean_over_families, open_picture, process_results
from PIL import Image

__all__ = ["doc_to_text", "doc_to_visual", "mean_over_families", "process_results", "questions_of"]

SHAPES = ("circle", "rectangle", "triangle")
READERS = {
    "train": (easy_vqa.get_train_questions, easy_vqa.get_train_image_paths),
    "test": (easy_vqa.get_test_questions, easy_vqa.get_test_image_paths),
}


def family_of(answer: str) -> str:
    """What a question asks for, told from its answer: the package has 3 shapes, 8 colours, yes and no."""
    if answer in ("yes", "no"):
        return "yes_no"
    return "shape" if answer in SHAPES else "colour"


def questions_of(split: datasets.Dataset) -> datasets.Dataset:
    """The package's questions in its own order.

    Args:
        split: one row that names the package's split.
    """
    read_questions, read_paths = READERS[split[0]["split"]]
    paths = read_paths()
    texts, answers, owners = read_questions()
    rows = [
        {"question_id": index, "image": str(paths[owner]), "text": text, "answer": answer, "family": family_of(answer)}
        for index, (text, answer, owner) in enumerate(zip(texts, answers, owners, strict=True))
    ]
    return datasets.Dataset.from_list(rows)


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    """The document's one picture, from the package."""
    return [open_picture(doc["image"])]
