"""What adaptivity buys on a set of questions: accuracy and cost of every way of choosing a granularity, as a table, JSON and a page.

    python -m llava.eval.granularity_report --task playground --output report
    python -m llava.eval.granularity_report --model-path DIR --questions mine.jsonl --image-folder pictures --output report

Every question is answered once per granularity; the rows of the table (fixed granularities, chance at the cost of the router, the
router alone and under biases and budgets, the cheapest correct) follow from these answers and the router's logits. Times and memory are
measured by single requests on a sample of the questions.

Answers are written to `OUTPUT/answers.parts` as they come: after a kill, Ctrl-C or a full disk the same command goes on where it was. A
finished report is replaced with `--overwrite` alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from llava.durable import write_whole
from llava.eval.checks import check_routing
from llava.eval.journal import Journal
from llava.eval.model_vqa import describe_model
from llava.eval.report import words
from llava.eval.report.answers import Crash, Encoder, Record, answered, ask, ask_all
from llava.eval.report.answers_file import earlier_answers, key_of, write_answers
from llava.eval.report.baseline import REPORT, Baseline, compare, read_baseline, read_report
from llava.eval.report.examples import describe_example, draw_example, pick_examples
from llava.eval.report.measure import Measurements, balanced_sample, measure, mixed, summarise
from llava.eval.report.outcomes import Outcomes
from llava.eval.report.page import write_page
from llava.eval.report.table import csv_of
from llava.eval.report.tasks import TASKS, Item, Task, open_task, read_task
from llava.eval.report.ways import Way, Wishes, check_wishes, ways_of_choosing, wishes_of
from llava.inference import Assistant, micro_model_path
from llava.interrupts import keeping, run_program
from llava.log import setup_logging
from llava.messages import RoutingRequest

logger = logging.getLogger(__name__)

ANSWERS = "answers.jsonl"
PARTS = "answers.parts"
PAGES = ("report.html", "report.md", "report.csv")
"""What is written beside `REPORT`, which is written last and says that a report is finished."""


@dataclass(frozen=True)
class Settings:
    """What is asked for: the flags, read and checked as far as they can be without the model.

    task: the questions. output: the report's folder; overwrite: replace what it holds. model_path: `None` for the shipped model.
    answers: an earlier report's. baseline: an earlier report to compare with.
    granularities: tokens per view to compare, `None` for all. biases: `None` for the usual ones. The rest is as in the flags.
    """

    task: Task
    output: Path
    model_path: str | None
    model_base: str | None
    device: str | None
    answers: Path | None
    baseline: Path | None
    overwrite: bool
    granularities: list[int] | None
    biases: list[float] | None
    budgets: list[int]
    batch_size: int
    max_new_tokens: int
    timing_samples: int
    timing_repeats: int
    examples: int
    seed: int

    @classmethod
    def of(cls, args: argparse.Namespace) -> Settings:
        """Read the questions that the flags name, and take the rest over.

        Raises:
            ValueError: flags that contradict each other, an unknown task, or a question file with mistakes.
        """
        if args.task and args.image_folder:
            raise ValueError("--image-folder belongs to --questions; a task knows where its pictures are.")
        task = open_task(args.task) if args.task else read_task(args.questions, args.image_folder)
        if args.limit:
            task = replace(task, items=task.items[: args.limit])
        taken_over = {field.name: getattr(args, field.name) for field in fields(cls) if field.name not in ("task", "budgets")}
        return cls(task=task, budgets=args.budgets or [], **taken_over)


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
    source.add_argument("--task", help=f"questions that need no download: {', '.join(TASKS)}")
    source.add_argument("--questions", type=Path, help="JSON objects with question_id, image, text, answer and optionally family")
    add("--image-folder", "--image_folder", type=Path, help="what image names are relative to; the folder of --questions when missing")
    add("--output", type=Path, required=True, help="folder for report.json, .md, .html and .csv, and answers.jsonl; a stopped run goes on")
    add("--overwrite", action="store_true", help="replace the report or the other run that the folder of --output holds")
    add("--limit", type=_positive, help="take the first N questions only")
    answers_help = "answers.jsonl of an earlier report on this model and these questions, as long and as fine: only times are measured anew"
    add("--answers", type=Path, help=answers_help)
    add("--baseline", type=Path, help="folder of an earlier report on these questions: paired differences to it, with intervals")
    levels_help = "compare these tokens per view only, as in 36,144,576; all of the model when missing"
    add("--granularities", type=_numbers(_positive), help=levels_help)
    add("--biases", type=_numbers(_finite), help="rows of the router with these biases, as in --biases=-0.5,0.5")
    add("--budgets", type=_numbers(_positive), help="rows of the router within these visual tokens, as in 48,96")
    add("--batch-size", "--batch_size", type=_positive, default=80, help="questions at a time (default: 80)")
    add("--max-new-tokens", "--max_new_tokens", type=_positive, default=16, help="length of an answer at most (default: 16)")
    add("--timing-samples", type=_count, default=40, help="questions that times are measured on (default: 40; 0: none)")
    add("--timing-repeats", type=_positive, default=3, help="requests per question and row, the one of median time counts (default: 3)")
    add("--examples", type=_count, default=12, help="pictures on the page (default: 12)")
    add("--seed", type=int, default=0, help="of the sample and of the intervals (default: 0)")
    add("--threads", type=_positive, help="CPU threads; PyTorch's choice when missing")
    add("--device", help="cuda, mps or cpu; the best that is there when missing")
    return parser


def _numbers(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [kind(part.strip()) for part in text.split(",")]


def _finite(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return number


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 1 with one sentence on standard error where something failed or crashed, or 130 after Ctrl-C."""
    args = build_parser().parse_args(argv)
    setup_logging()
    if args.threads:
        torch.set_num_threads(args.threads)

    def work() -> int:
        try:
            failure = run(Settings.of(args))
        except (ValueError, OSError, ImportError) as error:
            failure = str(error)
        if failure is not None:
            print(f"error: {failure}", file=sys.stderr)
        return 0 if failure is None else 1

    return run_program(work)


