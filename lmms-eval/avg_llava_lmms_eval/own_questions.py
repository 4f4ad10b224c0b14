"""One's own file of questions as a task: read, checked and put into one form before anything is asked.

An object is a question in the format of `llava.eval.questions`, with the expected `answer` and, if scores are to be grouped, a `family`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llava.eval.questions import as_written, family_of, read_questions, scored_fields
from llava.json_rows import JsonRow, read_rows

OVERALL = ("accuracy", "family_mean")
"""Scores over all questions, whatever their families are called."""


def own_questions(file: Path, folder: Path) -> list[dict[str, Any]]:
    """The questions of a file in one form, whatever forms they have there.

    Args:
        file: JSON objects. folder: folder that image names are relative to.

    Returns:
        By question: `question_id`, `text`, `answer` and `family` as texts (numbers as they are written), `image` as a list of names, and
        the whole object as it is written, `line`, for fields of one's own.

    Raises:
        ValueError: everything that is wrong with the file, with line numbers.
    """
    return [{"text": row.text, "image": list(row.images), **row.extra} for row in read_questions(file, folder, _scored)]


def _scored(row: dict[str, Any], text: str) -> dict[str, Any]:
    fields = scored_fields(row, text)
    _check_family(fields["family"])
    return {"question_id": str(as_written(text).get("question_id")), **fields, "line": text}


def metrics_of(file: Path, mean_over_families: Callable[..., float]) -> list[dict[str, Any]]:
    """The harness's `metric_list` for a file: both overall scores, and one per family in it.

    What cannot be read adds nothing here; `own_questions` names it when the task is asked for.
    """
    families: list[str] = []
    for row in _readable(file):
        try:
            families.append(_check_family(family_of(as_written(row.text))))
        except ValueError:
            continue
    aggregations: Mapping[str, Any] = {"family_mean": mean_over_families}
    return [
        {"metric": name, "aggregation": aggregations.get(name, "mean"), "higher_is_better": True}
        for name in dict.fromkeys([*OVERALL, *families])
    ]


def _readable(file: Path) -> list[JsonRow]:
    try:
        return [row for row in read_rows(file, allow_nan=False) if isinstance(row.value, dict)]
    except (ValueError, OSError):
        return []


def _check_family(family: str) -> str:
    if family in OVERALL:
        raise ValueError(f"family is {family!r}, which is the name of a score over all questions; rename it")
    return family
