"""answers.jsonl: the answers that a report is computed from, which a later report may reuse.

The first line holds what the answers depend on; then comes a line per question, those of the report first and in its order.
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
    """Write the file, whole or not at all.

    Raises:
        NoSpaceError: there is no room.
    """
    write_whole(path, json_lines([{"made with": origin}, *(asdict(record) for record in records)]))


def read_answers(path: Path) -> tuple[dict[str, Any], list[Record]]:
    """What the answers of a file depend on, and the answers.

    Raises:
        ValueError: no such file, or a line that is not an answer of a report.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the answers.jsonl of an earlier report.")
    first, *rows = read_rows(path) or [JsonRow(1, "", {})]
    made_with = first.value.get("made with") if isinstance(first.value, dict) else None
    if not isinstance(made_with, dict):
        raise ValueError(f"The first line of {path} does not hold 'made with'; give the answers.jsonl of an earlier report, unchanged.")
    return made_with, [_record(row, path) for row in rows]


def _record(row: JsonRow, path: Path) -> Record:
    names = {each.name for each in fields(Record)}
    if row.problem or not isinstance(row.value, dict) or set(row.value) != names:
        problem = row.problem or f"expected an object of {', '.join(sorted(names))}"
        raise ValueError(f"Line {row.line} of {path} is not an answer of a report: {problem}. Make that report again.")
    return Record(**row.value)


def key_of(question: Item | Record) -> Key:
    """What makes two questions the same."""
    return question.question_id, question.image, question.text, question.answer, question.family


def earlier_answers(
    path: Path,
    items: Sequence[Item],
    origin: Mapping[str, Any],
    labels: Mapping[str, str],
    ask_again: Callable[[Sequence[Item]], Sequence[Record]],
) -> tuple[list[Record], list[Item], list[Record]]:
    """Reuse the answers of an earlier report. The first of them is generated again, to notice that images or code have changed.

    Args:
        origin: what the answers of this report depend on. labels: what error messages call its fields.

    Returns:
        Records of those `items` that the file has, the items that it lacks, and its records of other questions (of a longer report).

    Raises:
        ValueError: no such file, or answers made with another model or other flags; the message names what differs.
    """
    before, records = read_answers(path)
    changed = differences({name: before.get(name) for name in origin}, dict(origin), labels)
    if changed:
        raise ValueError(
            f"The answers in {path} do not fit this report: {'; '.join(changed)}; use the same model and flags, or leave out --answers."
        )
    found = {key_of(record): record for record in records}
    known = [item for item in items if key_of(item) in found]
    kept = [found[key_of(item)] for item in known]
    again = ask_again(known[:1])
    if not again or again[0].said != kept[0].said or not _alike(again[0].logits, kept[0].logits):
        raise ValueError(f"The answers in {path} are to other questions or images, or of another model; leave out --answers.")
    asked = {key_of(item) for item in items}
    left = [item for item in items if key_of(item) not in found]
    return kept, left, [record for key, record in found.items() if key not in asked]


def _alike(first: Sequence[float] | None, second: Sequence[float] | None) -> bool:
    """Whether the logits of two routers agree, apart from rounding."""
    if first is None or second is None:
        return first is second
    return bool(np.allclose(first, second, atol=1e-2))
