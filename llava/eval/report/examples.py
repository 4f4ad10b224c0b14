"""The example pictures of a report: which questions are shown, what is said about them, and the grid drawn over the picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llava.eval.report.answers import Record
from llava.images import load_image
from llava.inference import Assistant
from llava.model.routing import RoutingReport
from llava.visualize import CAPTION, MARGIN, PANEL, draw_granularity


def pick_examples(records: Sequence[Record], taken: Sequence[int] | np.ndarray, count: int) -> list[tuple[Record, int]]:
    """Telling questions, one of each family in turn: first where the level mattered and the choice was right, then other right ones,
    then one in six where the choice was wrong."""
    pairs = [(record, int(level)) for record, level in zip(records, taken, strict=True)]
    right = [(record, level) for record, level in pairs if record.right[level]]
    wrong = [(record, level) for record, level in pairs if not record.right[level]]
    right.sort(key=lambda pair: all(pair[0].right))
    wrong.sort(key=lambda pair: not any(pair[0].right))
    bad = list(islice(_one_of_each(wrong), max(1, count // 6) if count else 0))
    return [*islice(_one_of_each(right), count - len(bad)), *bad]


def _one_of_each(pairs: Sequence[tuple[Record, int]]) -> Iterator[tuple[Record, int]]:
    """The first of each family, then the next of each, and so on; every picture once."""
    groups: dict[str, list[tuple[Record, int]]] = {}
    for record, level in pairs:
        groups.setdefault(record.family, []).append((record, level))
    seen: set[str] = set()
    while groups:
        for family, group in list(groups.items()):
            fresh = next((place for place, (record, _) in enumerate(group) if record.image not in seen), None)
            if fresh is None:
                del groups[family]
                continue
            seen.add(group[fresh][0].image)
            yield group.pop(fresh)


def describe_example(record: Record, names: Sequence[int], level: int) -> dict[str, Any]:
    """What the page says about one question: the level taken, and what every level said."""
    tries = [
        {"granularity": name, "said": said, "right": right}
        for name, said, right in zip(names, record.said, record.right, strict=True)
    ]
    return {
        "question_id": record.question_id, "image": record.image, "family": record.family, "text": record.text, "answer": record.answer,
        "granularity": names[level], "tokens": record.tokens[level], "full_tokens": record.tokens[-1],
        "said": record.said[level], "right": record.right[level], "tries": tries,
    }  # fmt: skip


def draw_example(assistant: Assistant, folder: Path, record: Record, names: Sequence[int], level: int) -> Image.Image:
    """The picture with the grid taken, without the sheet's captions, which the page writes itself."""
    report = RoutingReport(None, None, names[level], record.tokens[level], record.tokens[-1], dict(zip(names, record.tokens, strict=True)))
    sheet = draw_granularity([load_image(folder / record.image)], [report], assistant.model.config)
    top = MARGIN // 2 + CAPTION
    return sheet.crop((MARGIN, top, sheet.width - MARGIN, top + PANEL))
