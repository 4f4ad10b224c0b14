"""What adaptivity buys on a set of questions: accuracy and cost of every way of choosing a granularity, as a table, JSON and a page.

    python -m llava.eval.granularity_report --task playground --output report
    python -m llava.eval.granularity_report --model-path DIR --questions mine.jsonl --image-folder pictures --output report

Every question is answered once per granularity; the rows of the table (fixed granularities, chance at the cost of the router, the
router alone and under biases and budgets, the cheapest correct) follow from these answers and the router's logits. Times and memory are
measured by single requests on a sample of the questions.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from llava.eval.model_vqa import describe_model
from llava.eval.report.answers import Crash, Encoder, Record, ask_all, load_picture
from llava.eval.report.measure import MEMORY_QUESTIONS, Measurements, balanced_sample, measure, mixed, summarise
from llava.eval.report.outcomes import FEWEST_PICTURES, RESAMPLES, Outcomes
from llava.eval.report.page import write_page
from llava.eval.report.tasks import NO_FAMILY, TASKS, Item, Task, open_task, read_questions
from llava.inference import Assistant, micro_model_path
from llava.model.routing import RoutingReport, RoutingRequest
from llava.utils import setup_logging
from llava.visualize import CAPTION, MARGIN, PANEL, draw_granularity

logger = logging.getLogger(__name__)

DEFAULT_BIASES = (-1.0, -0.5, 0.5, 1.0)
NO_ROUTER = "This model has no router: the adaptive rows, chance at their cost and the biases are left out."


@dataclass(frozen=True)
class Way:
    """One row to be: a name, its kind, what it asks of the model (`None` where no single request does it), and its weights (Q, G)."""

    name: str
    kind: str
    request: RoutingRequest | None
    weights: np.ndarray


@dataclass(frozen=True)
class Failures:
    """What went wrong on the way: questions without an answer, and parts of the report that could not be made."""

    crashes: list[Crash]
    parts: list[str]

    def sentence(self, asked: int) -> str | None:
        """One sentence for the end of the run, or `None`."""
        said = []
        if self.crashes:
            first = self.crashes[0]
            said.append(
                f"{len(self.crashes)} of {asked} questions crashed and are in no figure; the first, {first.question_id} ({first.image}): "
                f"{first.reason}"
            )
        return "; ".join([*said, *self.parts]) or None


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(prog="python -m llava.eval.granularity_report", description=str(__doc__).split("\n")[0])
    add = parser.add_argument
    add("--model-path", "--model_path", help="checkpoint folder or hub id; the shipped micro model when missing")
    add("--model-base", "--model_base", help="what a projector-only or adapter folder belongs to")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--task", help=f"questions that are on this machine: {', '.join(TASKS)}")
    source.add_argument("--questions", type=Path, help="JSONL with question_id, image, text, answer and optionally family")
    add("--image-folder", "--image_folder", type=Path, help="what picture names are relative to; the folder of --questions when missing")
    add("--output", type=Path, required=True, help="folder for report.json, report.md, report.html and answers.jsonl")
    add("--limit", type=_positive, help="take the first N questions only")
    answers_help = "answers.jsonl of an earlier report on this model and these questions, as long and as fine: only times are measured anew"
    add("--answers", type=Path, help=answers_help)
    add("--granularities", type=_numbers(int), help="compare these tokens per view only, as in 36,144,576; all of the model when missing")
    add("--biases", type=_numbers(float), help="rows of the router with these biases, as in --biases=-0.5,0.5")
    add("--budgets", type=_numbers(int), help="rows of the router within these visual tokens, as in 48,96")
    add("--batch-size", "--batch_size", type=_positive, default=80, help="questions at a time (default: 80)")
    add("--max-new-tokens", "--max_new_tokens", type=_positive, default=16, help="length of an answer at most (default: 16)")
    add("--timing-samples", type=_count, default=40, help="questions that times are measured on (default: 40; 0: none)")
    add("--timing-repeats", type=_positive, default=3, help="requests per question and row, the one of median time counts (default: 3)")
    add("--examples", type=_count, default=12, help="pictures on the page (default: 12)")
    add("--seed", type=int, default=0, help="of the sample and of the intervals (default: 0)")
    add("--threads", type=_positive, help="CPU threads; PyTorch's choice when missing")
    add("--device", help="cuda, mps or cpu; the best that is there when missing")
    return parser


def _numbers(kind: type) -> Any:
    def read(text: str) -> list[Any]:
        try:
            return [kind(part) for part in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not a comma-separated list of numbers") from error

    return read


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 1 with one sentence on standard error where something failed or crashed."""
    args = build_parser().parse_args(argv)
    setup_logging()
    try:
        failure = run(args)
    except (ValueError, OSError) as error:
        failure = str(error)
    if failure is not None:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    return 0


