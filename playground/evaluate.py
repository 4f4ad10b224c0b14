"""What adaptivity buys on the micro world: one table, one JSON file and two plots from one pass over a question file.

    python -m playground.evaluate answer --model DIR --questions playground/eval/test.jsonl --output records.json
    python -m playground.evaluate table --records records.json --router name=DIR[,DIR...] --output playground/results

`answer` answers every question at every granularity (the language model is frozen while routers train, so this is done once); a router
then only adds its logits, and every row of the table (fixed levels, random at equal tokens, adaptive, cheapest correct) is computed
from the same answers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from llava.eval.report.answers import Encoder, Record, ask_all, batches, by_image
from llava.eval.report.outcomes import Outcomes
from llava.eval.report.tasks import Item, read_task
from llava.images import load_image
from llava.inference import Assistant, Options
from llava.messages import RoutingRequest
from playground.world import COARSE_FAMILIES, FAMILIES, FINE_FAMILIES

LONGEST_ANSWER = 14
SOLVED_WITHIN = 5.0
"""A level solves a family when its accuracy is at most this many points below the family's best level."""


class Results(Outcomes):
    """Answers about the micro world; see `Outcomes`."""

    def __init__(self, records: Sequence[Record]) -> None:
        super().__init__(records, FAMILIES)

    def solving_levels(self, family: str) -> list[int]:
        """Levels within `SOLVED_WITHIN` points of a family's best."""
        accuracies = [self.accuracy(self.fixed(level))[family] for level in range(self.levels)]
        return [level for level, value in enumerate(accuracies) if value >= max(accuracies) - SOLVED_WITHIN]


def summary(results: Results, row: dict[str, Any]) -> dict[str, float]:
    """How a router compares with the fixed levels, and whether it separates coarse from fine questions."""
    fixed = [results.row(results.fixed(level)) for level in range(results.levels)]
    coarse = [sum(row["choices"][family][:2]) for family in COARSE_FAMILIES]
    fine = [sum(row["choices"][family][level] for level in results.solving_levels(family)) for family in FINE_FAMILIES]
    return {
        "accuracy": row["accuracy"],
        "tokens": row["tokens"],
        "saved": row["saved"],
        "below best fixed": max(level["accuracy"] for level in fixed) - row["accuracy"],
        "above interpolation": row["accuracy"] - results.interpolated(row["tokens"]),
        "coarse in two coarsest": statistics.mean(coarse),
        "fine in solving levels": statistics.mean(fine),
    }


def table(results: Results, routers: dict[str, list[np.ndarray]], level_names: Sequence[int]) -> dict[str, Any]:
    """Every row of the table: fixed levels, cheapest correct, and each router with its seeds."""
    rows = {f"fixed {name}": results.row(results.fixed(level)) for level, name in enumerate(level_names)}
    rows["cheapest correct"] = results.row(results.cheapest_right())
    seeds: dict[str, list[dict[str, float]]] = {}
    for name, logits in routers.items():
        own = [results.row(results.chosen(seed_logits)) for seed_logits in logits]
        seeds[name] = [summary(results, row) for row in own]
        rows[name] = own[0]
    first = next(iter(routers))
    rows[f"random at the tokens of {first}"] = {
        **rows[first], "accuracy": results.interpolated(rows[first]["tokens"]), "families": dict.fromkeys(FAMILIES)
    }  # fmt: skip
    return {"rows": rows, "seeds": seeds, "solving levels": {family: results.solving_levels(family) for family in FAMILIES}}


def markdown(outcome: dict[str, Any], level_names: Sequence[int]) -> str:
    """The table as a page."""
    lines = ["| choice of granularity | visual tokens | saved | mean | " + " | ".join(FAMILIES) + " |"]
    lines.append("| --- " * (len(FAMILIES) + 4) + "|")
    for name, row in outcome["rows"].items():
        families = ["" if value is None else f"{value:.1f}" for value in row["families"].values()]
        lines.append(f"| {name} | {row['tokens']:.0f} | {row['saved']:.0f} % | {row['accuracy']:.1f} | " + " | ".join(families) + " |")
    lines += ["", "Routers, each seed:", "", "| router | seed | " + " | ".join(next(iter(outcome["seeds"].values()))[0]) + " |"]
    lines.append("| --- " * (len(next(iter(outcome["seeds"].values()))[0]) + 2) + "|")
    for name, seeds in outcome["seeds"].items():
        for seed, values in enumerate(seeds):
            lines.append(f"| {name} | {seed} | " + " | ".join(f"{value:.1f}" for value in values.values()) + " |")
    lines += ["", "Share of each granularity (tokens per view) that the first router chose, in percent:", ""]
    lines += ["| family | " + " | ".join(map(str, level_names)) + " |", "| --- " * (len(level_names) + 1) + "|"]
    first = next(iter(outcome["seeds"]))
    for family, share in outcome["rows"][first]["choices"].items():
        lines.append(f"| {family} | " + " | ".join(f"{value:.0f}" for value in share) + " |")
    return "\n".join(lines) + "\n"


