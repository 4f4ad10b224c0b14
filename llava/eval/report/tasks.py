"""Where the questions of a report come from: a local task by name, or a JSONL file of one's own."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.inference import MICRO_MODEL

NO_FAMILY = "all"
"""The family of questions whose file names none."""
FIELDS = ("question_id", "image", "text", "answer")


@dataclass(frozen=True)
class Item:
    """One question about one picture. `image` is relative to its task's folder; `family` groups questions of one kind."""

    question_id: int | str
    image: str
    text: str
    answer: str
    family: str = NO_FAMILY


@dataclass(frozen=True)
class Task:
    """Questions, and the folder that their pictures are in."""

    name: str
    folder: Path
    items: list[Item]

    @property
    def families(self) -> list[str]:
        """The families in the order they first appear."""
        return list(dict.fromkeys(item.family for item in self.items))


def read_questions(path: Path, folder: Path | None = None, name: str | None = None) -> Task:
    """The questions of a JSONL file: `question_id`, `image`, `text`, `answer`, and optionally `family`.

    Args:
        folder: what picture names are relative to; the file's own folder by default.

    Raises:
        ValueError: no such file or folder, an empty file, or a line that is not such a question; the line is named.
    """
    if not path.is_file():
        raise ValueError(f"There is no question file {path}; give a JSONL file with {', '.join(FIELDS)} on every line.")
    folder = folder or path.parent
    if not folder.is_dir():
        raise ValueError(f"There is no image folder {folder}; give the folder that the picture names in {path} are relative to.")
    lines = path.read_text(encoding="utf-8").splitlines()
    items = [_item(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not items:
        raise ValueError(f"{path} holds no question; give a JSONL file with {', '.join(FIELDS)} on every line.")
    return Task(name or path.stem, folder, items)


def _item(line: str, place: str) -> Item:
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON ({error.msg}); write one object per line.") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place} is a JSON {type(row).__name__}, expected an object with {', '.join(FIELDS)}.")
    missing = [name for name in FIELDS if name not in row]
    if missing:
        raise ValueError(f"{place} has no {' and no '.join(missing)}; a report needs {', '.join(FIELDS)} of every question.")
    wrong = [name for name in ("image", "text", "answer") if not isinstance(row[name], str)]
    if wrong:
        raise ValueError(f"{place} has a {wrong[0]} of type {type(row[wrong[0]]).__name__}, expected a text.")
    return Item(row["question_id"], row["image"], row["text"], row["answer"], str(row.get("family", NO_FAMILY)))


def _playground() -> Task:
    path = MICRO_MODEL.parent / "eval" / "test.jsonl"
    if not path.is_file():
        raise ValueError(f"The task playground reads {path}, which ships with the repository and is not here; give --questions instead.")
    return read_questions(path, name="playground")


def _easy_vqa() -> Task:
    try:
        easy_vqa = importlib.import_module("easy_vqa")
    except ImportError as error:
        raise ValueError('The task easy_vqa needs the package easy-vqa; run pip install -e ".[eval]".') from error
    texts, answers, owners = easy_vqa.get_test_questions()
    paths = easy_vqa.get_test_image_paths()
    folder = Path(paths[owners[0]]).parent
    items = [
        Item(number, Path(paths[owner]).name, f"In the poster, {text}", answer, easy_vqa_family(answer))
        for number, (text, answer, owner) in enumerate(zip(texts, answers, owners, strict=True))
    ]
    return Task("easy_vqa", folder, items)


def easy_vqa_family(answer: str) -> str:
    """What a question of easy-VQA asks for, told from its answer: the package has 3 shapes, 8 colours, yes and no."""
    if answer in ("yes", "no"):
        return "yes or no"
    return "shape" if answer in ("circle", "rectangle", "triangle") else "colour"


TASKS: dict[str, Callable[[], Task]] = {"playground": _playground, "easy_vqa": _easy_vqa}
"""Tasks that are on this machine: the micro world's test split, and easy-VQA's test split in the micro world's wording."""


def open_task(name: str) -> Task:
    """A task by name.

    Raises:
        ValueError: an unknown name, or a task whose files are not here.
    """
    if name not in TASKS:
        raise ValueError(f"There is no task {name!r}; choose one of {', '.join(TASKS)}, or give --questions a file.")
    return TASKS[name]()
