"""The examples of a report: which questions are shown, what is said about each, and the image with its token grid."""

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


def pick_examples(records: Sequence[Record], chosen: Sequence[int] | np.ndarray, count: int) -> list[tuple[Record, int]]:
    """Informative questions, one of each family in turn: correct answers first, above all those that another granularity gets wrong; one in
    six is a wrong answer, above all where another granularity is correct."""
    pairs = [(record, int(level)) for record, level in zip(records, chosen, strict=True)]
    right = [(record, level) for record, level in pairs if record.right[level]]
    wrong = [(record, level) for record, level in pairs if not record.right[level]]
    right.sort(key=lambda pair: all(pair[0].right))
    wrong.sort(key=lambda pair: not any(pair[0].right))
    bad = list(islice(_one_of_each(wrong), max(1, count // 6) if count else 0))
    return [*islice(_one_of_each(right), count - len(bad)), *bad]


def _one_of_each(pairs: Sequence[tuple[Record, int]]) -> Iterator[tuple[Record, int]]:
    """The first of each family, then the next of each, and so on; every image once."""
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


def describe_example(record: Record, granularities: Sequence[int], level: int) -> dict[str, Any]:
    """What the page says about one question: the level chosen, and the answer at every level."""
    tries = [
        {"granularity": tokens, "said": said, "right": right}
        for tokens, said, right in zip(granularities, record.said, record.right, strict=True)
    ]
    return {
        "question_id": record.question_id, "image": record.image, "family": record.family, "text": record.text, "answer": record.answer,
        "granularity": granularities[level], "tokens": record.tokens[level], "full_tokens": record.tokens[-1],
        "said": record.said[level], "right": record.right[level], "tries": tries,
    }  # fmt: skip


def draw_example(assistant: Assistant, folder: Path, record: Record, granularities: Sequence[int], level: int) -> Image.Image:
    """The image with the grid of the chosen level, without the drawing's captions, which the page writes itself."""
    tokens = dict(zip(granularities, record.tokens, strict=True))
    report = RoutingReport(None, None, granularities[level], record.tokens[level], record.tokens[-1], tokens)
    sheet = draw_granularity([load_image(folder / record.image)], [report], assistant.model.config)
    top = MARGIN // 2 + CAPTION
    return sheet.crop((MARGIN, top, sheet.width - MARGIN, top + PANEL))