def run(args: argparse.Namespace) -> str | None:
    """Make the report.

    Returns:
        What crashed, in one sentence, or `None`.

    Raises:
        ValueError: a task, model or wish that cannot work, or no answer at all. OSError: a model or a folder that cannot be read.
    """
    if args.task and args.image_folder:
        raise ValueError("--image-folder belongs to --questions; a task knows where its pictures are.")
    task = open_task(args.task) if args.task else read_questions(args.questions, args.image_folder)
    if args.limit:
        task = replace(task, items=task.items[: args.limit])
    if args.threads:
        torch.set_num_threads(args.threads)
    assistant = Assistant.load(args.model_path, args.model_base, device=args.device)
    assistant.model.get_vision_tower()
    names = _levels(assistant, args.granularities)
    wishes = _wishes(assistant, args)
    _check_wishes(assistant, task, wishes)
    args.output.mkdir(parents=True, exist_ok=True)
    origin = _origin(names, args)
    records, crashes = _answers(assistant, task, names, origin, args)
    if not records:
        raise ValueError(f"Not one of {len(task.items)} questions could be answered; the first: {crashes[0].reason}")
    _write_answers(args.output / "answers.jsonl", origin, records)
    failures = Failures(crashes, [])
    report, chosen = make_report(assistant, task, records, names, wishes, failures, args)
    pictures = [_drawing(assistant, task, record, names, level) for record, level in chosen]
    (args.output / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False), encoding="utf-8")
    (args.output / "report.html").write_text(write_page(report, pictures), encoding="utf-8")
    table = markdown(report)
    (args.output / "report.md").write_text(table, encoding="utf-8")
    print(table)
    return failures.sentence(len(task.items))


# ---- what is asked for ------------------------------------------------------------------------------------------------------------


def _levels(assistant: Assistant, wanted: Sequence[int] | None) -> list[int]:
    names = [level.tokens for level in assistant.model.levels]
    unknown = [name for name in wanted or [] if name not in names]
    if unknown:
        raise ValueError(f"--granularities has {unknown}, but this model has {names} tokens per view; choose from these.")
    return [name for name in names if wanted is None or name in wanted]


def _has_router(assistant: Assistant) -> bool:
    return assistant.model.model.router is not None


def _wishes(assistant: Assistant, args: argparse.Namespace) -> dict[str, tuple[str, RoutingRequest]]:
    """The rows that a single request can do besides the fixed ones: name -> (kind, request)."""
    limited = args.granularities
    wishes: dict[str, tuple[str, RoutingRequest]] = {}
    if _has_router(assistant):
        wishes["adaptive"] = ("adaptive", RoutingRequest(limited))
    biases = args.biases if args.biases is not None else DEFAULT_BIASES if _has_router(assistant) else ()
    for bias in biases:
        wishes[f"adaptive, bias {bias:+g}"] = ("bias", RoutingRequest(limited, bias=bias))
    for budget in args.budgets or ():
        name = f"adaptive, at most {budget}" if _has_router(assistant) else f"finest within {budget}"
        wishes[name] = ("budget", RoutingRequest(limited, max_visual_tokens=budget))
    return wishes


