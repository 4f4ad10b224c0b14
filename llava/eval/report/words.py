"""The words of a report: cards, notes and the table for a terminal, all from what report.json says."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from llava.eval.questions import NO_FAMILY
from llava.eval.report.measure import MEMORY_QUESTIONS
from llava.eval.report.outcomes import FEWEST_PICTURES, RESAMPLES

NO_ROUTER = "This model has no router: the adaptive rows, chance at their cost and the biases are left out."
LEAD = "Every question asked at every granularity: what the answers are worth, and what they cost."


def heads(report: Mapping[str, Any]) -> tuple[str, ...]:
    """Heads of the columns about answers: accuracy in percent, that over questions where it is another, and visual tokens.

    With several families accuracy and tokens are means over them, and the table says so.
    """
    if not grouped(report):
        return "accuracy, %", "visual tokens"
    return "accuracy, mean over families, %", "accuracy over questions, %", "visual tokens, mean over families"


def grouped(report: Mapping[str, Any]) -> bool:
    """Whether the questions are of several families."""
    return len(report["families"]) > 1


def percent(value: float) -> str:
    """A value of a table to one decimal; values that differ by rounding errors alone, such as two means of the same, look the same."""
    return f"{round(value, 9):.1f}"


def empty_answers(report: Mapping[str, Any]) -> str | None:
    """How many answers are empty, or `None` where none is."""
    empty, answers = report["empty_answers"], report["answered"] * len(report["granularities"])
    return f"{empty} of {answers} answers (questions times granularities) {'is' if empty == 1 else 'are'} empty." if empty else None


def facts(report: Mapping[str, Any]) -> list[str]:
    """What was asked of whom, and where."""
    return [
        f"model {report['model']}", f"task {report['task']}", f"{report['answered']} questions on {report['pictures']} pictures",
        f"{report['device']}, {report['dtype']}, {report['threads']} thread{'s' if report['threads'] > 1 else ''}",
    ]  # fmt: skip


def timing_text(questions: int, repeats: int) -> str:
    """What the times of the table are."""
    return (
        f"Mean over {questions} questions of single requests, {repeats} each, all rows in turns. "
        "Random and oracle are computed from the fixed rows."
    )


def _signed(value: float, interval: Sequence[float] | None) -> str:
    return _with_sign(value) + ("" if interval is None else f" [{_with_sign(interval[0])}, {_with_sign(interval[1])}]")


def _with_sign(value: float) -> str:
    """To one decimal; nothing is +0.0, also where rounding errors are all there is."""
    return f"{round(value, 9) + 0.0:+.1f}"


def cards(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """What a reader wants first: of the adaptive row, or of all where there is none."""
    fixed = [row for row in rows if row["kind"] == "fixed"]
    finest, oracle = fixed[-1], _of_kind(rows, "oracle")
    own = next((row for row in rows if row["kind"] == "adaptive"), None)
    if own is None:
        return [
            {"title": "Accuracy", "value": f"{percent(row['accuracy'])} %", "text": f"{row['name']}, {row['tokens']:.0f} visual tokens"}
            for row in [*fixed, oracle]
        ]
    found = [
        {
            "title": "Accuracy, family mean" if len(own["families"]) > 1 else "Accuracy",
            "value": f"{percent(own['accuracy'])} %",
            "text": f"against {percent(finest['accuracy'])} % at the finest: {_signed(own['difference'], own['difference_interval'])}",
        },
        {
            "title": "Visual tokens",
            "value": f"{own['tokens']:.0f} of {finest['tokens']:.0f}",
            "text": f"{own['saved']:.0f} % saved; chance at that cost reaches {percent(_of_kind(rows, 'random')['accuracy'])} %",
        },
    ]
    if own["cost"] is not None:
        times = own["cost"]["total_ms"], finest["cost"]["total_ms"]
        found.append(
            {
                "title": "Time per answer",
                "value": f"{times[0]:.1f} ms",
                "text": f"against {times[1]:.1f} ms at the finest: {times[1] / times[0]:.2f} times as fast; the router takes "
                f"{own['cost']['router_share']:.0f} %",
            }
        )
    gap = oracle["accuracy"] - own["accuracy"]
    found.append(
        {
            "title": "Oracle gap",
            "value": f"{gap:.1f} points",
            "text": f"the cheapest correct granularity of each question: {percent(oracle['accuracy'])} % at {oracle['tokens']:.0f} tokens",
        }
    )
    return found


def _of_kind(rows: Sequence[Mapping[str, Any]], kind: str) -> Mapping[str, Any]:
    return next(row for row in rows if row["kind"] == kind)


def notes(report: Mapping[str, Any]) -> list[str]:
    """How every number came about."""
    kinds = {row["kind"] for row in report["rows"]}
    said = [
        "Right is an answer that equals the expected text, apart from case and surrounding space. Answers are greedy, of at most "
        f"{report['max_new_tokens']} tokens."
        + (
            " Accuracy and visual tokens are means over question families: every family counts the same, however many questions it has. "
            "Accuracy over questions is beside them."
            if grouped(report)
            else ""
        ),
        *filter(None, [empty_answers(report)]),
        _interval_note(report),
        "Visual tokens are what a picture keeps in the prompt, newline tokens included.",
    ]
    if "adaptive" in kinds:
        said.append(
            "Adaptive is the router's choice. Random at that cost is the expected result of a coin between the two fixed granularities "
            "around the adaptive row's mean cost, weighted so that it costs as much."
        )
    elif report["no_router"] is not None:
        said.append(report["no_router"])
    if "bias" in kinds:
        said.append("A bias is added to the router's logits per doubling of the visual tokens: negative is cheaper.")
    if "budget" in kinds:
        said.append("A budget is the most visual tokens a question may cost; the best granularity within it is taken.")
    said.append(
        "The oracle takes the cheapest granularity that answers rightly, and the coarsest where none does; it knows the answer, so it is a "
        "bound."
    )
    if report.get("baseline") is not None:
        said.append(baseline_text(report))
    if report["timing"] is not None:
        said += _timing_notes(report)
    said += [f"Failed: {part}." for part in report["left_out"]]
    return said


def baseline_text(report: Mapping[str, Any]) -> str:
    """What the differences to a baseline are."""
    baseline = report["baseline"]
    text = (
        f"The baseline is {baseline['folder']}, model {baseline['model']}. Differences are this report less the baseline, matched question "
        "by question"
    )
    if not report["rare_families"]:
        text += (
            f"; in brackets 95 % intervals of the paired bootstrap: both reports' answers to {RESAMPLES} draws of the same images, seed "
            f"{report['seed']}. An interval without 0 is a difference that other images of this kind would show too"
        )
    text += ". Better and worse count the questions whose answers differ in being right. Times of two runs are not compared."
    if baseline["missing"]:
        text += f" Not in the baseline: {'; '.join(baseline['missing'])}."
    return text


BASELINE_HEADS = (
    "choice", "accuracy, %", "baseline, %", "difference [95 %]", "better", "worse", "visual tokens", "baseline's", "difference [95 %]",
)  # fmt: skip


def baseline_cells(row: Mapping[str, Any]) -> list[str]:
    """A line of the table of differences, see `BASELINE_HEADS`."""
    return [
        row["name"], percent(row["accuracy"]), percent(row["baseline_accuracy"]), _signed(row["difference"], row["difference_interval"]),
        str(row["better"]), str(row["worse"]), f"{row['tokens']:.0f}", f"{row['baseline_tokens']:.0f}",
        _signed(row["tokens_difference"], row["tokens_interval"]),
    ]  # fmt: skip


def _interval_note(report: Mapping[str, Any]) -> str:
    if report["rare_families"]:
        return _no_interval(report)
    return (
        f"Intervals are of 95 %, from {RESAMPLES} resamples of the pictures (bootstrap, seed {report['seed']}), widened as Student's t is "
        "for few pictures; pictures are drawn, not questions, because questions about one picture are not independent. A resample that "
        "lacks a family is left out. Where every "
        "answer is right a bootstrap sees no doubt: read such an interval as too narrow. The difference to the finest granularity is "
        "paired."
    )


def _no_interval(report: Mapping[str, Any]) -> str:
    family, pictures = min(report["rare_families"].items(), key=lambda pair: pair[1])
    what = "the questions are" if report["families"] == [NO_FAMILY] else f"the family '{family}' is"
    return (
        f"No intervals are given: {what} on {pictures} picture{'s' if pictures > 1 else ''}, and drawing from fewer than "
        f"{FEWEST_PICTURES} says little about others."
    )


def _timing_notes(report: Mapping[str, Any]) -> list[str]:
    where = f"{report['device']}, {report['dtype']}, {report['threads']} thread(s), PyTorch {torch.__version__.split('+')[0]}"
    timing = report["timing"]
    asked, answers = len(timing["questions"]), timing["answers"]
    watched = min(MEMORY_QUESTIONS, asked)
    means = {"cuda": "by the allocator of the GPU", "cpu": "by a profiler that sees every allocation of a tensor"}
    peak = means.get(report["device"].split(":")[0], "not known on this device")
    return [
        f"Times are of single requests on {where}: {asked} questions spread over the families, after a warm-up; on each "
        f"question all rows take turns, {timing['repeats']} times; the row that begins moves on by one from question to question and "
        "from time to time. Of a question's repetitions the one of median time counts, with all its parts; table and bars show means over "
        "questions. Random and oracle are computed from the fixed rows and have no router in them.",
        "TTFT is the time up to the first token, preparing the picture included. Tokens per second are new tokens over the whole time of "
        "the answers; short answers are mostly prefill.",
        f"Peak is the most tensor memory held at one moment of a request above the loaded weights, {peak}; mean over {watched} of "
        "these questions. KV is the size of the keys and values at the end of the answer, computed from the shapes.",
        f"{answers - timing['differing']} of {answers} timed answers equal those of the batches that accuracy is computed from.",
    ]


def markdown(report: Mapping[str, Any]) -> str:
    """The table and the choices, for a terminal or a page of documentation."""
    first, *others = heads(report)
    head = [
        "choice", f"{first} [95 %]", *others, "saved", "TTFT, ms", "total, ms", "tokens/s", "router", "peak, MiB", "KV, MiB",
    ]  # fmt: skip
    lines = [[
        row["name"],
        percent(row["accuracy"]) + ("" if row["interval"] is None else f" [{row['interval'][0]:.1f}, {row['interval'][1]:.1f}]"),
        *([percent(row["over_questions"])] if grouped(report) else []),
        f"{row['tokens']:.0f}", f"{row['saved']:.0f} %", *_cost_cells(row["cost"]),
    ] for row in report["rows"]]  # fmt: skip
    text = f"{report['answered']} of {report['asked']} questions of {report['task']}, model {report['model']}\n\n"
    text += _aligned([head, *lines])
    if report["rare_families"]:
        text += f"\n{_no_interval(report)}\n"
    empty = empty_answers(report)
    if empty is not None:
        text += f"\n{empty}\n"
    gap = report["oracle_gap"]
    if gap is not None:
        adaptive = _of_kind(report["rows"], "adaptive")
        text += f"\nOracle gap: {gap['accuracy']:.1f} points, {max(gap['tokens'], 0):.0f} visual tokens.\n\n"
        shares = [[family, *(f"{share:.0f}" for share in shares)] for family, shares in adaptive["choices"].items()]
        everywhere = [f"{statistics.mean(column):.0f}" for column in zip(*adaptive["choices"].values(), strict=True)]
        text += "Chosen by the router, in percent of each family's questions, by tokens per view:\n\n"
        text += _aligned([["family", *map(str, report["granularities"])], *shares, ["mean", *everywhere]])
    elif report["no_router"] is not None:
        text += f"\n{report['no_router']}\n"
    if report.get("baseline") is not None:
        text += f"\n{baseline_text(report)}\n\n"
        text += _aligned([list(BASELINE_HEADS), *map(baseline_cells, report["baseline"]["rows"])])
    return text


def _cost_cells(cost: Mapping[str, Any] | None) -> list[str]:
    if cost is None:
        return [""] * 6
    peak = "" if cost["peak_mib"] is None else f"{cost['peak_mib']:.2f}"
    return [
        f"{cost['ttft_ms']:.1f}", f"{cost['total_ms']:.1f}", f"{cost['tokens_per_second']:.0f}", f"{cost['router_share']:.1f} %", peak,
        f"{cost['kv_mib']:.2f}",
    ]  # fmt: skip


def _aligned(cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up."""
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells]
    return "\n".join([lines[0], "| " + " | ".join("-" * width for width in widths) + " |", *lines[1:]]) + "\n"
