"""The questions of a report: a local task by name, or a file of your own."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.constants import MICRO_MODEL
from llava.eval.questions import NO_FAMILY, read_questions, scored_fields


@dataclass(frozen=True)
class Item:
    """One question about one image. `image` is relative to its task's folder; `family` groups questions of one kind."""

    question_id: int | str
    image: str
    text: str
    answer: str
    family: str = NO_FAMILY


@dataclass(frozen=True)
class Task:
    """Questions, and the folder that holds their images."""

    name: str
    folder: Path
    items: list[Item]

    @property
    def families(self) -> list[str]:
        """The families in the order they first appear."""
        return list(dict.fromkeys(item.family for item in self.items))


def read_task(path: Path, folder: Path | None = None, name: str | None = None) -> Task:
    """The questions of a file, see `llava.eval.questions`: about one image each, with `answer` and optionally `family`.

    Args:
        folder: what image names are relative to; the file's own folder by default.

    Raises:
        ValueError: no such file or folder, or all mistakes in its lines.
    """
    folder = folder or path.parent
    rows = read_questions(path, folder, _one_image)
    return Task(name or path.stem, folder, [Item(row.question_id, row.images[0], row.text, **row.extra) for row in rows])


def _one_image(row: dict[str, Any], text: str) -> dict[str, Any]:
    if not isinstance(row.get("image"), str):
        raise ValueError(f"image is {row.get('image')!r}, expected one file name: a report takes questions about one image each")
    return scored_fields(row, text)


def _playground() -> Task:
    path = MICRO_MODEL.parent / "eval" / "test.jsonl"
    if not path.is_file():
        raise ValueError(f"The task playground reads {path}, which ships with the repository but is missing here; use --questions instead.")
    return read_task(path, name="playground")


def _easy_vqa() -> Task:
    try:
        easy_vqa = importlib.import_module("easy_vqa")
    except ImportError as error:
        raise ValueError('The task easy_vqa needs the package easy-vqa; install it with pip install -e ".[eval]".') from error
    texts, answers, owners = easy_vqa.get_test_questions()
    paths = easy_vqa.get_test_image_paths()
    folder = Path(paths[owners[0]]).parent
    items = [
        Item(number, Path(paths[owner]).name, f"In the poster, {text}", answer, easy_vqa_family(answer))
        for number, (text, answer, owner) in enumerate(zip(texts, answers, owners, strict=True))
    ]
    return Task("easy_vqa", folder, items)


def easy_vqa_family(answer: str) -> str:
    """What a question of easy-VQA asks for, derived from its answer: the package has 3 shapes, 8 colours, yes and no."""
    if answer in ("yes", "no"):
        return "yes or no"
    return "shape" if answer in ("circle", "rectangle", "triangle") else "colour"


TASKS: dict[str, Callable[[], Task]] = {"playground": _playground, "easy_vqa": _easy_vqa}
"""Tasks that need no download: the micro world's test split, and easy-VQA's test split in the micro world's wording."""


def open_task(name: str) -> Task:
    """A task by name.

    Raises:
        ValueError: an unknown name, or a task whose files are missing.
    """
    if name not in TASKS:
        raise ValueError(f"There is no task {name!r}; choose one of {', '.join(TASKS)}, or give --questions a file.")
    return TASKS[name]()
