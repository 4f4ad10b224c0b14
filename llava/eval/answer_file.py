"""Answer a file of questions, in LLaVA's file formats; the program is `llava.eval.model_vqa`.

A question is `{"question_id", "image", "text"}`: `image` is a name, a list of names, or missing; other fields are copied to the
answer. The whole file is checked before the model is loaded. Neither the questions nor the answers are ever in memory together: a file
of millions takes some twenty bytes for each.

Every process of a run (`torchrun`, `accelerate launch`) answers its share and writes it line by line to a part of its own under
`ANSWERS.parts/`; the process that finds all answers there joins the parts in the order of the questions. So no process waits for
another, a killed run resumes where it stopped, and the same command retries what failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llava.durable import write_pieces
from llava.eval.chat_server import Reply
from llava.eval.engines import Engine, Place, choose_engine
from llava.eval.journal import Journal, json_lines
from llava.eval.one_by_one import Failure
from llava.eval.questions import Row, checked_questions, other_fields, questions_between
from llava.flags import ANSWERING, ROUTING, options_of
from llava.interrupts import keeping
from llava.messages import Options

logger = logging.getLogger(__name__)

OUTPUT_FIELDS = ("prompt", "answer_id", "model_id", "metadata")
METADATA = (
    "granularity", "visual_tokens", "full_visual_tokens", "logits", "milliseconds", "batch_size", "prompt_tokens", "new_tokens",
    "finish_reason",
)  # fmt: skip
"""Fields of a `Reply` that an answer's metadata holds."""
RECORDS_AT_ONCE = 1000


# ---- questions


def handed_on(row: dict[str, Any], text: str) -> dict[str, Any]:
    """The fields of an object besides its question, which are copied to the answer.

    Raises:
        ValueError: a field that answers have themselves.
    """
    taken = [name for name in OUTPUT_FIELDS if name in row]
    if taken:
        raise ValueError(f"{', '.join(taken)} would be overwritten by the answer's own; rename it")
    return other_fields(row, text)


