"""The sentences of a report: facts, cards and notes, all from what report.json holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from llava.eval.questions import NO_FAMILY
from llava.eval.report.measure import MEMORY_QUESTIONS
from llava.eval.report.outcomes import FEWEST_IMAGES, RESAMPLES

NO_ROUTER = "This model has no router: the adaptive policies, random choice at their cost and the biases are left out."
SERVED = (
    "The answers are those of a vLLM server that was asked many questions at once; granularities, visual tokens and logits are computed "
    "here. Times and memory of single requests are not measured."
)
LEAD = "Every question is answered at every granularity: how accurate the answers are, and what they cost."
PEAK_METHODS = {"cuda": "by the GPU's allocator", "cpu": "by a profiler that sees every tensor allocation"}


def grouped(report: Mapping[str, Any]) -> bool:
    """Whether the questions are of several families."""
    return len(report["families"]) > 1


def percent(value: float) -> str:
    """A percentage to one decimal. Rounding errors, by which two means of the same values may differ, do not show."""
    return f"{round(value, 9):.1f}"


def signed(value: float, interval: Sequence[float] | None = None) -> str:
    """A difference to one decimal, with its interval; zero is +0.0, even when only a rounding error remains."""
    ends = "" if interval is None else f" [{signed(interval[0])}, {signed(interval[1])}]"
    return f"{round(value, 9) + 0.0:+.1f}{ends}"


def plural(count: int, noun: str) -> str:
    """A number and its noun."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def row_of(rows: Sequence[Mapping[str, Any]], kind: str) -> Mapping[str, Any] | None:
    """The first row of a kind, if there is one."""
    return next((row for row in rows if row["kind"] == kind), None)


def facts(report: Mapping[str, Any]) -> list[str]:
    """Model, questions and machine."""
    return [
        f"model {report['model']}",
        f"task {report['task']}",
        f"{plural(report['answered'], 'question')} on {plural(report['pictures'], 'image')}",
        f"{report['device']}, {report['dtype']}, {plural(report['threads'], 'thread')}",
    ]


def empty_answers(report: Mapping[str, Any]) -> str | None:
    """How many answers are empty, or `None` where none is."""
    empty, answers = report["empty_answers"], report["answered"] * len(report["granularities"])
    return f"{empty} of {answers} answers (questions times granularities) {'is' if empty == 1 else 'are'} empty." if empty else None


def no_intervals(report: Mapping[str, Any]) -> str | None:
    """Why no intervals are given, or `None` where they are."""
    if not report["rare_families"]:
        return None
    family, images = min(report["rare_families"].items(), key=lambda pair: pair[1])
    what = "the questions are" if report["families"] == [NO_FAMILY] else f"the family '{family}' is"
    return (
        f"No intervals are given: {what} on {plural(images, 'image')}, and fewer than {FEWEST_IMAGES} are too small a sample to "
        "generalise from."
    )


def timing_text(questions: int, repeats: int) -> str:
    """How the times of the table were taken."""
    return (
        f"Mean over {questions} questions of single requests, {repeats} each, with the policies taking turns. "
        "Random and oracle are computed from the fixed policies."
    )


# ---- cards ------------------------------------------------------------------------------------------------------------------------


