"""Everything that report.json holds, put together from answers, policies and measured costs."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from llava.eval.report import texts
from llava.eval.report.answers import Crash, Record
from llava.eval.report.baseline import Baseline, compare
from llava.eval.report.examples import describe_example, pick_examples
from llava.eval.report.measure import Measurements, balanced_sample, measure, mixed, summarise
from llava.eval.report.outcomes import Outcomes
from llava.eval.report.policies import AppliedPolicy, Policy, apply_policies
from llava.eval.report.settings import Settings
from llava.inference import Assistant

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failures:
    """Questions without an answer, and parts of the report that could not be made."""

    crashes: list[Crash]
    parts: list[str]

    def sentence(self, asked: int) -> str | None:
        """One sentence for the end of the run, or `None`."""
        counted = []
        if self.crashes:
            first = self.crashes[0]
            counted.append(
                f"{len(self.crashes)} of {asked} questions crashed and are in no figure; the first, {first.question_id} ({first.image}): "
                f"{first.reason}"
            )
        return "; ".join([*counted, *self.parts]) or None


def make_report(
    assistant: Assistant,
    records: Sequence[Record],
    granularities: Sequence[int],
    routed: Sequence[Policy],
    baseline: Baseline | None,
    failures: Failures,
    settings: Settings,
) -> tuple[dict[str, Any], list[tuple[Record, int]]]:
    """Compute every number and text of a report, and measure times.

    Args:
        records: the answers. granularities: tokens per view of their levels. routed: policies that depend on the question.
        failures: what went wrong so far; parts that fail here are added.

    Returns:
        What goes to report.json, and the examples as (record, level chosen).
    """
    task, outcomes = settings.task, Outcomes(records)
    policies, left_out = apply_policies(outcomes, records, granularities, routed)
    failures.parts.extend(left_out)
    compared = _compared(records, policies, routed, baseline, failures, settings.seed)
    measured = _measured(assistant, records, policies, failures, settings)
    finest = policies[len(granularities) - 1]
    drawn = outcomes.resampled(finest.weights, settings.seed)
    rows = [
        _row(outcomes, policy, drawn, settings.seed) | {"cost": _cost(policy, policies, measured, records)} for policy in policies
    ]
    shown = next((policy for policy in policies if policy.kind == "adaptive"), finest)
    examples = pick_examples(records, shown.weights.argmax(1), settings.examples)
    report: dict[str, Any] = {
        "task": task.name,
        "model": settings.model_path or "avg-llava-micro",
        "asked": len(task.items),
        "answered": len(records),
        "crashes": [asdict(crash) for crash in failures.crashes],
        "left_out": list(failures.parts),
        "empty_answers": sum(not answer.strip() for record in records for answer in record.said),
        "pictures": len({record.image for record in records}),
        "families": outcomes.families,
        "rare_families": outcomes.rare_families,
        "granularities": list(granularities),
        "max_new_tokens": settings.max_new_tokens,
        "engine": settings.engine,
        "device": str(assistant.model.device),
        "dtype": str(assistant.model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "seed": settings.seed,
        "rows": rows,
        "oracle_gap": oracle_gap(rows),
        "baseline": compared,
        "timing": None if measured is None else _timing(measured, settings.timing_repeats),
        "no_router": None if assistant.model.model.router is not None else texts.NO_ROUTER,
        "examples": [describe_example(record, granularities, level) for record, level in examples],
    }
    report |= {"lead": texts.LEAD, "facts": texts.facts(report), "cards": texts.cards(rows), "notes": texts.notes(report)}
    return report, examples


def _compared(
    records: Sequence[Record],
    policies: Sequence[AppliedPolicy],
    routed: Sequence[Policy],
    baseline: Baseline | None,
    failures: Failures,
    seed: int,
) -> dict[str, Any] | None:
    if baseline is None:
        return None
    try:
        return compare(records, policies, routed, baseline, seed)
    except ValueError as error:
        failures.parts.append(f"the baseline was left out: {error}")
        return None


def _row(outcomes: Outcomes, policy: AppliedPolicy, finest: np.ndarray, seed: int) -> dict[str, Any]:
    """A row of the table; `finest` has the resampled accuracies of the finest granularity."""
    row, resampled = outcomes.row(policy.weights), outcomes.resampled(policy.weights, seed)
    return {
        "name": policy.name,
        "kind": policy.kind,
        "over_questions": outcomes.over_questions(policy.weights),
        "interval": outcomes.interval(resampled),
        "difference": row["accuracy"] - outcomes.row(outcomes.fixed(outcomes.levels - 1))["accuracy"],
        "difference_interval": outcomes.interval(resampled - finest),
        **row,
    }


def oracle_gap(rows: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """How much more accurate the oracle is than the router, and how many visual tokens fewer it takes; `None` without a router."""
    adaptive, oracle = texts.row_of(rows, "adaptive"), texts.row_of(rows, "oracle")
    if adaptive is None or oracle is None:
        return None
    return {"accuracy": oracle["accuracy"] - adaptive["accuracy"], "tokens": adaptive["tokens"] - oracle["tokens"]}


# ---- times ------------------------------------------------------------------------------------------------------------------------


def _measured(
    assistant: Assistant, records: Sequence[Record], policies: Sequence[AppliedPolicy], failures: Failures, settings: Settings
) -> Measurements | None:
    if settings.timing_samples == 0:
        return None
    sample = balanced_sample(records, settings.timing_samples, settings.seed)
    places = _places(records, sample)
    requests = {policy.name: policy.request for policy in policies if policy.request is not None}
    expected = {policy.name: [records[place].said[int(policy.weights[place].argmax())] for place in places] for policy in policies}
    try:
        return measure(assistant, sample, settings.task.folder, requests, expected, settings.max_new_tokens, settings.timing_repeats)
    except Exception as error:  # the answers are worth keeping; the failure is named and ends the run with an error
        logger.exception("timing failed")
        failures.parts.append(f"times were not measured: {type(error).__name__}: {error}")
        return None


def _places(records: Sequence[Record], sample: Sequence[Record]) -> list[int]:
    where = {id(record): place for place, record in enumerate(records)}
    return [where[id(record)] for record in sample]


def _cost(
    policy: AppliedPolicy, policies: Sequence[AppliedPolicy], measured: Measurements | None, records: Sequence[Record]
) -> dict[str, Any] | None:
    if measured is None:
        return None
    if policy.request is not None:
        return summarise(measured.costs[policy.name])
    fixed = [measured.costs[each.name] for each in policies if each.kind == "fixed"]
    return summarise(mixed(fixed, policy.weights[_places(records, measured.sample)]))


def _timing(measured: Measurements, repeats: int) -> dict[str, Any]:
    return {
        "questions": [record.question_id for record in measured.sample],
        "repeats": repeats,
        "answers": measured.answers,
        "differing": measured.differing,
        "text": texts.timing_text(len(measured.sample), repeats),
    }
