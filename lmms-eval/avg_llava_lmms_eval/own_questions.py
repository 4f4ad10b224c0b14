"""One's own file of questions as a task: read, checked and put into one form before anything is asked.

A line is a question as `llava.eval.model_vqa` takes it, with the expected `answer` and, if scores are to be grouped, a `family`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.eval.model_vqa import read_questions
from llava.eval.report.tasks import NO_FAMILY

OVERALL = ("accuracy", "family_mean")
"""Scores over all questions, whatever their families are called."""
PROBLEMS_SHOWN = 20


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
    problems: list[str] = []
    try:
        names = [list(row.images) for row in read_questions(file, folder)]
    except ValueError as error:
        names, problems = [], [str(error).replace("nothing was loaded", "nothing was asked")]  # the harness loads models first
    rows: list[dict[str, Any]] = []
    wrong: list[str] = []
    for number, line in _lines(file):
        row = _object(line)
        if row is None:
            continue  # named among the problems above
        try:
            answer, family = _answer(row), _family(row)
        except ValueError as error:
            wrong.append(f"line {number}: {error}")
            continue
        rows.append({"question_id": str(row.get("question_id")), "text": row.get("text"), "answer": answer, "family": family, "line": line})
    if wrong:
        shown = wrong[:PROBLEMS_SHOWN] + [f"and {len(wrong) - PROBLEMS_SHOWN} more"] * (len(wrong) > PROBLEMS_SHOWN)
        problems.append(f"{file} cannot be scored as it is:\n  " + "\n  ".join(shown))
    if problems:
        raise ValueError("\n".join(problems))
    return [row | {"image": images} for row, images in zip(rows, names, strict=True)]


def metrics_of(file: Path, mean_over_families: Callable[..., float]) -> list[dict[str, Any]]:
    """The harness's `metric_list` for a file: both overall scores, and one per family that stands in it.

    Lines that cannot be read add nothing here; `own_questions` names them when the task is asked for.
    """
    families: list[str] = []
    for _, line in _lines(file):
        row = _object(line) or {}
        try:
            families.append(_family(row))
        except ValueError:
            continue
    aggregations: Mapping[str, Any] = {"family_mean": mean_over_families}
    return [
        {"metric": name, "aggregation": aggregations.get(name, "mean"), "higher_is_better": True}
        for name in dict.fromkeys([*OVERALL, *families])
    ]


def _lines(file: Path) -> Sequence[tuple[int, str]]:
    """Numbered lines that hold something; none where there is no file. Bytes that are no text are `read_questions`' to refuse."""
    if not file.is_file():
        return []
    with file.open(encoding="utf-8", errors="replace") as lines:
        return [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]


def _object(line: str) -> dict[str, Any] | None:
    """A line's object with numbers as they are written, so that 12.50 stays 12.50; `None` where it is none."""
    try:
        row = json.loads(line, parse_int=str, parse_float=str)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _answer(row: Mapping[str, Any]) -> str:
    if row.get("answer") is None:
        raise ValueError("answer is missing, expected the text or number that an answer is compared with")
    if not isinstance(row["answer"], str):
        raise ValueError(f"answer is {row['answer']!r}, expected one text or number")
    return row["answer"]


def _family(row: Mapping[str, Any]) -> str:
    family = NO_FAMILY if row.get("family") is None else row["family"]
    if not isinstance(family, str) or not family:
        raise ValueError(f"family is {family!r}, expected the name of a group, or nothing")
    if family in OVERALL:
        raise ValueError(f"family is {family!r}, which is the name of a score over all questions; rename it")
    return family
