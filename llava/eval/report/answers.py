"""Answers to every question at every granularity: an image is encoded once, a question answered once per granularity.

All rows of a report follow from these answers and the router's logits, because a greedy answer depends on nothing but the granularity.
Answers are written to the journal as they come, so that a stopped run can resume. Batches are composed the same way wherever a run was
stopped, so the numbers do not depend on it.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from llava.eval.journal import Journal
from llava.eval.one_by_one import Failure, attempt
from llava.eval.questions import NO_FAMILY
from llava.eval.report.tasks import Item
from llava.images import load_image
from llava.inference import Assistant, Options, Question
from llava.messages import RoutingRequest
from llava.model.compose import ImageInput
from llava.model.routing import RoutingReport
from llava.model.splice import PromptRow

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """One question: its answer at each level, whether that is correct, and what it cost in visual tokens; coarse to fine.

    logits: the router's at these levels, before any bias; `None` for a model without one.
    """

    question_id: int | str
    image: str
    text: str
    answer: str
    family: str = NO_FAMILY
    said: list[str] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logits: list[float] | None = None


@dataclass(frozen=True)
class Crash:
    """A question without an answer, and why."""

    question_id: int | str
    image: str
    reason: str


def is_right(said: str, answer: str) -> bool:
    """Whether two texts are equal, ignoring case and surrounding space; nothing is extracted from a longer answer."""
    return said.strip().lower() == answer.strip().lower()


def by_image(items: Sequence[Item]) -> list[Item]:
    """Questions ordered by image, images in the order they first appear."""
    return [items[place] for place in _places_by_image(items)]


def _places_by_image(items: Sequence[Item]) -> list[int]:
    first = {name: index for index, name in reversed(list(enumerate(item.image for item in items)))}
    return sorted(range(len(items)), key=lambda place: first[items[place].image])


def batches(items: Sequence[Item], size: int) -> Iterator[list[int]]:
    """Places of consecutive questions, `size` at a time, in the order of `by_image`."""
    ordered = _places_by_image(items)
    return (ordered[start : start + size] for start in range(0, len(ordered), size))


@dataclass(frozen=True)
class EncodedItems:
    """B questions, and what composes them at any granularity: their prompts, and each one's encoded image."""

    items: list[Item]
    questions: list[Question]
    rows: list[PromptRow]
    images: list[ImageInput]


def open_item(item: Item, folder: Path) -> Question:
    """A question with its image.

    Raises:
        ImageError: the image cannot be read.
    """
    return Question([load_image(folder / item.image)], item.text)


class Encoder:
    """Encodes the images of questions, each once while questions about it follow each other."""

    def __init__(self, assistant: Assistant, folder: Path) -> None:
        self.assistant, self.folder = assistant, folder
        self._kept: dict[str, tuple[Image.Image, ImageInput]] = {}

    @torch.inference_mode()
    def __call__(self, items: Sequence[Item]) -> EncodedItems:
        """Encode a batch; images that the previous batch had, too, are not encoded again."""
        names = dict.fromkeys(item.image for item in items)
        self._kept = {name: self._kept[name] if name in self._kept else self._encoded(name) for name in names}
        rows = [self.assistant.prompt_row(item.text, 1) for item in items]
        questions = [Question([self._kept[item.image][0]], item.text) for item in items]
        return EncodedItems(list(items), questions, rows, [self._kept[item.image][1] for item in items])

    def _encoded(self, name: str) -> tuple[Image.Image, ImageInput]:
        """One image by itself: in a batch its last digits would depend on its neighbours, which a resumed run may not have."""
        image = load_image(self.folder / name)
        return image, self.assistant.model.with_features([self.assistant.image_input(image)])[0]


