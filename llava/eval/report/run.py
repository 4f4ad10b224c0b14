"""Makes the report: asks, measures and writes. `llava.eval.granularity_report` is its program.

Every question is answered once per granularity; the rows of the table (fixed granularities, random choice at the router's cost, the
router alone and under biases and budgets, the cheapest correct granularity) follow from these answers and the router's logits. Times and
memory are measured with single requests on a sample of the questions.

Answers are written to `OUTPUT/answers.parts` as they come: after a kill, Ctrl-C or a full disk the same command resumes. A finished report
is replaced with `--overwrite` only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from llava.durable import write_whole
from llava.eval.checks import check_routing
from llava.eval.engines import describe_model
from llava.eval.journal import Journal
from llava.eval.report.answers import Crash, Encoder, Record, answered, ask, ask_all, open_item
from llava.eval.report.answers_file import earlier_answers, key_of, write_answers
from llava.eval.report.baseline import REPORT, Baseline, read_baseline, read_report
from llava.eval.report.contents import Failures, make_report
from llava.eval.report.examples import draw_example
from llava.eval.report.policies import check_policies, fixed_policies, routed_policies
from llava.eval.report.settings import Settings
from llava.eval.report.tables import csv_of, markdown
from llava.eval.report.tasks import Item
from llava.inference import Assistant, Options, micro_model_path
from llava.interrupts import keeping
from llava.messages import RoutingRequest

ANSWERS = "answers.jsonl"
PARTS = "answers.parts"
PAGES = ("report.html", "report.md", "report.csv")
"""What is written beside `REPORT`, which is written last and marks a report as finished."""
ORIGIN_LABELS = {
    "engine": "--engine", "model": "--model-path", "model base": "--model-base", "granularities": "--granularities",
    "max new tokens": "--max-new-tokens",
    "questions": "the digest of the questions", "image folder": "the folder of the images",
}  # fmt: skip
"""What error messages call the fields of `_origin` and of a run's description."""