def plot(outcome: dict[str, Any], level_names: Sequence[int], folder: Path) -> None:
    """Accuracy against tokens, and what was chosen for each family."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5))
    rows = outcome["rows"]
    fixed = [rows[f"fixed {name}"] for name in level_names]
    left.plot([row["tokens"] for row in fixed], [row["accuracy"] for row in fixed], "o-", color="grey", label="fixed granularity")
    for name, row in rows.items():
        if not name.startswith(("fixed", "random")):
            left.scatter([row["tokens"]], [row["accuracy"]], s=70, label=name, zorder=3)
    left.set(xscale="log", xlabel="visual tokens per question (log)", ylabel="accuracy, mean over families (%)")
    left.set_title("Accuracy against cost")
    left.legend(fontsize=8)
    first = next(iter(outcome["seeds"]))
    shares = np.array([rows[first]["choices"][family] for family in FAMILIES])
    bottom = np.zeros(len(FAMILIES))
    for level, name in enumerate(level_names):
        right.barh(FAMILIES, shares[:, level], left=bottom, label=f"{name}")
        bottom += shares[:, level]
    right.invert_yaxis()
    right.set(xlabel="share of questions (%)", title=f"Tokens per view chosen ({first})")
    right.legend(fontsize=8, ncols=len(level_names), loc="lower center")
    figure.tight_layout()
    figure.savefig(folder / "results.png", dpi=100)


def answer_all(assistant: Assistant, path: Path) -> list[Record]:
    """Greedy answers to every question at every granularity.

    Raises:
        ValueError: a question crashed; the first is named.
    """
    task = read_task(path)
    levels = [level.tokens for level in assistant.model.levels]
    records, crashes = ask_all(assistant, task.items, task.folder, levels, LONGEST_ANSWER)
    if crashes:
        first = crashes[0]
        raise ValueError(f"{len(crashes)} of {len(task.items)} questions crashed; the first, {first.question_id}: {first.reason}")
    return records


@torch.inference_mode()
def router_logits(assistants: Sequence[Assistant], items: Sequence[Item], folder: Path, batch_size: int = 80) -> list[np.ndarray]:
    """(Q, G) logits of several models' routers, in the order of `items`; no answer is generated.

    The models differ in nothing but their routers, so the first one encodes the images for all.

    Raises:
        ValueError: a model without a router, or one whose other weights differ from the first's.
    """
    for assistant in assistants:
        _check_router_alone_differs(assistants[0].model, assistant.model)
    encoder = Encoder(assistants[0], folder)
    rows: list[dict[int, Tensor]] = [{} for _ in assistants]
    for batch in tqdm(list(batches(items, batch_size)), desc="routing", unit="batch"):
        encoded = encoder([items[place] for place in batch])
        features = [image.features for image in encoded.images]
        for own, assistant in zip(rows, assistants, strict=True):
            logits = assistant.model.router_logits(encoded.rows, features).float().cpu()
            own |= dict(zip(batch, logits, strict=True))
    return [torch.stack([own[place] for place in range(len(items))]).numpy() for own in rows]


def _check_router_alone_differs(first: Any, model: Any) -> None:
    if model.model.router is None:
        raise ValueError("A model has no router, so there are no logits to compare.")
    own, other = (
        {name: tensor for name, tensor in each.state_dict().items() if not name.startswith("model.router.")} for each in (first, model)
    )
    different = [name for name in own if name not in other or not torch.equal(own[name], other[name])]
    if different:
        raise ValueError(f"Two models differ in {different[0]}, not only in their routers; compare routers trained on the same model.")


def logits_of(assistants: Sequence[Assistant], path: Path) -> list[np.ndarray]:
    """(Q, G) logits of each model's router for the questions of a file, in the order of `answer_all`."""
    task = read_task(path)
    return router_logits(assistants, task.items, task.folder)


def time_answers(assistant: Assistant, path: Path, count: int = 60) -> dict[str, Any]:
    """End-to-end milliseconds of adaptive and full-granularity answers to the same coarse questions, in alternation on one thread."""
    torch.set_num_threads(1)
    finest = assistant.model.levels[-1].tokens
    asked = [item for item in by_image(read_task(path).items) if item.family in COARSE_FAMILIES][:count]
    spent: dict[str, list[float]] = {"adaptive": [], "full": []}
    for question in tqdm(asked, desc="timing", unit="question"):
        image = load_image(path.parent / question.image)
        for name, granularity in (("adaptive", None), ("full", finest)):
            start = time.perf_counter()
            assistant.answer([image], question.text, Options(max_new_tokens=LONGEST_ANSWER, routing=RoutingRequest(granularity)))
            spent[name].append(1000 * (time.perf_counter() - start))
    median = {name: statistics.median(values) for name, values in spent.items()}
    return {"questions": len(asked), "median ms": median, "speed-up": median["full"] / median["adaptive"]}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("task", choices=("answer", "table", "time"))
    parser.add_argument("--model", help="checkpoint to evaluate or to time")
    parser.add_argument("--questions", type=Path, default=Path("playground/eval/test.jsonl"))
    parser.add_argument("--records", type=Path, help="what `answer` wrote")
    parser.add_argument("--router", action="append", default=[], help="NAME=CHECKPOINT[,CHECKPOINT...], one per seed; the first is plotted")
    parser.add_argument("--output", type=Path, required=True, help="file (answer, time) or folder (table)")
    args = parser.parse_args()
    if args.task == "answer":
        records = answer_all(Assistant.load(args.model, device="cpu"), args.questions)
        args.output.write_text(json.dumps([asdict(record) for record in records]), encoding="utf-8")
        return
    if args.task == "time":
        timing = time_answers(Assistant.load(args.model, device="cpu"), args.questions)
        args.output.write_text(json.dumps(timing, indent=1), encoding="utf-8")
        return
    records = [Record(**record) for record in json.loads(args.records.read_text(encoding="utf-8"))]
    routers, names = {}, []
    for text in args.router:
        name, _, paths = text.partition("=")
        assistants = [Assistant.load(path, device="cpu") for path in paths.split(",")]
        names = [level.tokens for level in assistants[0].model.levels]
        routers[name] = logits_of(assistants, args.questions)
    outcome = table(Results(records), routers, names)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "results.json").write_text(json.dumps(outcome, indent=1), encoding="utf-8")
    (args.output / "results.md").write_text(markdown(outcome, names), encoding="utf-8")
    plot(outcome, names, args.output)


if __name__ == "__main__":
    main()
