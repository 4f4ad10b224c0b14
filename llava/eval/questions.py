"""The one file format of questions: JSON objects with `question_id`, `text` and, where there are images, `image`.

    {"question_id": 1, "image": "cat.png", "text": "What animal is it?"}
    {"question_id": 2, "image": ["a.png", "b.png"], "text": "Which of <image> and <image> is brighter?"}
    {"question_id": 3, "text": "How many legs has a spider?", "answer": 8, "family": "counting"}

Objects may come one per line, several per line, over several lines, or in a list (`llava.json_rows`). Other fields are up to the reader:
`model_vqa` copies them to the answer; the report and the harness's own tasks read the expected answer and the family (`scored_fields`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER
from llava.json_rows import JsonRow, iter_rows

INPUT_FIELDS = ("question_id", "image", "text")
PROBLEMS_SHOWN = 20
IMAGES_REMEMBERED = 10_000
"""Names of images that are known to be there or not, so that questions about one image look for it once."""
NO_FAMILY = "all"
"""The family of questions that name none."""

ExtraFields = Callable[[dict[str, Any], str], dict[str, Any]]
"""(a question's object, its text in the file) -> what a reader makes of the fields besides `INPUT_FIELDS`; raises ValueError."""


@dataclass(frozen=True)
class Row:
    """One question: its index in the file, from 0, and the contents of its object."""

    index: int
    question_id: Any
    text: str
    images: tuple[str, ...]
    extra: dict[str, Any]


def other_fields(row: dict[str, Any], text: str) -> dict[str, Any]:
    """All other fields of an object, unchanged."""
    return {name: row[name] for name in row if name not in INPUT_FIELDS}


def scored_fields(row: dict[str, Any], text: str) -> dict[str, Any]:
    """The expected `answer` and the `family` of a question as strings; numbers keep their spelling, so that 12.50 stays 12.50.

    Raises:
        ValueError: no answer, or one that is neither a string nor a number; a family that is not a name.
    """
    written = as_written(text)
    answer = written.get("answer")
    if answer is None:
        raise ValueError("answer is missing, expected the text or number to compare answers with")
    if not isinstance(answer, str):
        raise ValueError(f"answer is {answer!r}, expected one text or number")
    return {"answer": answer, "family": family_of(written)}


def as_written(text: str) -> dict[str, Any]:
    """A question's object with numbers as strings in their spelling, so that 12.50 stays 12.50."""
    return json.loads(text, parse_int=str, parse_float=str)


def family_of(row: dict[str, Any]) -> str:
    """The family that a question names, or `NO_FAMILY`.

    Raises:
        ValueError: something other than a name.
    """
    family = NO_FAMILY if row.get("family") is None else row["family"]
    if not isinstance(family, str) or not family:
        raise ValueError(f"family is {family!r}, expected a name, or no such field")
    return family


def read_questions(file: Path, folder: Path, extra_fields: ExtraFields = other_fields) -> list[Row]:
    """Read a question file whole; arguments and errors as in `checked_questions`."""
    return list(checked_questions(file, folder, extra_fields))


def checked_questions(file: Path, folder: Path, extra_fields: ExtraFields = other_fields) -> Iterator[Row]:
    """The questions of a file, one after the other; whoever goes through all of them knows that the file has no mistake.

    Args:
        file: JSON objects, see `llava.json_rows`; NaN and infinities are refused, because readers of the answers may not accept them.
        folder: the folder that image names are relative to.
        extra_fields: makes `Row.extra` of each object.

    Raises:
        ValueError: all mistakes, with line numbers, when the last question has been read.
    """
    if not file.is_file():
        raise ValueError(f"The question file {file} does not exist; give a file of JSON objects, one per question.")
    if not folder.is_dir():
        raise ValueError(f"The image folder {folder} does not exist; give the folder that the image names in {file} are relative to.")
    is_there = lru_cache(IMAGES_REMEMBERED)(lambda name: (folder / name).is_file())
    shown: list[str] = []
    num_rows = num_problems = 0
    for row, line, problems in _rows_of(file, extra_fields):
        names = row.images if row is not None else ()
        problems += [f"there is no image {folder / name}" for name in names if not is_there(name)]
        num_problems += len(problems)
        shown += [f"line {line}: {each}" for each in problems[: PROBLEMS_SHOWN - len(shown)]]
        if row is not None:
            num_rows += 1
            yield row
    if not num_rows and not num_problems:
        raise ValueError(f"{file} has mistakes:\n  it holds no question")
    if num_problems:
        more = [f"and {num_problems - PROBLEMS_SHOWN} more"] * (num_problems > PROBLEMS_SHOWN)
        raise ValueError(f"{file} has mistakes:\n  " + "\n  ".join(shown + more))


def questions_between(file: Path, span: range, extra_fields: ExtraFields = other_fields) -> Iterator[Row]:
    """Some consecutive questions of a file that `checked_questions` has been through, read as they are asked for.

    Args:
        span: their indices.

    Raises:
        ValueError: the file was changed since.
    """
    for row, line, problems in islice(_rows_of(file, extra_fields), span.start, span.stop):
        if row is None or problems:
            raise ValueError(f"{file} was changed while it was read; line {line}: {'; '.join(problems)}")
        yield row


def _rows_of(file: Path, extra_fields: ExtraFields) -> Iterator[tuple[Row | None, int, list[str]]]:
    """Each value of a file as a question or `None`, its line, and its mistakes."""
    with file.open("rb") as opened:
        for index, found in enumerate(iter_rows(opened, str(file), allow_nan=False)):
            row, problems = _read_row(index, found, extra_fields)
            yield row, found.line, problems


def _read_row(index: int, found: JsonRow, extra_fields: ExtraFields) -> tuple[Row | None, list[str]]:
    """The question of a JSON value, or `None`, and its mistakes."""
    row = found.value
    if found.problem:
        return None, [found.problem]
    if not isinstance(row, dict):
        return None, [f"it is of type {type(row).__name__}, expected an object with question_id and text"]
    problems = []
    images: tuple[str, ...] = ()
    extra: dict[str, Any] = {}
    try:
        images = _check_question(row)
    except ValueError as error:
        problems.append(str(error))
    try:
        extra = extra_fields(row, found.text)
    except ValueError as error:
        problems.append(str(error))
    return Row(index, row.get("question_id"), row.get("text", ""), images, extra), problems


def _check_question(row: dict[str, Any]) -> tuple[str, ...]:
    """The names of a question's images.

    Raises:
        ValueError: a field of `INPUT_FIELDS` is missing or wrong.
    """
    if row.get("question_id") is None:
        raise ValueError("question_id is missing")
    text = row.get("text")
    if not isinstance(text, str) or not text.replace(DEFAULT_IMAGE_TOKEN, "").replace(IMAGE_PLACEHOLDER, "").strip():
        raise ValueError(f"text is {text!r}, expected a question")
    found = row.get("image")
    names = [] if found is None else [found] if isinstance(found, str) else found
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"image is {found!r}, expected a file name, a list of them, or nothing")
    placeholders = text.count(DEFAULT_IMAGE_TOKEN) + text.count(IMAGE_PLACEHOLDER)
    if placeholders not in (0, len(names)):
        raise ValueError(f"text holds {placeholders} {DEFAULT_IMAGE_TOKEN}, but the row names {len(names)} image{'s' * (len(names) != 1)}")
    return tuple(names)
