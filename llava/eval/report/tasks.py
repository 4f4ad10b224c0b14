"""Where the questions of a report come from: a local task by name, or a JSONL file of one's own."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.eval.questions import NO_FAMILY, read_questions, scored_fields
from llava.inference import MICRO_MODEL


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


def read_task(path: Path, folder: Path | None = None, name: str | None = None) -> Task:
    """The questions of a JSONL file, see `llava.eval.questions`: about one picture each, with `answer` and optionally `family`.

    Args:
        folder: what picture names are relative to; the file's own folder by default.

    Raises:
        ValueError: no such file or folder, or everything that is wrong with its lines.
    """
    folder = folder or path.parent
    rows = read_questions(path, folder, _one_image)
    return Task(name or path.stem, folder, [Item(row.question_id, row.images[0], row.text, **row.extra) for row in rows])


def _one_image(row: dict[str, Any], text: str) -> dict[str, Any]:
    if not isinstance(row.get("image"), str):
        raise ValueError(f"image is {row.get('image')!r}, expected one file name: a report is about questions on one image")
    return scored_fields(row, text)


def _playground() -> Task:
    path = MICRO_MODEL.parent / "eval" / "test.jsonl"
    if not path.is_file():
        raise ValueError(f"The task playground reads {path}, which ships with the repository and is not here; give --questions instead.")
    return read_task(path, name="playground")


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
