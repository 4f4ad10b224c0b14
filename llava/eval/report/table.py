"""The rows of a report as CSV, for spreadsheets and pandas: one line per way of choosing, numbers in full."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping
from typing import Any

Row = Mapping[str, Any]

COLUMNS: dict[str, Callable[[Row], Any]] = {
    "choice": lambda row: row["name"],
    "kind": lambda row: row["kind"],
    "accuracy": lambda row: row["accuracy"],
    "accuracy_low": lambda row: _end(row["interval"], 0),
    "accuracy_high": lambda row: _end(row["interval"], 1),
    "accuracy_over_questions": lambda row: row["over_questions"],
    "difference_to_finest": lambda row: row["difference"],
    "difference_low": lambda row: _end(row["difference_interval"], 0),
    "difference_high": lambda row: _end(row["difference_interval"], 1),
    "visual_tokens": lambda row: row["tokens"],
    "saved": lambda row: row["saved"],
}
COSTS = ("ttft_ms", "total_ms", "tokens_per_second", "router_share", "peak_mib", "kv_mib")
BASELINE: dict[str, Callable[[Row], Any]] = {
    "baseline_accuracy": lambda row: row["baseline_accuracy"],
    "difference_to_baseline": lambda row: row["difference"],
    "difference_to_baseline_low": lambda row: _end(row["difference_interval"], 0),
    "difference_to_baseline_high": lambda row: _end(row["difference_interval"], 1),
    "better_than_baseline": lambda row: row["better"],
    "worse_than_baseline": lambda row: row["worse"],
    "baseline_visual_tokens": lambda row: row["baseline_tokens"],
}


def csv_of(report: Mapping[str, Any]) -> str:
    """The table of a report. Percent, visual tokens, milliseconds and MiB; a cell is empty where there is no number.

    Args:
        report: what is written to report.json.
    """
    baseline = report.get("baseline")
    compared = {row["name"]: row for row in baseline["rows"]} if baseline is not None else {}
    lines = []
    for row in report["rows"]:
        line = {name: read(row) for name, read in COLUMNS.items()}
        line |= {name: (row["cost"] or {}).get(name) for name in COSTS}
        if baseline is not None:
            other = compared.get(row["name"])
            line |= {name: None if other is None else read(other) for name, read in BASELINE.items()}
        lines.append(line | {f"accuracy of {family}": accuracy for family, accuracy in row["families"].items()})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _end(interval: Any, side: int) -> float | None:
    return None if interval is None else interval[side]