def run(settings: Settings) -> str | None:
    """Make the report.

    Returns:
        What crashed, in one sentence, or `None`.

    Raises:
        ValueError: a model or wish that cannot work, a finished report in the way, or no answer at all.
        OSError: a model or a folder that cannot be read, or no room for what is written.
    """
    task, output = settings.task, settings.output
    journal = Journal(output / PARTS)
    check_output(settings, journal)
    baseline = None if settings.baseline is None else read_baseline(settings.baseline, task.items)
    with (
        keeping(lambda: f"the answers to {len(answered(journal))} questions are kept in {output}; the same command goes on"),
        journal.alone(),
    ):
        failures, table = _make(settings, journal, baseline)
        if failures is None:
            journal.remove()
    print(f"{table}\nThe page, this table and all numbers: report.html, report.md, report.csv and report.json in {output}")
    return failures


def _make(settings: Settings, journal: Journal, baseline: Baseline | None) -> tuple[str | None, str]:
    """Ask, measure and write.

    Returns:
        What crashed, in one sentence, or `None`; and the table.
    """
    task = settings.task
    assistant = Assistant.load(settings.model_path, settings.model_base, device=settings.device)
    check_routing(assistant, RoutingRequest())
    assistant.model.get_vision_tower()
    names = _levels(assistant, settings.granularities)
    wishes = wishes_of(_has_router(assistant), settings.granularities, settings.biases, settings.budgets)
    check_wishes(assistant, task, names, wishes)
    records, crashes = _answers(assistant, names, journal, settings)
    if not records:
        raise ValueError(f"Not one of {len(task.items)} questions could be answered; the first: {crashes[0].reason}")
    failures = Failures(crashes, [])
    report, chosen = make_report(assistant, records, names, wishes, baseline, failures, settings)
    pictures = [draw_example(assistant, task.folder, record, names, level) for record, level in chosen]
    return failures.sentence(len(task.items)), write_report(settings.output, report, pictures)


# ---- the folder -------------------------------------------------------------------------------------------------------------------


def is_unfinished(output: Path, journal: Journal) -> bool:
    """Whether a run was stopped here, or left answers or parts out that had failed, so that it may go on."""
    if not (output / REPORT).exists():
        return journal.description.exists()
    report = read_report(output)
    return journal.description.exists() and report is not None and bool(report["crashes"] or report["left_out"])