def cards(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The headline numbers: of the adaptive policy, or accuracies of all policies where there is no router."""
    fixed = [row for row in rows if row["kind"] == "fixed"]
    finest, oracle, random, own = fixed[-1], row_of(rows, "oracle"), row_of(rows, "random"), row_of(rows, "adaptive")
    assert oracle is not None
    if own is None or random is None:
        return [
            _card("Accuracy", f"{percent(row['accuracy'])} %", f"{row['name']}, {row['tokens']:.0f} visual tokens")
            for row in [*fixed, oracle]
        ]
    found = [
        _card(
            "Accuracy, family mean" if len(own["families"]) > 1 else "Accuracy",
            f"{percent(own['accuracy'])} %",
            f"against {percent(finest['accuracy'])} % at the finest: {signed(own['difference'], own['difference_interval'])}",
        ),
        _card(
            "Visual tokens",
            f"{own['tokens']:.0f} of {finest['tokens']:.0f}",
            f"{own['saved']:.0f} % saved; random choice at that cost reaches {percent(random['accuracy'])} %",
        ),
    ]
    if own["cost"] is not None:
        time, finest_time = own["cost"]["total_ms"], finest["cost"]["total_ms"]
        share = own["cost"]["router_share"]
        text = f"against {finest_time:.1f} ms at the finest: {finest_time / time:.2f} times as fast; the router takes {share:.0f} %"
        found.append(_card("Time per answer", f"{time:.1f} ms", text))
    text = f"the cheapest correct granularity of each question: {percent(oracle['accuracy'])} % at {oracle['tokens']:.0f} tokens"
    return [*found, _card("Oracle gap", f"{oracle['accuracy'] - own['accuracy']:.1f} points", text)]


def _card(title: str, value: str, text: str) -> dict[str, str]:
    return {"title": title, "value": value, "text": text}


# ---- notes ------------------------------------------------------------------------------------------------------------------------


def notes(report: Mapping[str, Any]) -> list[str]:
    """How every number is defined and measured."""
    kinds = {row["kind"] for row in report["rows"]}
    family_means = (
        " Accuracy and visual tokens are means over question families: every family counts the same, however many questions it has. The "
        "column beside them is accuracy over questions."
        if grouped(report)
        else ""
    )
    adaptive = (
        "Adaptive is the router's choice. Random at that cost is the expected result of a random choice between the two fixed "
        "granularities next to the adaptive policy's mean cost, weighted so that it costs the same."
        if "adaptive" in kinds
        else report["no_router"]
    )
    candidates = [
        "An answer is correct if it equals the expected text, ignoring case and surrounding space. Answers are greedy, with at most "
        f"{report['max_new_tokens']} new tokens.{family_means}",
        report.get("engine") == "vllm" and SERVED,
        empty_answers(report),
        no_intervals(report) or _interval_note(report),
        "Visual tokens are the image's positions in the prompt, newline tokens included.",
        adaptive,
        "bias" in kinds and "A bias is added to the router's logits per doubling of the visual tokens: negative favours cheaper levels.",
        "budget" in kinds and "A budget caps a question's visual tokens; the best granularity within it is taken.",
        "The oracle takes the cheapest granularity that answers correctly, or the coarsest if none does. It knows the answer, so it is an "
        "upper bound.",
        report.get("baseline") is not None and baseline_text(report),
        *(_timing_notes(report) if report["timing"] is not None else []),
        *(f"Failed: {part}." for part in report["left_out"]),
    ]
    return [note for note in candidates if note]


def _interval_note(report: Mapping[str, Any]) -> str:
    return (
        f"Intervals are 95 % bootstrap intervals over images ({RESAMPLES} resamples, seed {report['seed']}), widened by Student's t for "
        "small samples. Images are resampled, not questions, because questions about one image are not independent; a resample that lacks "
        "a family is dropped. Where every answer is correct a bootstrap sees no variance: read such an interval as too narrow. The "
        "difference to the finest granularity is paired."
    )


def baseline_text(report: Mapping[str, Any]) -> str:
    """How the differences to a baseline are computed."""
    baseline = report["baseline"]
    text = (
        f"The baseline is {baseline['folder']}, model {baseline['model']}. Differences are this report minus the baseline, question by "
        "question"
    )
    if not report["rare_families"]:
        text += (
            f"; brackets hold 95 % intervals of the paired bootstrap: both reports' answers to the same {RESAMPLES} resamples of the "
            f"images, seed {report['seed']}. An interval that excludes 0 is a difference to expect on other images of this kind, too"
        )
    text += ". Better and worse count the questions that only one of the two answers correctly. Times of two runs are not compared."
    if baseline["missing"]:
        text += f" Not in the baseline: {'; '.join(baseline['missing'])}."
    return text


def _timing_notes(report: Mapping[str, Any]) -> list[str]:
    timing = report["timing"]
    asked, answers = len(timing["questions"]), timing["answers"]
    machine = f"{report['device']}, {report['dtype']}, {plural(report['threads'], 'thread')}, PyTorch {torch.__version__.split('+')[0]}"
    peak = PEAK_METHODS.get(report["device"].split(":")[0], "which this device does not report")
    return [
        f"Times are of single requests on {machine}: {asked} questions spread over the families, after a warm-up. All policies take turns "
        f"on each question, {timing['repeats']} times, and the one that goes first rotates with the question and the repetition. The "
        "repetition of median total time counts, with all its parts; table and bars show means over questions. Random and oracle are "
        "computed from the fixed policies and contain no router time.",
        "TTFT is the time to the first token, image preprocessing included. Tokens per second are new tokens over the total time of the "
        "answers; short answers are mostly prefill.",
        f"Peak is the most tensor memory held at once during a request on top of the loaded weights, measured {peak}; mean over "
        f"{min(MEMORY_QUESTIONS, asked)} of these questions. KV is the size of the KV cache after the answer, computed from shapes.",
        f"{answers - timing['differing']} of {answers} timed answers equal those of the batches that accuracy is computed from.",
    ]
