"""easy-VQA's questions for the harness, read from its package."""

from __future__ import annotations

from typing import Any

import datasets
import easy_vqa
from avg_llava_lmms_eval.local_tasks import doc_to_text, mean_over_families, open_image, process_results
from PIL import Image

from llava.eval.report.tasks import easy_vqa_family

__all__ = ["doc_to_text", "doc_to_visual", "mean_over_families", "process_results", "questions_of"]

READERS = {
    "train": (easy_vqa.get_train_questions, easy_vqa.get_train_image_paths),
    "test": (easy_vqa.get_test_questions, easy_vqa.get_test_image_paths),
}


def questions_of(split: datasets.Dataset) -> datasets.Dataset:
    """The package's questions in its own order.

    Args:
        split: one row that names the package's split.
    """
    read_questions, read_paths = READERS[split[0]["split"]]
    paths = read_paths()
    texts, answers, owners = read_questions()
    rows = [
        {"question_id": index, "image": str(paths[owner]), "text": text, "answer": answer, "family": easy_vqa_family(answer)}
        for index, (text, answer, owner) in enumerate(zip(texts, answers, owners, strict=True))
    ]
    return datasets.Dataset.from_list(rows)


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    """The document's image, from the package."""
    return [open_image(doc["image"])]
