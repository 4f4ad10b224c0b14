"""Who answers a file of questions: the embedded engine here, a server in `served.py`, vLLM inside this process in `offline_vllm.py`.

All of them take questions one after the other, as many at a time as keep their engine full, and give each answer as soon as it is there,
in whatever order; so a file of any length needs the memory of the questions in flight. Failures come back as values, one per question.
What ends a run raises.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Protocol

from llava.eval.checks import check_questions, check_routing
from llava.eval.one_by_one import Failure, attempt
from llava.eval.questions import Row
from llava.images import load_image
from llava.inference import Answer, Assistant, Question
from llava.messages import Options


@dataclass(frozen=True)
class Reply:
    """An answer as every engine gives it.

    granularity: tokens per view of each image, `None` where the engine does not say which it chose. logits: the router's, likewise.
    visual_tokens, full_visual_tokens: spent, and what full granularity would have cost; `None` where the engine does not say.
    milliseconds: by part. batch_size: questions that these times are of.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    new_tokens: int
    granularity: list[int | None]
    visual_tokens: int | None
    full_visual_tokens: int | None = None
    logits: list[list[float] | None] = field(default_factory=list)
    milliseconds: Mapping[str, float] = field(default_factory=dict)
    batch_size: int = 1


Outcomes = Iterator[Sequence[tuple[Row, Reply | Failure]]]
"""Answers and failures in the order in which they are there, those that come together in one piece."""


class Answerer(Protocol):
    """An engine with the options that every question is answered with.

    Attributes:
        model_id: what answers call the model.
    """

    model_id: str

    def check(self, rows: Iterable[Row]) -> None:
        """Check that one of the first questions can be answered.

        Raises:
            ValueError: none can, with the reason for the first. OSError: there is no engine.
        """

    def answers(self, rows: Iterable[Row]) -> Outcomes:
        """Answer questions.

        Raises:
            OSError: the engine is gone; what has been given stays right.
        """

    def close(self) -> None:
        """Let go of the engine; what is in flight is cancelled."""


# ---- the embedded engine


class Embedded:
    """The model in this process, a batch at a time; a batch that fails is tried one by one.

    Args:
        image_folder: that image names are relative to.
    """

    def __init__(self, assistant: Assistant, options: Options, image_folder: Path, batch_size: int, model_id: str) -> None:
        self.assistant, self.options, self.image_folder = assistant, options, image_folder
        self.batch_size, self.model_id = batch_size, model_id

    def check(self, rows: Iterable[Row]) -> None:
        check_routing(self.assistant, self.options.routing)
        check_questions(self.assistant, ((row.question_id, partial(self._question, row)) for row in rows), self.options)

    def answers(self, rows: Iterable[Row]) -> Outcomes:
        source = iter(rows)
        while batch := list(islice(source, self.batch_size)):
            replies, failures = attempt(self._batch, batch)
            yield [(row, reply or failures[index]) for index, (row, reply) in enumerate(zip(batch, replies, strict=True))]

    def close(self) -> None:
        """Nothing to do."""

    def _batch(self, rows: Sequence[Row]) -> list[Reply]:
        answers = self.assistant.answer_batch(questions_of(rows, self.image_folder), self.options)
        return [_reply(answer, len(rows)) for answer in answers]

    def _question(self, row: Row) -> Question:
        return questions_of([row], self.image_folder)[0]


def questions_of(rows: Sequence[Row], image_folder: Path) -> list[Question]:
    """Rows with their images opened, each once.

    Raises:
        ImageError: an image cannot be read.
    """
    images = {name: load_image(image_folder / name) for name in dict.fromkeys(name for row in rows for name in row.images)}
    return [Question([images[name] for name in row.images], row.text) for row in rows]


def _reply(answer: Answer, batch_size: int) -> Reply:
    """The milliseconds are those of the whole batch."""
    reports = answer.reports
    return Reply(
        text=answer.text,
        finish_reason=answer.finish_reason,
        prompt_tokens=answer.prompt_tokens,
        new_tokens=len(answer.token_ids),
        granularity=[report.granularity for report in reports],
        visual_tokens=sum(report.num_visual_tokens for report in reports),
        full_visual_tokens=sum(report.full_visual_tokens for report in reports),
        logits=[None if report.logits is None else [round(value, 5) for value in report.logits.tolist()] for report in reports],
        milliseconds={part: round(value, 3) for part, value in answer.milliseconds.items()},
        batch_size=batch_size,
    )