def _check_wishes(assistant: Assistant, task: Task, wishes: Mapping[str, tuple[str, RoutingRequest]]) -> None:
    """Let a wish that cannot be met fail on the first question that can be prepared, before every question is asked."""
    encoder = Encoder(assistant, task.folder)
    for item in task.items:
        try:
            first = encoder([item])
        except (ValueError, OSError):
            continue  # counted as a crash when it is asked
        for _, request in wishes.values():
            assistant.model.plan(first.rows, [len(features) for features in first.features], first.sizes, request, first.merge_type)
        return


def _origin(names: Sequence[int], args: argparse.Namespace) -> dict[str, Any]:
    """What answers depend on besides their questions; the first line of answers.jsonl."""
    return {
        "model": describe_model(args.model_path or micro_model_path()),
        "model base": None if args.model_base is None else describe_model(args.model_base),
        "granularities": list(names),
        "max new tokens": args.max_new_tokens,
    }


def _answers(
    assistant: Assistant, task: Task, names: Sequence[int], origin: Mapping[str, Any], args: argparse.Namespace
) -> tuple[list[Record], list[Crash]]:
    """Every question at every granularity: asked, or read from an earlier report."""

    def ask(items: Sequence[Item]) -> tuple[list[Record], list[Crash]]:
        records, crashes = ask_all(assistant, items, task.folder, names, args.max_new_tokens, args.batch_size)
        return [_limited(assistant, record, names) for record in records], crashes

    return ask(task.items) if args.answers is None else _earlier(args.answers, task, origin, ask)


def _earlier(
    path: Path, task: Task, origin: Mapping[str, Any], ask: Callable[[Sequence[Item]], tuple[list[Record], list[Crash]]]
) -> tuple[list[Record], list[Crash]]:
    """Records of an earlier report; questions that it lacks are asked now, and its first question again, in case pictures or code differ.

    Raises:
        ValueError: no such file, or answers that were made in another way; the sentence names what differs.
    """
    if not path.is_file():
        raise ValueError(f"There is no file {path}; --answers takes the answers.jsonl of an earlier report.")
    first, *lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] or [{}]
    before = first.get("made with", {})
    changed = [f"{name} was {before.get(name)!r}, is {now!r}" for name, now in origin.items() if before.get(name) != now]
    if changed:
        raise ValueError(f"The answers in {path} were made in another way: {'; '.join(changed)}; ask for the same, or leave --answers out.")
    found = {(line["question_id"], line["image"], line["text"], line["answer"], line["family"]): Record(**line) for line in lines}
    keys = [(item.question_id, item.image, item.text, item.answer, item.family) for item in task.items]
    known = [item for item, key in zip(task.items, keys, strict=True) if key in found]
    kept = [found[key] for key in keys if key in found]
    again = ask(known[:1])[0]
    if not again or again[0].said != kept[0].said or not _alike(again[0].logits, kept[0].logits):
        raise ValueError(f"The answers in {path} are of other questions, pictures or another model; leave --answers out.")
    records, crashes = ask([item for item, key in zip(task.items, keys, strict=True) if key not in found])
    return [*kept, *records], crashes


def _alike(first: Sequence[float] | None, second: Sequence[float] | None) -> bool:
    """Whether two routers said the same, apart from rounding."""
    if first is None or second is None:
        return first is second
    return bool(np.allclose(first, second, atol=1e-2))


def _limited(assistant: Assistant, record: Record, names: Sequence[int]) -> Record:
    """A record whose logits are those of the compared levels."""
    if record.logits is None:
        return record
    own = [level.tokens for level in assistant.model.levels]
    return replace(record, logits=[record.logits[own.index(name)] for name in names])


def ways_of_choosing(
    outcomes: Outcomes,
    records: Sequence[Record],
    names: Sequence[int],
    wishes: Mapping[str, tuple[str, RoutingRequest]],
    failures: Failures,
) -> list[Way]:
    """All rows, in the order of the table."""
    ways = [Way(f"fixed {name}", "fixed", RoutingRequest(name), outcomes.fixed(level)) for level, name in enumerate(names)]
    logits = [record.logits for record in records]
    for name, (kind, request) in wishes.items():
        try:
            weights = outcomes.wished(logits, names, request)
        except ValueError as error:
            failures.parts.append(f"the row '{name}' is left out: {error}")
            continue
        if kind == "adaptive":
            ways.append(Way("random at that cost", "random", None, outcomes.random_at(outcomes.mean_tokens(weights))))
        ways.append(Way(name, kind, request, weights))
    return [*ways, Way("oracle", "oracle", None, outcomes.cheapest_right())]


