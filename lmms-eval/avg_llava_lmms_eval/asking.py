"""Ask many questions in batches, keep count of what failed, and write each sample down as it is answered.

Nothing here knows the harness: a sample says who it is and how to load its question.
"""

from __future__ import annotations

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from tqdm import tqdm

from avg_llava_lmms_eval.sample_log import SampleLog, routing_fields
from llava.eval.one_by_one import Failure, attempt
from llava.inference import Answer, Assistant, Likelihood, Options, Question

logger = logging.getLogger(__name__)

Outcome = TypeVar("Outcome", Answer, Likelihood)

SHOWN_FAILURES = 3


@dataclass(frozen=True)
class Sample:
    """One question of a task.

    task, split, doc_id: where it comes from.
    load: opens its images; whatever it raises counts as this sample's failure.
    options: how to answer; samples of equal options share batches.
    continuation: the answer to score, where one is to be scored.
    counted: whether it appears in the log and the costs; a repetition does not.
    """

    task: str
    split: str
    doc_id: Hashable
    load: Callable[[], Question]
    options: Options
    continuation: str | None = None
    counted: bool = True


@dataclass
class Results(Generic[Outcome]):
    """Outcomes in the order of the samples, `None` where one failed, and why by index."""

    outcomes: list[Outcome | None]
    failures: dict[int, Failure] = field(default_factory=dict)


def answer_all(assistant: Assistant, samples: Sequence[Sample], batch_size: int, log: SampleLog, show: bool = True) -> Results[Answer]:
    """Answer every sample.

    Args:
        batch_size: samples of equal options per batch. At 1 the log has the time to the first token and that of decoding separately.
        log: where each sample is written as soon as it is answered or has failed.
        show: draw a progress bar.
    """

    def work(batch: Sequence[Sample]) -> list[Answer]:
        questions = [sample.load() for sample in batch]
        if batch_size == 1:
            return [assistant.answer(question.images, question.messages, batch[0].options) for question in questions]
        return assistant.answer_batch(questions, batch[0].options)

    def record(answer: Answer) -> dict[str, Any]:
        return {
            "answer": answer.text,
            "finish_reason": answer.finish_reason,
            "prompt_tokens": answer.prompt_tokens,
            "new_tokens": answer.num_new_tokens,
        }

    return _ask(samples, batch_size, work, record, log, show)


def score_all(assistant: Assistant, samples: Sequence[Sample], batch_size: int, log: SampleLog, show: bool = True) -> Results[Likelihood]:
    """Score the continuation of every sample; arguments as in `answer_all`."""

    def work(batch: Sequence[Sample]) -> list[Likelihood]:
        continuations = [sample.continuation or "" for sample in batch]
        return assistant.log_likelihoods([sample.load() for sample in batch], continuations, batch[0].options)

    def record(likelihood: Likelihood) -> dict[str, Any]:
        return {
            "log_probability": likelihood.log_probability if math.isfinite(likelihood.log_probability) else None,  # JSON has no infinity
            "is_greedy": likelihood.is_greedy,
            "new_tokens": likelihood.num_tokens,
        }

    return _ask(samples, batch_size, work, record, log, show)


def _ask(
    samples: Sequence[Sample],
    batch_size: int,
    work: Callable[[Sequence[Sample]], list[Outcome]],
    record: Callable[[Outcome], dict[str, Any]],
    log: SampleLog,
    show: bool,
) -> Results[Outcome]:
    results: Results[Outcome] = Results([None] * len(samples))

    def asked(batch: Sequence[Sample]) -> list[tuple[Outcome, int]]:
        return [(outcome, len(batch)) for outcome in work(batch)]

    with tqdm(total=len(samples), desc="avg_llava", unit="sample", disable=not show) as bar:
        for places in _batches(samples, batch_size):
            pairs, failures = attempt(asked, [samples[place] for place in places])
            lines = []
            for index, (place, pair) in enumerate(zip(places, pairs, strict=True)):
                sample = samples[place]
                if pair is None:
                    results.failures[place] = failures[index]
                    logger.warning("%s failed\n%s", _name(sample), failures[index].details)
                    lines.append({**_identity(sample), "error": failures[index].reason})
                    continue
                results.outcomes[place] = pair[0]
                if sample.counted:
                    lines.append(_record(sample, pair[0], record, pair[1]))
            log.write(lines)
            bar.update(len(places))
    return results