def share(rows: range, parts: int, part: int) -> range:
    """The `part`-th of `parts` consecutive, nearly equal pieces; together they are all rows in order."""
    return rows[len(rows) * part // parts : len(rows) * (part + 1) // parts]


# ---- what answers depend on


def describe_run(args: argparse.Namespace, options: Options, model: Mapping[str, Any]) -> dict[str, Any]:
    """What answers depend on: questions, image folder, model, options and chunk; not batch size, devices, processes or addresses."""
    return {
        "questions": _digest(args.question_file),
        "image folder": str(args.image_folder.resolve()),
        "chunk": f"{args.chunk_idx} of {args.num_chunks}",
        **model,
        "options": json.loads(json.dumps(asdict(options))),
    }


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while piece := opened.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


RUN_LABELS = {
    "questions": "the SHA-256 of --question-file", "image folder": "--image-folder", "chunk": "the chunk (--chunk-idx of --num-chunks)",
    "engine": "--engine", "model": "--model-path", "model base": "--model-base", "quantised": "quantisation (--load-4bit, --load-8bit)",
    **{f"options.{name}": f"--{name.replace('_', '-')}" for name in ANSWERING},
    **{f"options.routing.{name}": f"--{flag.replace('_', '-').removeprefix('vis-token-')}" for flag, name in ROUTING.items()},
}  # fmt: skip
"""What error messages call the fields of `describe_run`."""


# ---- answers


def record_of(row: Row, outcome: Reply | Failure, model_id: str) -> dict[str, Any]:
    """A line of the journal: an answer in LLaVA's format, or an error."""
    if isinstance(outcome, Failure):
        logger.warning("question %r failed: %s", row.question_id, outcome.reason)
        error = {"question_id": row.question_id, "prompt": row.text, "error": outcome.reason}
        return {"row": row.index, "error": error, "id": uuid.uuid4().hex}
    line = {
        "question_id": row.question_id,
        "prompt": row.text,
        "text": outcome.text,
        "answer_id": uuid.uuid5(uuid.NAMESPACE_OID, f"{model_id} {row.index} {outcome.text}").hex,
        "model_id": model_id,
        "metadata": {name: getattr(outcome, name) for name in METADATA},
        **row.extra,
    }
    return {"row": row.index, "answer": line}


def answer_all(engine: Engine, questions: Path, chunk: range, journal: Journal, place: Place) -> None:
    """Start the engine and answer those questions of this process's share that have no answer yet.

    Raises:
        ValueError: a model that cannot answer with these options. OSError: the engine is gone, or there is no room for the answers.
    """
    own = share(chunk, place.world_size, place.rank)
    done = journal.outcomes()
    num_left = sum(not done.answered(index) for index in own)
    if not num_left:
        return
    journal.withdraw([done.read(index) for index in own if done.failed(index)])
    name = "questions" if place.world_size == 1 else f"process {place.rank}"
    with closing(engine.start()) as answerer:
        answerer.check(questions_between(questions, chunk, handed_on))
        left = (row for row in questions_between(questions, own, handed_on) if not done.answered(row.index))
        with tqdm(total=len(own), initial=len(own) - num_left, desc=name, unit="question", position=place.rank) as bar:
            for outcomes in answerer.answers(left):
                journal.add([record_of(row, outcome, answerer.model_id) for row, outcome in outcomes])
                bar.update(len(outcomes))


def join(chunk: range, own: range, journal: Journal, answers_file: Path) -> bool | None:
    """Write answers and errors in the order of the questions, once every question has one of the two.

    Errors are reported once and then withdrawn, so the next run tries their questions again.

    Args:
        own: this process's share of the chunk, whose outcomes it has written to the journal.

    Returns:
        `None` while other processes are running, else whether all questions were answered.

    Raises:
        OSError: this process's answers are gone, or there is no room for the files.
    """
    outcomes = journal.outcomes()
    if any(index not in outcomes for index in own):
        raise OSError(f"{journal.folder} was changed by another program; the same command answers what is missing.")
    if missing := sum(index not in outcomes for index in chunk):
        logger.info("other processes still have %d of %d questions to answer; the last of them joins the parts", missing, len(chunk))
        return None
    totals = Totals()
    answers = (totals.counted(outcomes.read(index)["answer"]) for index in chunk if outcomes.answered(index))
    write_pieces(answers_file, _pieces(answers), shared=True)
    errors_file = answers_file.with_name(answers_file.name + ".errors.jsonl")
    failed = [outcomes.read(index) for index in chunk if outcomes.failed(index)]
    if failed:
        write_pieces(errors_file, _pieces(record["error"] for record in failed), shared=True)
    else:
        errors_file.unlink(missing_ok=True)
    journal.withdraw(failed)
    print(f"{totals.answers} of {len(chunk)} questions answered: {answers_file}{totals.costs()}")
    if failed:
        print(
            f"error: {len(failed)} of {len(chunk)} questions failed and have no answer; {errors_file} says why. "
            "The same command tries them again.",
            file=sys.stderr,
        )
    return not failed


def _pieces(records: Iterable[Mapping[str, Any]]) -> Iterator[bytes]:
    """Records as JSONL, as many at a time as make writing cheap."""
    source = iter(records)
    while some := list(islice(source, RECORDS_AT_ONCE)):
        yield json_lines(some)


@dataclass
class Totals:
    """What answers cost together; `full` counts those whose engine says what full granularity would have cost."""

    answers: int = 0
    empty: int = 0
    known: int = 0
    tokens: int = 0
    full: int = 0
    tokens_of_full: int = 0

    def counted(self, answer: dict[str, Any]) -> dict[str, Any]:
        """Count an answer, and hand it on."""
        tokens, full = answer["metadata"]["visual_tokens"], answer["metadata"]["full_visual_tokens"]
        self.answers += 1
        self.empty += not answer["text"].strip()
        if tokens is not None:
            self.known, self.tokens = self.known + 1, self.tokens + tokens
        if tokens is not None and full is not None:
            self.tokens_of_full, self.full = self.tokens_of_full + tokens, self.full + full
        return answer

    def costs(self) -> str:
        """The end of a sentence: visual tokens where they are known, and how many answers are empty."""
        text = f"; {self.tokens / self.known:.1f} visual tokens per question" if self.tokens else ""
        if self.full:
            text += f", {100 * (1 - self.tokens_of_full / self.full):.1f} % saved"
        if self.empty:
            text += f"; {self.empty} of {self.answers} answers {'is' if self.empty == 1 else 'are'} empty"
        return text


def run(args: argparse.Namespace) -> int:
    """Answer the questions of this process; 0, or 1 if the run is complete and a question failed.

    Raises:
        ValueError: input that cannot work, or an answers file of another run. OSError: files or an engine that are not there.
    """
    if args.batch_size is not None and args.batch_size < 1:
        raise ValueError(f"--batch-size is {args.batch_size}, expected 1 or more.")
    if not 0 <= args.chunk_idx < args.num_chunks:
        raise ValueError(f"--chunk-idx is {args.chunk_idx} of --num-chunks {args.num_chunks}, expected 0 to {args.num_chunks - 1}.")
    args.image_folder = args.image_folder or args.question_file.parent
    options, place = options_of(args), Place.here()
    engine = choose_engine(args, options, place)
    num_rows = sum(1 for _ in checked_questions(args.question_file, args.image_folder, handed_on))
    chunk = share(range(num_rows), args.num_chunks, args.chunk_idx)
    folder = args.answers_file.with_name(args.answers_file.name + ".parts")
    if args.answers_file.exists() and not folder.exists():
        raise ValueError(f"{args.answers_file} exists, but not {folder}, which would describe its run; choose another --answers-file.")
    journal = Journal(folder, place.rank)
    with (
        keeping(lambda: f"{_answered_rows(journal)} of {len(chunk)} answers are kept in {folder}; the same command resumes"),
        journal.alone(),
    ):
        description = describe_run(args, options, engine.description())
        journal.begin(description, RUN_LABELS, "Choose another --answers-file, or delete the folder and the answers.")
        answer_all(engine, args.question_file, chunk, journal, place)
        # A process that exits with an error makes its launcher kill the others, so only the last one reports failures.
        return 1 if join(chunk, share(chunk, place.world_size, place.rank), journal, args.answers_file) is False else 0


def _answered_rows(journal: Journal) -> int:
    outcomes = journal.outcomes()
    return sum(map(outcomes.answered, outcomes))