def check_output(settings: Settings, journal: Journal) -> None:
    """See that nothing that took its time is lost.

    Raises:
        ValueError: the folder holds something else than an unfinished run, and `--overwrite` was not given.
    """
    output = settings.output
    held = [name for name in (REPORT, *PAGES, ANSWERS) if (output / name).exists()]
    if settings.answers is not None and held == [ANSWERS] and settings.answers.resolve() == (output / ANSWERS).resolve():
        held = []
    if held and not is_unfinished(output, journal) and not settings.overwrite:
        raise ValueError(f"{output} holds {held[0]} already; choose another --output, or replace what it holds with --overwrite.")


def write_report(output: Path, report: Mapping[str, Any], pictures: Sequence[Image.Image]) -> str:
    """Write a report's files, the one that says that it is finished last.

    Returns:
        The table as Markdown.

    Raises:
        NoSpaceError: there is no room.
    """
    table = words.markdown(report)
    texts = dict(zip(PAGES, (write_page(report, pictures), table, csv_of(report)), strict=True))
    for name, text in (texts | {REPORT: json.dumps(report, indent=1, ensure_ascii=False)}).items():
        write_whole(output / name, text.encode("utf-8", "backslashreplace"))
    return table


# ---- answers ----------------------------------------------------------------------------------------------------------------------


def _levels(assistant: Assistant, wanted: Sequence[int] | None) -> list[int]:
    names = [level.tokens for level in assistant.model.levels]
    unknown = [name for name in wanted or [] if name not in names]
    if unknown:
        raise ValueError(f"--granularities has {unknown}, but this model has {names} tokens per view; choose from these.")
    return [name for name in names if wanted is None or name in wanted]


def _has_router(assistant: Assistant) -> bool:
    return assistant.model.model.router is not None


def _origin(names: Sequence[int], settings: Settings) -> dict[str, Any]:
    """What answers depend on besides their questions; the first line of answers.jsonl."""
    return {
        "model": describe_model(settings.model_path or micro_model_path()),
        "model base": None if settings.model_base is None else describe_model(settings.model_base),
        "granularities": list(names),
        "max new tokens": settings.max_new_tokens,
    }


def _answers(assistant: Assistant, names: Sequence[int], journal: Journal, settings: Settings) -> tuple[list[Record], list[Crash]]:
    """Every question at every granularity: asked, or read from an earlier report; written to answers.jsonl with that one's other answers.

    Raises:
        ValueError: an earlier report's answers that do not fit, or a folder that belongs to another run. NoSpaceError: there is no room.
    """
    task, output, origin = settings.task, settings.output, _origin(names, settings)
    kept: list[Record] = []
    unused: list[Record] = []
    left = task.items
    if settings.answers is not None:
        encoder = Encoder(assistant, task.folder)
        kept, left, unused = earlier_answers(
            settings.answers, task.items, origin, lambda items: ask(assistant, encoder(items), names, settings.max_new_tokens)
        )
    _begin(journal, {**origin, "questions": _digest(left), "image folder": str(task.folder.resolve())}, settings)
    asked, crashes = ask_all(assistant, left, task.folder, names, settings.max_new_tokens, settings.batch_size, journal)
    found = {key_of(record): record for record in [*kept, *asked]}
    records = [found[key_of(item)] for item in task.items if key_of(item) in found]
    if records:
        write_answers(output / ANSWERS, origin, [*records, *unused])
    return records, crashes


def _digest(items: Sequence[Item]) -> str:
    return hashlib.sha256(json.dumps([asdict(item) for item in items]).encode()).hexdigest()


def _begin(journal: Journal, description: dict[str, Any], settings: Settings) -> None:
    """Go on with a run, or start one in place of what `--overwrite` gives up; questions that failed are asked again."""
    output = settings.output
    if not is_unfinished(output, journal):
        for name in (REPORT, *PAGES):
            (output / name).unlink(missing_ok=True)
        journal.discard()
    journal.begin(description, "Choose another --output, or start anew there with --overwrite.", replace=settings.overwrite)
    journal.withdraw(list(journal.records().values()))


# ---- the report -------------------------------------------------------------------------------------------------------------------


