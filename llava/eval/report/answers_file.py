"""answers.jsonl: what a report was made from, and what later reports take from it.

The first line says how the answers were made, so that no copy of the file loses it; then comes a line per question, those of the report
first and in its order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from llava.durable import write_whole
from llava.eval.journal import differences, json_lines
from llava.eval.report.answers import Record
from llava.eval.report.tasks import Item
from llava.json_rows import JsonRow, read_rows

Key = tuple[int | str, str, str, str, str]


def write_answers(path: Path, origin: Mapping[str, Any], records: Sequence[Record]) -> None:
    """Write the file whole.

    Raises:
        NoSpaceError: there is no room.
    """
    write_whole(path, json_lines([{"made with": origin}, *(asdict(record) for record in records)]))


def read_answers(path: Path) -> tuple[dict[str, Any], list[Record]]:
    """How the answers of a file were made, and the answers.

    Raises:
        ValueError: no such file, or something that is no answer of a report.
    """
    if not path.is_file():
        raise ValueError(f"There is no file {path}; give the answers.jsonl of an earlier report.")
    first, *rows = read_rows(path) or [JsonRow(1, "", {})]
    made_with = first.value.get("made with") if isinstance(first.value, dict) else None
    if not isinstance(made_with, dict):
        raise ValueError(f"{path} does not say what its answers were made with; give the answers.jsonl of an earlier report, unchanged.")
    return made_with, [_record(row, path) for row in rows]


def _record(row: JsonRow, path: Path) -> Record:
    names = {each.name for each in fields(Record)}
    if row.problem or not isinstance(row.value, dict) or set(row.value) != names:
        problem = row.problem or f"expected an object of {', '.join(sorted(names))}"
        raise ValueError(f"Line {row.line} of {path} is no answer of a report: {problem}. Make the report anew.")
    return Record(**row.value)


def key_of(question: Item | Record) -> Key:
    """What makes two questions the same."""
    return question.question_id, question.image, question.text, question.answer, question.family


def earlier_answers(
    path: Path, items: Sequence[Item], origin: Mapping[str, Any], ask_again: Callable[[Sequence[Item]], Sequence[Record]]
) -> tuple[list[Record], list[Item], list[Record]]:
    """Answers of an earlier report. The first of them is asked for again, in case images or code differ.

    Returns:
        Records of those `items` that the file has, the items that it lacks, and its records of other questions, say of a longer report.

    Raises:
        ValueError: no such file, or answers that were made in another way; the sentence names what differs.
    """
    before, records = read_answers(path)
    changed = differences({name: before.get(name) for name in origin}, dict(origin))
    if changed:
        raise ValueError(f"The answers in {path} were made in another way: {'; '.join(changed)}; ask for the same, or leave --answers out.")
    found = {key_of(record): record for record in records}
    known = [item for item in items if key_of(item) in found]
    kept = [found[key_of(item)] for item in known]
    again = ask_again(known[:1])
    if not again or again[0].said != kept[0].said or not _alike(again[0].logits, kept[0].logits):
        raise ValueError(f"The answers in {path} are of other questions, images or another model; leave --answers out.")
    asked = {key_of(item) for item in items}
    left = [item for item in items if key_of(item) not in found]
    return kept, left, [record for key, record in found.items() if key not in asked]


def _alike(first: Sequence[float] | None, second: Sequence[float] | None) -> bool:
    """Whether two routers said the same, apart from rounding."""
    if first is None or second is None:
        return first is second
    return bool(np.allclose(first, second, atol=1e-2))
