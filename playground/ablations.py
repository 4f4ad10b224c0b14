"""The table of playground/ablations.sh: routers with one thing changed, on the same answers.

    python -m playground.ablations --records records.json --questions test.jsonl --output DIR --router "NAME=CHECKPOINT" ...

A router may know fewer granularities than the records hold; it then chooses among its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llava.eval.report.answers import Record
from llava.inference import Assistant
from playground.evaluate import Results, logits_of, summary

INTERVAL_SEED = 0


def spread(logits: np.ndarray, own: Sequence[int], all_levels: Sequence[int]) -> np.ndarray:
    """(Q, G) logits over all levels from a router that knows only some of them; the others are never the highest."""
    wide = np.full((len(logits), len(all_levels)), -np.inf)
    wide[:, [list(all_levels).index(level) for level in own]] = logits
    return wide


def line(results: Results, weights: np.ndarray, with_summary: bool = True) -> dict[str, Any]:
    """A row of the table: accuracy with its interval, tokens, and how coarse and fine questions were separated."""
    row = results.row(weights)
    extra = summary(results, row) if with_summary else {}
    return {
        "accuracy": row["accuracy"],
        "interval": results.interval(results.resampled(weights, INTERVAL_SEED)),
        "tokens": row["tokens"],
        "saved": row["saved"],
        "above chance": row["accuracy"] - results.interpolated(row["tokens"]),
        "fine": statistics.mean(row["families"][family] for family in ("cell", "pole", "pole_item", "number")),
        "coarse in two coarsest": extra.get("coarse in two coarsest"),
        "choices": [statistics.mean(column) for column in zip(*row["choices"].values(), strict=True)],
    }


def table(results: Results, levels: Sequence[int], routers: dict[str, np.ndarray]) -> dict[str, Any]:
    """Fixed granularities, chance at the cost of the first router, the routers, and the cheapest correct."""
    rows = {f"fixed {name}": line(results, results.fixed(index), False) for index, name in enumerate(levels)}
    own = {name: line(results, results.chosen(logits)) for name, logits in routers.items()}
    first = next(iter(own))
    rows[f"random at the tokens of {first}"] = line(results, results.random_at(own[first]["tokens"]), False)
    return {**rows, **own, "cheapest correct": line(results, results.cheapest_right(), False)}


def markdown(rows: dict[str, Any], levels: Sequence[int]) -> str:
    """The table as a page."""
    head = ["choice", "accuracy [95 %]", "fine families", "visual tokens", "saved", "above chance", *(f"{level}, %" for level in levels)]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for name, row in rows.items():
        interval = "" if row["interval"] is None else f" [{row['interval'][0]:.1f}, {row['interval'][1]:.1f}]"
        cells = [
            name, f"{row['accuracy']:.1f}{interval}", f"{row['fine']:.1f}", f"{row['tokens']:.0f}", f"{row['saved']:.0f} %",
            f"{row['above chance'] + 0.0:.1f}", *(f"{share:.0f}" for share in row["choices"]),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--records", type=Path, required=True, help="what `playground.evaluate answer` wrote")
    parser.add_argument("--questions", type=Path, required=True, help="the question file of the records")
    parser.add_argument("--router", action="append", required=True, help="NAME=CHECKPOINT; the first stands for the whole method")
    parser.add_argument("--output", type=Path, required=True, help="folder for ablations.md and ablations.json")
    args = parser.parse_args()
    results = Results([Record(**record) for record in json.loads(args.records.read_text(encoding="utf-8"))])
    assistants = {name: Assistant.load(path, device="cpu") for name, _, path in (text.partition("=") for text in args.router)}
    own = {name: [level.tokens for level in assistant.model.levels] for name, assistant in assistants.items()}
    levels = max(own.values(), key=len)
    found = logits_of(list(assistants.values()), args.questions)
    routers = {name: spread(logits, own[name], levels) for name, logits in zip(assistants, found, strict=True)}
    rows = table(results, levels, routers)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "ablations.json").write_text(json.dumps({"granularities": levels, "rows": rows}, indent=1), encoding="utf-8")
    (args.output / "ablations.md").write_text(markdown(rows, levels), encoding="utf-8")


if __name__ == "__main__":
    main()
