"""One's own file of questions as a task: read, checked and put into one form before anything is asked.

A line is a question in the format of `llava.eval.questions`, with the expected `answer` and, if scores are to be grouped, a `family`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llava.eval.questions import family_of, read_questions, scored_fields

OVERALL = ("accuracy", "family_mean")
"""Scores over all questions, whatever their families are called."""


def own_questions(file: Path, folder: Path) -> list[dict[str, Any]]:
    """The questions of a file in one form, whatever forms its lines have.

    Args:
        file: one JSON object per line. folder: what relative names of pictures start in.

    Returns:
        By question: `question_id`, `text`, `answer` and `family` as texts (numbers as they are written), `image` as a list of names, and
        the whole `line` as JSON, for fields of one's own.

    Raises:
        ValueError: everything that is wrong with the file, with line numbers.
    """
    return [{"text": row.text, "image": list(row.images), **row.extra} for row in read_questions(file, folder, _scored_line)]


def _scored_line(row: dict[str, Any], line: str) -> dict[str, Any]:
    fields = scored_fields(row, line)
    _check_family(fields["family"])
    return {"question_id": str(_written(line).get("question_id")), **fields, "line": line}


def metrics_of(file: Path, mean_over_families: Callable[..., float]) -> list[dict[str, Any]]:
    """The harness's `metric_list` for a file: both overall scores, and one per family that stands in it.

    Lines that cannot be read add nothing here; `own_questions` names them when the task is asked for.
    """
    families: list[str] = []
    for line in file.read_bytes().split(b"\n") if file.is_file() else ():
        try:
            families.append(_check_family(family_of(_written(line))))
        except ValueError:
            continue
    aggregations: Mapping[str, Any] = {"family_mean": mean_over_families}
    return [
        {"metric": name, "aggregation": aggregations.get(name, "mean"), "higher_is_better": True}
        for name in dict.fromkeys([*OVERALL, *families])
    ]


def _written(line: str | bytes) -> dict[str, Any]:
    """A line's object, with numbers as they are written, so that 12.50 stays 12.50."""
    row = json.loads(line, parse_int=str, parse_float=str)
    if not isinstance(row, dict):
        raise ValueError(f"it is a {type(row).__name__}, expected an object")
    return row


def _check_family(family: str) -> str:
    if family in OVERALL:
        raise ValueError(f"family is {family!r}, which is the name of a score over all questions; rename it")
    return family
