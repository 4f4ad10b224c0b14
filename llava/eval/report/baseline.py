"""Comparison with an earlier report on the same questions: paired differences and their confidence intervals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava.eval.report.answers import Record
from llava.eval.report.answers_file import Key, key_of, read_answers
from llava.eval.report.outcomes import Outcomes
from llava.eval.report.policies import AppliedPolicy, Policy, apply_policies
from llava.eval.report.tasks import Item

REPORT = "report.json"
CURE = "give both reports the same --task, --questions and --limit"


@dataclass(frozen=True)
class Baseline:
    """An earlier report: its folder, its model, tokens per view of its levels, and its answers."""

    folder: Path
    model: str
    granularities: list[int]
    records: dict[Key, Record]


def read_report(folder: Path) -> dict[str, Any] | None:
    """The report.json of a folder, or `None` where there is none that a report wrote."""
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) and {"model", "asked", "answered", "crashes", "left_out"} <= set(report) else None


def read_baseline(path: Path, items: Sequence[Item]) -> Baseline:
    """Read a report to compare with.

    Args:
        path: its folder, or its report.json. items: the questions of this report.

    Raises:
        ValueError: no finished report, or one on other questions; the message names the first that differs.
    """
    folder = path.parent if path.name == REPORT else path
    report = read_report(folder)
    if report is None:
        raise ValueError(f"{folder} holds no report.json of a finished report; --baseline takes the folder of an earlier one.")
    made_with, records = read_answers(folder / "answers.jsonl")
    own = {key_of(record): record for record in records[: report["answered"]]}
    _check_questions([key_of(item) for item in items], list(own), folder)
    return Baseline(folder, report["model"], made_with["granularities"], own)


def _check_questions(here: Sequence[Key], there: Sequence[Key], folder: Path) -> None:
    """
    Raises:
        ValueError: two reports are not on the same questions.
    """
    names = ("image", "text", "answer", "family")
    known, asked, answered = {key[0]: key for key in there}, set(here), set(there)
    for key in here:
        other = known.get(key[0])
        if other is None:
            raise ValueError(f"The baseline {folder} has no answer to question {key[0]!r}, which is asked here; {CURE}.")
        if other != key and key not in answered:
            name, before, now = next((name, a, b) for name, a, b in zip(names, other[1:], key[1:], strict=True) if a != b)
            raise ValueError(f"Question {key[0]!r} differs in the baseline {folder}: its {name} was {before!r}, is {now!r}; {CURE}.")
    more = [key for key in there if key not in asked]
    if more:
        raise ValueError(f"The baseline {folder} has {len(more)} more questions (the first is {more[0][0]!r}); {CURE}.")


def compare(
    records: Sequence[Record], policies: Sequence[AppliedPolicy], routed: Sequence[Policy], baseline: Baseline, seed: int
) -> dict[str, Any]:
    """This report minus the baseline, for every policy that both have.

    Args:
        records, policies, routed: of this report, see `apply_policies`. seed: of the resampling.

    Returns:
        The baseline's `folder` and `model`; `rows` with the accuracies of both in percent, visual tokens of both, the paired differences
        with their 95 % intervals (`None` where there are too few images), and on how many questions this report is `better` and `worse`;
        `missing`, the policies that the baseline lacks.

    Raises:
        ValueError: a question has no answer here, so that it cannot be compared.
    """
    if len(records) < len(baseline.records):
        raise ValueError(f"{len(baseline.records) - len(records)} of its questions have no answer in this report")
    here = Outcomes(records)
    matched = [baseline.records[key_of(record)] for record in records]
    there = Outcomes(matched, here.families)
    others = {policy.name: policy for policy in apply_policies(there, matched, baseline.granularities, routed)[0]}
    pairs = [(policy, others[policy.name]) for policy in policies if policy.name in others]
    return {
        "folder": str(baseline.folder),
        "model": baseline.model,
        "rows": [_row(here, there, policy, other, seed) for policy, other in pairs],
        "missing": [policy.name for policy in policies if policy.name not in others],
    }


def _row(here: Outcomes, there: Outcomes, policy: AppliedPolicy, other: AppliedPolicy, seed: int) -> dict[str, Any]:
    rights = [(each.right * weights).sum(1) for each, weights in ((here, policy.weights), (there, other.weights))]  # (Q,) each
    costs = [(each.tokens * weights).sum(1) for each, weights in ((here, policy.weights), (there, other.weights))]
    accuracy, before = (_mean(here, 100 * values) for values in rights)
    tokens, tokens_before = (_mean(here, values) for values in costs)
    return {
        "name": policy.name,
        "kind": policy.kind,
        "accuracy": accuracy,
        "baseline_accuracy": before,
        "difference": accuracy - before,
        "difference_interval": here.interval(here.resampled_means(100 * (rights[0] - rights[1]), seed)),
        "better": int((rights[0] > rights[1]).sum()),
        "worse": int((rights[0] < rights[1]).sum()),
        "tokens": tokens,
        "baseline_tokens": tokens_before,
        "tokens_difference": tokens - tokens_before,
        "tokens_interval": here.interval(here.resampled_means(costs[0] - costs[1], seed)),
    }


def _mean(outcomes: Outcomes, values: np.ndarray) -> float:
    """Mean over families of per-question values."""
    return float(np.mean(list(outcomes.of_families(values).values())))