# ---- the report -------------------------------------------------------------------------------------------------------------------


def make_report(
    assistant: Assistant,
    task: Task,
    records: Sequence[Record],
    names: Sequence[int],
    wishes: Mapping[str, tuple[str, RoutingRequest]],
    failures: Failures,
    args: argparse.Namespace,
) -> tuple[dict[str, Any], list[tuple[Record, int]]]:
    """Everything the JSON file and the page say, and the examples as (record, level taken)."""
    outcomes = Outcomes(records)
    ways = ways_of_choosing(outcomes, records, names, wishes, failures)
    measured = _measured(assistant, task, records, ways, failures, args)
    finest = outcomes.resampled(outcomes.fixed(len(names) - 1), args.seed)
    rows = [_row(outcomes, way, finest, args.seed) | {"cost": _cost(way, ways, measured, records)} for way in ways]
    taken = next((way for way in ways if way.kind == "adaptive"), ways[len(names) - 1])
    chosen = pick_examples(records, taken.weights.argmax(1), args.examples)
    report: dict[str, Any] = {
        "task": task.name,
        "model": args.model_path or "avg-llava-micro",
        "asked": len(task.items),
        "answered": len(records),
        "crashes": [asdict(crash) for crash in failures.crashes],
        "left_out": list(failures.parts),
        "pictures": len({record.image for record in records}),
        "families": outcomes.families,
        "rare_families": outcomes.rare_families,
        "granularities": list(names),
        "device": str(assistant.model.device),
        "dtype": str(assistant.model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "seed": args.seed,
        "rows": rows,
        "oracle_gap": _oracle_gap(rows),
        "timing": _timing(measured, args),
        "no_router": NO_ROUTER,
        "examples": [_example(record, names, level) for record, level in chosen],
    }
    report["lead"] = "Every question asked at every granularity: what the answers are worth, and what they cost."
    report["facts"] = [
        f"model {report['model']}", f"task {task.name}", f"{len(records)} questions on {report['pictures']} pictures",
        f"{report['device']}, {report['dtype']}, {report['threads']} thread{'s' if report['threads'] > 1 else ''}",
    ]  # fmt: skip
    report["cards"] = _cards(rows)
    report["notes"] = _notes(report, measured, args)
    return report, chosen


def _row(outcomes: Outcomes, way: Way, finest: np.ndarray, seed: int) -> dict[str, Any]:
    row = outcomes.row(way.weights)
    resampled = outcomes.resampled(way.weights, seed)
    last = outcomes.row(outcomes.fixed(outcomes.levels - 1))
    return {
        "name": way.name,
        "kind": way.kind,
        "interval": outcomes.interval(resampled),
        "difference": row["accuracy"] - last["accuracy"],
        "difference_interval": outcomes.interval(resampled - finest),
        **row,
    }


def _measured(
    assistant: Assistant, task: Task, records: Sequence[Record], ways: Sequence[Way], failures: Failures, args: argparse.Namespace
) -> Measurements | None:
    if args.timing_samples == 0:
        return None
    sample = balanced_sample(records, args.timing_samples, args.seed)
    places = _places(records, sample)
    asked = {way.name: way.request for way in ways if way.request is not None}
    expected = {
        way.name: [records[place].said[int(way.weights[place].argmax())] for place in places] for way in ways if way.request is not None
    }
    try:
        return measure(assistant, sample, task.folder, asked, expected, args.max_new_tokens, args.timing_repeats)
    except Exception as error:  # the answers are worth keeping; the failure is named and ends the run with an error
        logger.exception("timing failed")
        failures.parts.append(f"times were not measured: {type(error).__name__}: {error}")
        return None


def _places(records: Sequence[Record], sample: Sequence[Record]) -> list[int]:
    where = {id(record): place for place, record in enumerate(records)}
    return [where[id(record)] for record in sample]


def _cost(way: Way, ways: Sequence[Way], measured: Measurements | None, records: Sequence[Record]) -> dict[str, Any] | None:
    if measured is None:
        return None
    if way.request is not None:
        return summarise(measured.costs[way.name])
    fixed = [measured.costs[each.name] for each in ways if each.kind == "fixed"]
    return summarise(mixed(fixed, way.weights[_places(records, measured.sample)]))


def _oracle_gap(rows: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    adaptive = next((row for row in rows if row["kind"] == "adaptive"), None)
    if adaptive is None:
        return None
    oracle = next(row for row in rows if row["kind"] == "oracle")
    return {"accuracy": oracle["accuracy"] - adaptive["accuracy"], "tokens": adaptive["tokens"] - oracle["tokens"]}


def _timing(measured: Measurements | None, args: argparse.Namespace) -> dict[str, Any] | None:
    if measured is None:
        return None
    text = (
        f"Mean over {len(measured.sample)} questions of single requests, {args.timing_repeats} each, all rows in turns. "
        "Random and oracle are computed from the fixed rows."
    )
    return {
        "questions": [record.question_id for record in measured.sample],
        "repeats": args.timing_repeats,
        "answers": measured.answers,
        "differing": measured.differing,
        "text": text,
    }


def pick_examples(records: Sequence[Record], taken: Sequence[int] | np.ndarray, count: int) -> list[tuple[Record, int]]:
    """Telling questions, one of each family in turn: first where the level mattered and the choice was right, then other right ones,
    then one in six where the choice was wrong."""
    pairs = [(record, int(level)) for record, level in zip(records, taken, strict=True)]
    right = [(record, level) for record, level in pairs if record.right[level]]
    wrong = [(record, level) for record, level in pairs if not record.right[level]]
    right.sort(key=lambda pair: all(pair[0].right))
    wrong.sort(key=lambda pair: not any(pair[0].right))
    bad = list(islice(_one_of_each(wrong), max(1, count // 6) if count else 0))
    return [*islice(_one_of_each(right), count - len(bad)), *bad]


def _one_of_each(pairs: Sequence[tuple[Record, int]]) -> Iterator[tuple[Record, int]]:
    """The first of each family, then the next of each, and so on; every picture once."""
    groups: dict[str, list[tuple[Record, int]]] = {}
    for record, level in pairs:
        groups.setdefault(record.family, []).append((record, level))
    seen: set[str] = set()
    while groups:
        for family, group in list(groups.items()):
            fresh = next((place for place, (record, _) in enumerate(group) if record.image not in seen), None)
            if fresh is None:
                del groups[family]
                continue
            seen.add(group[fresh][0].image)
            yield group.pop(fresh)


def _example(record: Record, names: Sequence[int], level: int) -> dict[str, Any]:
    tries = [
        {"granularity": name, "said": said, "right": right}
        for name, said, right in zip(names, record.said, record.right, strict=True)
    ]
    return {
        "question_id": record.question_id, "image": record.image, "family": record.family, "text": record.text, "answer": record.answer,
        "granularity": names[level], "tokens": record.tokens[level], "full_tokens": record.tokens[-1],
        "said": record.said[level], "right": record.right[level], "tries": tries,
    }  # fmt: skip


def _drawing(assistant: Assistant, task: Task, record: Record, names: Sequence[int], level: int) -> Image.Image:
    """The picture with the grid taken, without the sheet's captions, which the page writes itself."""
    report = RoutingReport(None, None, names[level], record.tokens[level], record.tokens[-1], dict(zip(names, record.tokens, strict=True)))
    sheet = draw_granularity([load_picture(task.folder / record.image)], [report], assistant.model.config)
    top = MARGIN // 2 + CAPTION
    return sheet.crop((MARGIN, top, sheet.width - MARGIN, top + PANEL))


# ---- words ------------------------------------------------------------------------------------------------------------------------


def _signed(value: float, interval: Sequence[float] | None) -> str:
    return f"{value:+.1f}" + ("" if interval is None else f" [{interval[0]:+.1f}, {interval[1]:+.1f}]")


def _cards(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    fixed = [row for row in rows if row["kind"] == "fixed"]
    finest, oracle = fixed[-1], next(row for row in rows if row["kind"] == "oracle")
    own = next((row for row in rows if row["kind"] == "adaptive"), None)
    if own is None:
        return [
            {"title": "Accuracy", "value": f"{row['accuracy']:.1f} %", "text": f"{row['name']}, {row['tokens']:.0f} visual tokens"}
            for row in [*fixed, oracle]
        ]
    cards = [
        {
            "title": "Accuracy",
            "value": f"{own['accuracy']:.1f} %",
            "text": f"against {finest['accuracy']:.1f} % at the finest: {_signed(own['difference'], own['difference_interval'])}",
        },
        {
            "title": "Visual tokens",
            "value": f"{own['tokens']:.0f} of {finest['tokens']:.0f}",
            "text": f"{own['saved']:.0f} % saved; chance at that cost reaches {_of_kind(rows, 'random')['accuracy']:.1f} %",
        },
    ]
    if own["cost"] is not None:
        times = own["cost"]["total_ms"], finest["cost"]["total_ms"]
        cards.append(
            {
                "title": "Time per answer",
                "value": f"{times[0]:.1f} ms",
                "text": f"against {times[1]:.1f} ms at the finest: {times[1] / times[0]:.2f} times as fast; the router takes "
                f"{own['cost']['router_share']:.0f} %",
            }
        )
    gap = oracle["accuracy"] - own["accuracy"]
    cards.append(
        {
            "title": "Oracle gap",
            "value": f"{gap:.1f} points",
            "text": f"the cheapest correct granularity of each question: {oracle['accuracy']:.1f} % at {oracle['tokens']:.0f} tokens",
        }
    )
    return cards


def _of_kind(rows: Sequence[Mapping[str, Any]], kind: str) -> Mapping[str, Any]:
    return next(row for row in rows if row["kind"] == kind)


def _notes(report: Mapping[str, Any], measured: Measurements | None, args: argparse.Namespace) -> list[str]:
    """How every number came about."""
    kinds = {row["kind"] for row in report["rows"]}
    grouped = report["families"] != [NO_FAMILY]
    notes = [
        "Right is an answer that equals the expected text, apart from case and surrounding space. Answers are greedy, of at most "
        f"{args.max_new_tokens} tokens."
        + (" Accuracy and visual tokens are means over question families: every family counts the same." if grouped else ""),
        _interval_note(report, args),
        "Visual tokens are what a picture keeps in the prompt, newline tokens included.",
    ]
    if "adaptive" in kinds:
        notes.append(
            "Adaptive is the router's choice. Random at that cost is the expected result of a coin between the two fixed granularities "
            "around the adaptive row's mean cost, weighted so that it costs as much."
        )
    else:
        notes.append(report["no_router"])
    if "bias" in kinds:
        notes.append("A bias is added to the router's logits per doubling of the visual tokens: negative is cheaper.")
    if "budget" in kinds:
        notes.append("A budget is the most visual tokens a question may cost; the best granularity within it is taken.")
    notes.append(
        "The oracle takes the cheapest granularity that answers rightly, and the coarsest where none does; it knows the answer, so it is a "
        "bound."
    )
    if measured is not None:
        notes += _timing_notes(report, measured, args)
    notes += [f"Failed: {part}." for part in report["left_out"]]
    return notes


def _interval_note(report: Mapping[str, Any], args: argparse.Namespace) -> str:
    if report["rare_families"]:
        return _no_interval(report)
    return (
        f"Intervals hold 95 % of {RESAMPLES} resamples of the pictures (bootstrap, seed {args.seed}); pictures are drawn, not questions, "
        "because questions about one picture are not independent. A resample that lacks a family is left out. Where every answer is right "
        "a bootstrap sees no doubt: read such an interval as too narrow. The difference to the finest granularity is paired."
    )


def _no_interval(report: Mapping[str, Any]) -> str:
    family, pictures = min(report["rare_families"].items(), key=lambda pair: pair[1])
    what = "the questions are" if report["families"] == [NO_FAMILY] else f"the family '{family}' is"
    return (
        f"No intervals are given: {what} on {pictures} picture{'s' if pictures > 1 else ''}, and drawing from fewer than "
        f"{FEWEST_PICTURES} says little about others."
    )


def _timing_notes(report: Mapping[str, Any], measured: Measurements, args: argparse.Namespace) -> list[str]:
    where = f"{report['device']}, {report['dtype']}, {report['threads']} thread(s), PyTorch {torch.__version__.split('+')[0]}"
    watched = min(MEMORY_QUESTIONS, len(measured.sample))
    means = {"cuda": "by the allocator of the GPU", "cpu": "by a profiler that sees every allocation of a tensor"}
    peak = means.get(report["device"].split(":")[0], "not known on this device")
    return [
        f"Times are of single requests on {where}: {len(measured.sample)} questions spread over the families, after a warm-up; on each "
        f"question all rows take turns, {args.timing_repeats} times; the row that begins moves on by one from question to question and "
        "from time to time. Of a question's repetitions the one of median time counts, with all its parts; table and bars show means over "
        "questions. Random and oracle are "
        "computed from the fixed rows and have no router in them.",
        "TTFT is the time up to the first token, preparing the picture included. Tokens per second are new tokens over the whole time of "
        "the answers; short answers are mostly prefill.",
        f"Peak is the most tensor memory held at one moment of a request above the loaded weights, {peak}; mean over {watched} of "
        "these questions. KV is the size of the keys and values at the end of the answer, computed from the shapes.",
        f"{measured.answers - measured.differing} of {measured.answers} timed answers equal those of the batches that accuracy is computed "
        "from.",
    ]


def markdown(report: Mapping[str, Any]) -> str:
    """The table and the choices, for a terminal or a page of documentation."""
    head = [
        "choice", "accuracy, % [95 %]", "visual tokens", "saved", "TTFT, ms", "total, ms", "tokens/s", "router", "peak, MiB", "KV, MiB",
    ]  # fmt: skip
    lines = [[
        row["name"],
        f"{row['accuracy']:.1f}" + ("" if row["interval"] is None else f" [{row['interval'][0]:.1f}, {row['interval'][1]:.1f}]"),
        f"{row['tokens']:.0f}", f"{row['saved']:.0f} %", *_cost_cells(row["cost"]),
    ] for row in report["rows"]]  # fmt: skip
    text = f"{report['answered']} of {report['asked']} questions of {report['task']}, model {report['model']}\n\n"
    text += _aligned([head, *lines])
    if report["rare_families"]:
        text += f"\n{_no_interval(report)}\n"
    gap = report["oracle_gap"]
    if gap is not None:
        adaptive = _of_kind(report["rows"], "adaptive")
        text += f"\nOracle gap: {gap['accuracy']:.1f} points, {max(gap['tokens'], 0):.0f} visual tokens.\n\n"
        shares = [[family, *(f"{share:.0f}" for share in shares)] for family, shares in adaptive["choices"].items()]
        everywhere = [f"{statistics.mean(column):.0f}" for column in zip(*adaptive["choices"].values(), strict=True)]
        text += "Chosen by the router, in percent of each family's questions, by tokens per view:\n\n"
        text += _aligned([["family", *map(str, report["granularities"])], *shares, ["mean", *everywhere]])
    else:
        text += f"\n{report['no_router']}\n"
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


def _write_answers(path: Path, origin: Mapping[str, Any], records: Sequence[Record]) -> None:
    """A line that says how the answers were made, so that no copy of the file loses it, then one per question."""
    lines = [{"made with": origin}, *(asdict(record) for record in records)]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