def run(settings: Settings) -> str | None:
    """Make the report.

    Returns:
        What crashed, in one sentence, or `None`.

    Raises:
        ValueError: a model or policy that cannot work, an existing finished report, or no answer at all.
        OSError: a model or a folder that cannot be read, or no room for what is written. ImportError: matplotlib is missing.
    """
    task, output = settings.task, settings.output
    _page_writer()  # a missing package is better named now than after hours of answers
    journal = Journal(output / PARTS)
    check_output(settings, journal)
    baseline = None if settings.baseline is None else read_baseline(settings.baseline, task.items)
    with (
        keeping(lambda: f"the answers to {len(answered(journal))} questions are kept in {output}; the same command resumes"),
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
    if settings.vllm is None:
        return _made(Assistant.load(settings.model_path, settings.model_base, device=settings.device), settings, journal, baseline)
    from llava.eval.front import ServedAssistant  # with what a client of HTTP needs

    with closing(ServedAssistant.connect(settings.vllm, settings.model_path, device=settings.device)) as assistant:
        check_routing(assistant, RoutingRequest())
        coarsest = _granularities(assistant, settings.granularities)[0]
        options = Options(max_new_tokens=settings.max_new_tokens, routing=RoutingRequest(coarsest))
        assistant.check(((item.question_id, partial(open_item, item, settings.task.folder)) for item in settings.task.items), options)
        return _made(assistant, settings, journal, baseline)


def _made(assistant: Assistant, settings: Settings, journal: Journal, baseline: Baseline | None) -> tuple[str | None, str]:
    task = settings.task
    check_routing(assistant, RoutingRequest())
    assistant.model.get_vision_tower()
    granularities = _granularities(assistant, settings.granularities)
    has_router = assistant.model.model.router is not None
    routed = routed_policies(has_router, settings.granularities, settings.biases, settings.budgets)
    check_policies(assistant, task, [*fixed_policies(granularities), *routed])
    records, crashes = _answers(assistant, granularities, journal, settings)
    if not records:
        raise ValueError(f"None of {len(task.items)} questions could be answered; the first: {crashes[0].reason}")
    failures = Failures(crashes, [])
    report, examples = make_report(assistant, records, granularities, routed, baseline, failures, settings)
    images = [draw_example(assistant, task.folder, record, granularities, level) for record, level in examples]
    return failures.sentence(len(task.items)), write_report(settings.output, report, images)


def _granularities(assistant: Assistant, wanted: Sequence[int] | None) -> list[int]:
    known = [level.tokens for level in assistant.model.levels]
    unknown = [tokens for tokens in wanted or [] if tokens not in known]
    if unknown:
        raise ValueError(f"--granularities has {unknown}, but this model has {known} tokens per view; choose from these.")
    return [tokens for tokens in known if wanted is None or tokens in wanted]


# ---- the folder -------------------------------------------------------------------------------------------------------------------


def is_unfinished(output: Path, journal: Journal) -> bool:
    """Whether a run was stopped here, or left out answers or parts that had failed, so that it may resume."""
    if not (output / REPORT).exists():
        return journal.description.exists()
    report = read_report(output)
    return journal.description.exists() and report is not None and bool(report["crashes"] or report["left_out"])


def check_output(settings: Settings, journal: Journal) -> None:
    """Keep a report that took its time to make from being overwritten by accident.

    Raises:
        ValueError: the folder holds something other than an unfinished run, and `--overwrite` was not given.
    """
    output = settings.output
    held = [name for name in (REPORT, *PAGES, ANSWERS) if (output / name).exists()]
    if settings.answers is not None and held == [ANSWERS] and settings.answers.resolve() == (output / ANSWERS).resolve():
        held = []
    if held and not is_unfinished(output, journal) and not settings.overwrite:
        raise ValueError(f"{output} already holds {held[0]}; choose another --output, or replace what it holds with --overwrite.")


def write_report(output: Path, report: Mapping[str, Any], images: Sequence[Image.Image]) -> str:
    """Write a report's files, the one that marks it as finished last.

    Returns:
        The table as Markdown.

    Raises:
        NoSpaceError: there is no room.
    """
    table = markdown(report)
    files = dict(zip(PAGES, (_page_writer()(report, images), table, csv_of(report)), strict=True))
    for name, text in (files | {REPORT: json.dumps(report, indent=1, ensure_ascii=False)}).items():
        write_whole(output / name, text.encode("utf-8", "backslashreplace"))
    return table


def _page_writer() -> Callable[[Mapping[str, Any], Sequence[Image.Image]], str]:
    """`write_page`, imported where it is used because matplotlib is in an extra.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from llava.eval.report.page import write_page
    except ImportError as error:
        raise ImportError(f'The report\'s page needs {error.name}; install it with pip install -e ".[eval]".') from error
    return write_page


# ---- answers ----------------------------------------------------------------------------------------------------------------------


def _origin(granularities: Sequence[int], settings: Settings) -> dict[str, Any]:
    """What answers depend on besides their questions; the first line of answers.jsonl."""
    return {
        "engine": None if settings.engine == "embedded" else settings.engine,
        "model": describe_model(settings.model_path or micro_model_path()),
        "model base": None if settings.model_base is None else describe_model(settings.model_base),
        "granularities": list(granularities),
        "max new tokens": settings.max_new_tokens,
    }


def _answers(
    assistant: Assistant, granularities: Sequence[int], journal: Journal, settings: Settings
) -> tuple[list[Record], list[Crash]]:
    """Every question at every granularity: asked, or taken from an earlier report; written to answers.jsonl beside that one's others.

    Raises:
        ValueError: an earlier report's answers that do not fit, or a folder that belongs to another run. NoSpaceError: there is no room.
    """
    task, output, origin = settings.task, settings.output, _origin(granularities, settings)
    kept: list[Record] = []
    unused: list[Record] = []
    left = task.items
    if settings.answers is not None:
        encoder = Encoder(assistant, task.folder)
        kept, left, unused = earlier_answers(
            settings.answers,
            task.items,
            origin,
            ORIGIN_LABELS,
            lambda items: ask(assistant, encoder(items), granularities, settings.max_new_tokens),
        )
    _begin(journal, {**origin, "questions": _digest(left), "image folder": str(task.folder.resolve())}, settings)
    asked, crashes = ask_all(assistant, left, task.folder, granularities, settings.max_new_tokens, settings.batch_size, journal)
    found = {key_of(record): record for record in [*kept, *asked]}
    records = [found[key_of(item)] for item in task.items if key_of(item) in found]
    if records:
        write_answers(output / ANSWERS, origin, [*records, *unused])
    return records, crashes


def _digest(items: Sequence[Item]) -> str:
    return hashlib.sha256(json.dumps([asdict(item) for item in items]).encode()).hexdigest()


def _begin(journal: Journal, description: dict[str, Any], settings: Settings) -> None:
    """Resume a run, or start one in place of what `--overwrite` gives up; questions that failed are asked again."""
    output = settings.output
    if not is_unfinished(output, journal):
        for name in (REPORT, *PAGES):
            (output / name).unlink(missing_ok=True)
        journal.discard()
    journal.begin(description, ORIGIN_LABELS, "Choose another --output, or start over there with --overwrite.", replace=settings.overwrite)
    journal.withdraw(list(journal.records().values()))
