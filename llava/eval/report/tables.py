"""The tables of a report: one list of columns each, written as Markdown for a terminal and as CSV for spreadsheets and pandas."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llava.eval.report.texts import baseline_text, empty_answers, grouped, no_intervals, percent, row_of, signed

Row = Mapping[str, Any]
Columns = Mapping[str, Callable[[Row], Any]]
"""What makes a cell of a row, by the column's header."""


def _cost(name: str, form: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        value = (row["cost"] or {}).get(name)
        return "" if value is None else form.format(value)

    return cell


def _accuracy(row: Row) -> str:
    low_high = "" if row["interval"] is None else " [{:.1f}, {:.1f}]".format(*row["interval"])
    return percent(row["accuracy"]) + low_high


def columns(report: Row, against_finest: bool = False) -> Columns:
    """The table of policies. With several families accuracy and tokens are means over them, and the headers say so.

    Args:
        against_finest: with the difference in accuracy to the finest granularity.
    """
    means = ", mean over families" if grouped(report) else ""
    found: dict[str, Callable[[Row], Any]] = {"choice": lambda row: row["name"], f"accuracy{means}, % [95 %]": _accuracy}
    if against_finest:
        found["against finest"] = lambda row: signed(row["difference"])
    if grouped(report):
        found["accuracy over questions, %"] = lambda row: percent(row["over_questions"])
    return found | {
        f"visual tokens{means}": lambda row: f"{row['tokens']:.0f}",
        "saved": lambda row: f"{row['saved']:.0f} %",
        "TTFT, ms": _cost("ttft_ms", "{:.1f}"),
        "total, ms": _cost("total_ms", "{:.1f}"),
        "tokens/s": _cost("tokens_per_second", "{:.0f}"),
        "router": _cost("router_share", "{:.1f} %"),
        "peak, MiB": _cost("peak_mib", "{:.2f}"),
        "KV, MiB": _cost("kv_mib", "{:.2f}"),
    }


def baseline_cells(row: Row) -> list[str]:
    """A row of the table of differences, see `BASELINE_HEADERS`; two of its columns have the same header."""
    return [
        row["name"], percent(row["accuracy"]), percent(row["baseline_accuracy"]), signed(row["difference"], row["difference_interval"]),
        str(row["better"]), str(row["worse"]), f"{row['tokens']:.0f}", f"{row['baseline_tokens']:.0f}",
        signed(row["tokens_difference"], row["tokens_interval"]),
    ]  # fmt: skip


BASELINE_HEADERS = [
    "choice", "accuracy, %", "baseline, %", "difference [95 %]", "better", "worse", "visual tokens", "baseline's", "difference [95 %]",
]  # fmt: skip

Table = list[list[str]]
"""Cells row by row, the headers first."""


def policy_table(report: Row, against_finest: bool = False) -> Table:
    """The policies' accuracy and cost, see `columns`."""
    cells = columns(report, against_finest)
    return [list(cells), *([str(cell(row)) for cell in cells.values()] for row in report["rows"])]


def baseline_table(report: Row) -> Table:
    """The differences to the baseline."""
    return [BASELINE_HEADERS, *map(baseline_cells, report["baseline"]["rows"])]


def family_table(report: Row) -> Table:
    """The policies' accuracy in each family, in percent."""
    families = report["families"]
    return [["choice", *families], *([row["name"], *(percent(row["families"][name]) for name in families)] for row in report["rows"])]


def _choices_table(report: Row, choices: Mapping[str, Sequence[float]]) -> Table:
    """The share of each granularity in each family, in percent."""
    mean = [statistics.mean(column) for column in zip(*choices.values(), strict=True)]
    lines = [[family, *(f"{share:.0f}" for share in shares)] for family, shares in [*choices.items(), ("mean", mean)]]
    return [["family", *map(str, report["granularities"])], *lines]


def markdown(report: Row) -> str:
    """The tables for a terminal or a page of documentation.

    Args:
        report: what is written to report.json.
    """
    text = f"{report['answered']} of {report['asked']} questions of {report['task']}, model {report['model']}\n\n"
    text += _aligned(policy_table(report))
    text += "".join(f"\n{note}\n" for note in (no_intervals(report), empty_answers(report)) if note)
    gap, adaptive = report["oracle_gap"], row_of(report["rows"], "adaptive")
    if adaptive is not None:
        text += f"\nOracle gap: {gap['accuracy']:.1f} points, {max(gap['tokens'], 0):.0f} visual tokens.\n\n"
        text += "Chosen by the router, in percent of each family's questions, by tokens per view:\n\n"
        text += _aligned(_choices_table(report, adaptive["choices"]))
    elif report["no_router"] is not None:
        text += f"\n{report['no_router']}\n"
    if report.get("baseline") is not None:
        text += f"\n{baseline_text(report)}\n\n" + _aligned(baseline_table(report))
    return text


def _aligned(table: Table) -> str:
    """A Markdown table whose columns line up."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    headers, *lines = (" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table)
    return "".join(f"| {line} |\n" for line in (headers, " | ".join("-" * width for width in widths), *lines))


# ---- CSV --------------------------------------------------------------------------------------------------------------------------


def _end(field: str, side: int) -> Callable[[Row], float | None]:
    return lambda row: None if row[field] is None else row[field][side]


CSV_COLUMNS: Columns = {
    "choice": lambda row: row["name"],
    "kind": lambda row: row["kind"],
    "accuracy": lambda row: row["accuracy"],
    "accuracy_low": _end("interval", 0),
    "accuracy_high": _end("interval", 1),
    "accuracy_over_questions": lambda row: row["over_questions"],
    "difference_to_finest": lambda row: row["difference"],
    "difference_low": _end("difference_interval", 0),
    "difference_high": _end("difference_interval", 1),
    "visual_tokens": lambda row: row["tokens"],
    "saved": lambda row: row["saved"],
}
CSV_COSTS = ("ttft_ms", "total_ms", "tokens_per_second", "router_share", "peak_mib", "kv_mib")
CSV_BASELINE: Columns = {
    "baseline_accuracy": lambda row: row["baseline_accuracy"],
    "difference_to_baseline": lambda row: row["difference"],
    "difference_to_baseline_low": _end("difference_interval", 0),
    "difference_to_baseline_high": _end("difference_interval", 1),
    "better_than_baseline": lambda row: row["better"],
    "worse_than_baseline": lambda row: row["worse"],
    "baseline_visual_tokens": lambda row: row["baseline_tokens"],
}


def csv_of(report: Row) -> str:
    """The table of policies, numbers in full: percent, visual tokens, milliseconds and MiB; a cell is empty where there is no number.

    Args:
        report: what is written to report.json.
    """
    baseline = report.get("baseline")
    compared = {row["name"]: row for row in baseline["rows"]} if baseline is not None else {}
    lines = []
    for row in report["rows"]:
        line = {name: cell(row) for name, cell in CSV_COLUMNS.items()}
        line |= {name: (row["cost"] or {}).get(name) for name in CSV_COSTS}
        if baseline is not None:
            other = compared.get(row["name"])
            line |= {name: None if other is None else cell(other) for name, cell in CSV_BASELINE.items()}
        lines.append(line | {f"accuracy of {family}": accuracy for family, accuracy in row["families"].items()})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
