"""What tasks over files of questions share: opening images, writing the question, scoring, averaging.

A document has ``image`` (a path), ``text``, ``answer`` and ``family``. A task's own `utils.py` says where its images are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from llava.eval.report.answers import is_right
from llava.images import load_image


@lru_cache(maxsize=64)
def open_image(path: str | Path) -> Image.Image:
    """An RGB image. Questions about one image get the same object, which a batch then encodes once."""
    return load_image(path)


def doc_to_text(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, str] | None = None) -> str:
    """The question between the task's `pre_prompt` and `post_prompt`."""
    ends = lmms_eval_specific_kwargs or {}
    return ends.get("pre_prompt", "") + doc["text"] + ends.get("post_prompt", "")


def process_results(doc: Mapping[str, Any], results: list[str]) -> dict[str, Any]:
    """The score, once for all questions, once under its family's name, and once for the mean over families."""
    score = float(is_right(results[0], doc["answer"]))
    return {"accuracy": score, doc["family"]: score, "family_mean": {"family": doc["family"], "right": score}}


def mean_over_families(items: Iterable[Mapping[str, Any]]) -> float:
    """Accuracy where every family counts the same, however many questions it has.

    Args:
        items: each with its `family`, and 0 or 1 as `right`. Of items with a `score` the harness takes that alone for its standard error,
            which would not be this mean's.
    """
    families: dict[str, list[float]] = defaultdict(list)
    for item in items:
        families[item["family"]].append(item["right"])
    return sum(sum(scores) / len(scores) for scores in families.values()) / len(families)