@torch.inference_mode()
def ask(assistant: Assistant, batch: EncodedItems, levels: Sequence[int], max_new_tokens: int) -> list[Record]:
    """Greedy answers to a batch of questions at each of some granularities, and the router's logits.

    Args:
        levels: tokens per view, coarse to fine.
    """
    options = Options(max_new_tokens=max_new_tokens)
    plan = assistant.model.plan(batch.rows, batch.images, RoutingRequest(levels[0]))
    logits = assistant.model.logits_where_asked(batch.rows, batch.images, plan, always_route=True)
    reports = [assistant.model.report(0, layouts, logits.get(index)) for index, layouts in enumerate(plan.layouts)]
    said = [_texts_at(assistant, batch, replace(options, routing=RoutingRequest(level))) for level in levels]
    records = []
    for index, (item, report) in enumerate(zip(batch.items, reports, strict=True)):
        texts = [answers[index] for answers in said]
        records.append(
            Record(
                item.question_id, item.image, item.text, item.answer, item.family,
                said=texts,
                right=[is_right(text, item.answer) for text in texts],
                tokens=[report.tokens_per_level[level] for level in levels],
                logits=None if report.logits is None else _of_levels(report, levels),
            )
        )  # fmt: skip
    return records


def _texts_at(assistant: Assistant, batch: EncodedItems, options: Options) -> list[str]:
    """The answers at the level of `options`: of the features that are here, or of a server, which takes images."""
    if assistant.has_decoder:
        composed = assistant.model.compose(batch.rows, batch.images, options.routing)
        return [answer.text for answer in assistant.answer_rows(composed, options)]
    return [answer.text for answer in assistant.answer_batch(batch.questions, options)]


def _of_levels(report: RoutingReport, levels: Sequence[int]) -> list[float]:
    logits = dict(zip(report.tokens_per_level, report.logits.tolist(), strict=True))  # type: ignore[union-attr]
    return [logits[level] for level in levels]


def ask_all(
    assistant: Assistant,
    items: Sequence[Item],
    folder: Path,
    levels: Sequence[int],
    max_new_tokens: int,
    batch_size: int = 80,
    journal: Journal | None = None,
) -> tuple[list[Record], list[Crash]]:
    """Answer every question at every granularity. A batch that fails is tried one by one, so that a question fails for its own fault only.

    Args:
        batch_size: questions at a time.
        journal: where answers are written as they come; questions that it has answers to are skipped, those that failed are tried again.

    Returns:
        Records in the order of `items`, and the questions that failed.

    Raises:
        NoSpaceError: there is no room for the journal.
    """
    encoder = Encoder(assistant, folder)

    def work(some: Sequence[Item]) -> list[Record]:
        return ask(assistant, encoder(some), levels, max_new_tokens)

    outcomes: dict[int, Record | Crash] = dict(answered(journal)) if journal is not None else {}
    with tqdm(total=len(items), initial=len(outcomes), desc="asking", unit="question") as progress:
        for batch in batches(items, batch_size):
            # a batch that lacks one answer is run as a whole, as it would have been without an interruption
            missing = [place for place in batch if place not in outcomes]
            if not missing:
                continue
            done, failures = attempt(work, [items[place] for place in batch])
            results: dict[int, Record | Crash] = {place: record for place, record in zip(batch, done, strict=True) if record is not None}
            results |= {batch[index]: _crash(items[batch[index]], failure) for index, failure in failures.items()}
            if journal is not None:
                journal.add([_line(place, results[place]) for place in missing])
            outcomes |= {place: results[place] for place in missing}
            progress.update(len(missing))
    ordered = [outcomes[place] for place in range(len(items))]
    return [each for each in ordered if isinstance(each, Record)], [each for each in ordered if isinstance(each, Crash)]


def answered(journal: Journal) -> dict[int, Record]:
    """The answers that a journal holds, by the index of their questions."""
    return {place: Record(**line["answer"]) for place, line in journal.records().items() if "answer" in line}


def _line(place: int, outcome: Record | Crash) -> dict[str, Any]:
    """A line of the journal."""
    if isinstance(outcome, Record):
        return {"row": place, "answer": asdict(outcome)}
    return {"row": place, "error": asdict(outcome), "id": uuid.uuid4().hex}


def _crash(item: Item, failure: Failure) -> Crash:
    logger.error("question %s failed: %s", item.question_id, failure.reason)
    return Crash(item.question_id, item.image, failure.reason)