def _batches(samples: Sequence[Sample], batch_size: int) -> Iterator[list[int]]:
    """Places of samples with equal options, in their order: questions about one image are adjacent and share its encoding."""
    groups: dict[Options, list[int]] = defaultdict(list)
    for place, sample in enumerate(samples):
        groups[sample.options].append(place)
    for places in groups.values():
        for start in range(0, len(places), batch_size):
            yield places[start : start + batch_size]


def _name(sample: Sample) -> str:
    return f"{sample.task} ({sample.split}), document {sample.doc_id}"


def _identity(sample: Sample) -> dict[str, Any]:
    return {"task": sample.task, "split": sample.split, "doc_id": sample.doc_id}


def _record(sample: Sample, outcome: Outcome, record: Callable[[Outcome], dict[str, Any]], batch: int) -> dict[str, Any]:
    scored = {} if sample.continuation is None else {"continuation": sample.continuation}
    milliseconds = {part: round(value, 3) for part, value in outcome.milliseconds.items()}
    return {
        **_identity(sample),
        **scored,
        **record(outcome),
        **routing_fields(outcome.reports),
        "milliseconds": milliseconds,
        "batch": batch,
    }


@dataclass
class Failed:
    """How one kind of request went, in a form that processes can exchange.

    asked, failed: how many samples; first: what happened to the first few that failed.
    """

    asked: int = 0
    failed: int = 0
    first: list[str] = field(default_factory=list)

    def merge(self, other: Failed) -> None:
        """Add another share."""
        self.asked += other.asked
        self.failed += other.failed
        self.first = (self.first + other.first)[:SHOWN_FAILURES]


def failed_of(samples: Sequence[Sample], results: Results[Any]) -> Failed:
    """How one process's samples went; repetitions are left out, unless nothing else failed."""
    counted = [place for place, sample in enumerate(samples) if sample.counted]
    failed = [place for place in counted if place in results.failures]
    if results.failures and not failed:
        counted, failed = list(range(len(samples))), list(results.failures)
    return Failed(
        asked=len(counted),
        failed=len(failed),
        first=[f"{_name(samples[place])}: {results.failures[place].reason}" for place in failed[:SHOWN_FAILURES]],
    )


@dataclass
class Costs:
    """What the samples of one task cost, as sums, so that the processes' shares can be added up."""

    samples: int = 0
    visual_tokens: int = 0
    full_visual_tokens: int = 0
    new_tokens: int = 0
    empty: int = 0
    granularities: Counter[int] = field(default_factory=Counter)

    def add(self, outcome: Answer | Likelihood) -> None:
        """Count one sample."""
        self.samples += 1
        self.visual_tokens += sum(report.num_visual_tokens for report in outcome.reports)
        self.full_visual_tokens += sum(report.full_visual_tokens for report in outcome.reports)
        if isinstance(outcome, Answer):
            self.new_tokens += outcome.num_new_tokens
            self.empty += not outcome.text.strip()
        self.granularities.update(report.granularity for report in outcome.reports)

    def merge(self, other: Costs) -> None:
        """Add another process's share."""
        self.samples += other.samples
        self.visual_tokens += other.visual_tokens
        self.full_visual_tokens += other.full_visual_tokens
        self.new_tokens += other.new_tokens
        self.empty += other.empty
        self.granularities.update(other.granularities)

    def __str__(self) -> str:
        empty = f"; {self.empty} of {self.samples} answers {'is' if self.empty == 1 else 'are'} empty" if self.empty else ""
        if not self.full_visual_tokens:
            return f"{self.samples} samples, no images{empty}"
        kept = 100 * self.visual_tokens / self.full_visual_tokens
        return (
            f"{self.samples} samples, {self.visual_tokens / self.samples:.1f} visual tokens on average ({kept:.1f} % of the finest "
            f"level's), granularities {dict(sorted(self.granularities.items()))}{empty}"
        )


def costs_of(samples: Sequence[Sample], results: Results[Any]) -> dict[str, Costs]:
    """What the answered samples cost, by task."""
    by_task: dict[str, Costs] = defaultdict(Costs)
    for sample, outcome in zip(samples, results.outcomes, strict=True):
        if outcome is not None and sample.counted:
            by_task[sample.task].add(outcome)
    return dict(by_task)


Share = TypeVar("Share", Failed, Costs)


def merge_shares(kind: type[Share], shares: Iterable[dict[str, Share]]) -> dict[str, Share]:
    """Several shares together, by the names that they count under."""
    merged: dict[str, Share] = defaultdict(kind)
    for share in shares:
        for name, counted in share.items():
            merged[name].merge(counted)
    return dict(merged)