def make_report(
    assistant: Assistant,
    records: Sequence[Record],
    names: Sequence[int],
    wishes: Wishes,
    baseline: Baseline | None,
    failures: Failures,
    settings: Settings,
) -> tuple[dict[str, Any], list[tuple[Record, int]]]:
    """Everything the JSON file and the page say, and the examples as (record, level taken)."""
    task, outcomes = settings.task, Outcomes(records)
    ways, left_out = ways_of_choosing(outcomes, records, names, wishes)
    failures.parts.extend(left_out)
    compared = _compared(records, ways, wishes, baseline, failures, settings.seed)
    measured = _measured(assistant, records, ways, failures, settings)
    finest = outcomes.resampled(outcomes.fixed(len(names) - 1), settings.seed)
    rows = [_row(outcomes, way, finest, settings.seed) | {"cost": _cost(way, ways, measured, records)} for way in ways]
    taken = next((way for way in ways if way.kind == "adaptive"), ways[len(names) - 1])
    chosen = pick_examples(records, taken.weights.argmax(1), settings.examples)
    report: dict[str, Any] = {
        "task": task.name,
        "model": settings.model_path or "avg-llava-micro",
        "asked": len(task.items),
        "answered": len(records),
        "crashes": [asdict(crash) for crash in failures.crashes],
        "left_out": list(failures.parts),
        "empty_answers": sum(not said.strip() for record in records for said in record.said),
        "pictures": len({record.image for record in records}),
        "families": outcomes.families,
        "rare_families": outcomes.rare_families,
        "granularities": list(names),
        "max_new_tokens": settings.max_new_tokens,
        "device": str(assistant.model.device),
        "dtype": str(assistant.model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "seed": settings.seed,
        "rows": rows,
        "oracle_gap": _oracle_gap(rows),
        "baseline": compared,
        "timing": None if measured is None else _timing(measured, settings.timing_repeats),
        "no_router": None if _has_router(assistant) else words.NO_ROUTER,
        "examples": [describe_example(record, names, level) for record, level in chosen],
    }
    said = {"lead": words.LEAD, "facts": words.facts(report), "cards": words.cards(rows), "notes": words.notes(report)}
    return report | said, chosen


def _compared(
    records: Sequence[Record], ways: Sequence[Way], wishes: Wishes, baseline: Baseline | None, failures: Failures, seed: int
) -> dict[str, Any] | None:
    if baseline is None:
        return None
    try:
        return compare(records, ways, wishes, baseline, seed)
    except ValueError as error:
        failures.parts.append(f"the baseline was left out: {error}")
        return None


def _row(outcomes: Outcomes, way: Way, finest: np.ndarray, seed: int) -> dict[str, Any]:
    row = outcomes.row(way.weights)
    resampled = outcomes.resampled(way.weights, seed)
    last = outcomes.row(outcomes.fixed(outcomes.levels - 1))
    return {
        "name": way.name,
        "kind": way.kind,
        "over_questions": outcomes.over_questions(way.weights),
        "interval": outcomes.interval(resampled),
        "difference": row["accuracy"] - last["accuracy"],
        "difference_interval": outcomes.interval(resampled - finest),
        **row,
    }


def _measured(
    assistant: Assistant, records: Sequence[Record], ways: Sequence[Way], failures: Failures, settings: Settings
) -> Measurements | None:
    if settings.timing_samples == 0:
        return None
    sample = balanced_sample(records, settings.timing_samples, settings.seed)
    places = _places(records, sample)
    asked = {way.name: way.request for way in ways if way.request is not None}
    expected = {
        way.name: [records[place].said[int(way.weights[place].argmax())] for place in places] for way in ways if way.request is not None
    }
    try:
        return measure(assistant, sample, settings.task.folder, asked, expected, settings.max_new_tokens, settings.timing_repeats)
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


def _timing(measured: Measurements, repeats: int) -> dict[str, Any]:
    return {
        "questions": [record.question_id for record in measured.sample],
        "repeats": repeats,
        "answers": measured.answers,
        "differing": measured.differing,
        "text": words.timing_text(len(measured.sample), repeats),
    }


if __name__ == "__main__":
    sys.exit(main())
