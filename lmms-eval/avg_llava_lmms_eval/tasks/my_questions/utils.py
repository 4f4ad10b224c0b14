"""Your own questions for the harness: tasks differ in where the images are and how an answer is scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
from avg_llava_lmms_eval.local_tasks import doc_to_text, mean_over_families, open_image, process_results
from avg_llava_lmms_eval.own_questions import metrics_of, own_questions
from PIL import Image

__all__ = ["METRICS", "doc_to_text", "doc_to_visual", "process_results", "questions_of"]

FOLDER = Path(__file__).resolve().parent
QUESTIONS = FOLDER / "questions.jsonl"
METRICS = metrics_of(QUESTIONS, mean_over_families)
"""What the table shows: accuracy, the mean over families, and every family of the file."""


def questions_of(_: datasets.Dataset) -> datasets.Dataset:
    """The questions of the file, checked whole.

    Raises:
        SystemExit: the file's mistakes. After any other exception the harness retries and then reports only that it failed.
    """
    try:
        return datasets.Dataset.from_list(own_questions(QUESTIONS, FOLDER))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    """The document's images; paths are relative to this folder."""
    names = [doc["image"]] if isinstance(doc["image"], str) else doc["image"]
    return [open_image(FOLDER / name) for name in names]
