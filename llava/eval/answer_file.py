"""Answer a file of questions, in LLaVA's file formats; the program is `llava.eval.model_vqa`.

A question is `{"question_id", "image", "text"}`: `image` is a name, a list of names, or missing; other fields are copied to the
answer. The whole file is read and checked before the model is loaded.

Every process of a run (`torchrun`, `accelerate launch`) answers its share and writes it line by line to a part of its own under
`ANSWERS.parts/`; the process that finds all answers there joins the parts in the order of the questions. So no process waits for
another, a killed run resumes where it stopped, and the same command retries what failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import sys
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers.utils import cached_file

from llava.conversation import get_template
from llava.durable import write_whole
from llava.eval.checks import check_questions, check_routing
from llava.eval.journal import Journal, json_lines
from llava.eval.one_by_one import Failure, attempt
from llava.eval.questions import Row, other_fields, read_questions
from llava.flags import ANSWERING, ROUTING, options_of
from llava.images import load_image
from llava.inference import Answer, Assistant, Options, Question, micro_model_path
from llava.interrupts import keeping
from llava.mm_utils import get_model_name_from_path
from llava.utils import pick_device

logger = logging.getLogger(__name__)

OUTPUT_FIELDS = ("prompt", "answer_id", "model_id", "metadata")
WEIGHTS = (".safetensors", ".bin", ".model")


@dataclass(frozen=True)
class Place:
    """Which of a run's processes this one is."""

    rank: int
    world_size: int
    local_rank: int

    @classmethod
    def here(cls) -> Place:
        """As set by `torchrun`, `accelerate launch` or `deepspeed`; a single process without them."""
        return cls(*(int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))))


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


def share(rows: Sequence[Row], parts: int, part: int) -> Sequence[Row]:
    """The `part`-th of `parts` consecutive, nearly equal pieces; together they are all rows in order."""
    return rows[len(rows) * part // parts : len(rows) * (part + 1) // parts]


# ---- what answers depend on


def describe_run(args: argparse.Namespace, options: Options) -> dict[str, Any]:
    """What answers depend on: questions, image folder, model, options and chunk; not batch size, devices or processes."""
    return {
        "questions": hashlib.sha256(args.question_file.read_bytes()).hexdigest(),
        "image folder": str(args.image_folder.resolve()),
        "chunk": f"{args.chunk_idx} of {args.num_chunks}",
        "model": describe_model(args.model_path),
        "model base": None if args.model_base is None else describe_model(args.model_base),
        "quantised": "4 bit" if args.load_4bit else "8 bit" if args.load_8bit else None,
        "options": json.loads(json.dumps(asdict(options))),
    }


RUN_LABELS = {
    "questions": "the SHA-256 of --question-file", "image folder": "--image-folder", "chunk": "the chunk (--chunk-idx of --num-chunks)",
    "model": "--model-path", "model base": "--model-base", "quantised": "quantisation (--load-4bit, --load-8bit)",
    **{f"options.{name}": f"--{name.replace('_', '-')}" for name in ANSWERING},
    **{f"options.routing.{name}": f"--{flag.replace('_', '-').removeprefix('vis-token-')}" for flag, name in ROUTING.items()},
}  # fmt: skip
"""What error messages call the fields of `describe_run`."""


def describe_model(model: str) -> str:
    """A model and its state: the commit of a hub id; names, sizes and times of the weights in a folder.

    Raises:
        ValueError: there is no such folder, and no such model on the hub or in its cache.
    """
    folder = Path(model)
    if not folder.is_dir():
        try:
            config = cached_file(model, "config.json")
        except (OSError, ValueError) as error:
            raise ValueError(f"The model {model!r} is neither a folder nor available from the hub: {error}") from error
        return f"{model}@{Path(str(config)).parent.name}"
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix == ".json":
            digest.update(file.name.encode() + file.read_bytes())
        elif file.suffix in WEIGHTS:
            state = file.stat()
            digest.update(f"{file.name} {state.st_size} {state.st_mtime_ns}".encode())
    return f"{folder.resolve()}@{digest.hexdigest()[:16]}"


# ---- answers


def questions_of(rows: Sequence[Row], image_folder: Path) -> list[Question]:
    """Rows with their images opened, each once.

    Raises:
        ImageError: an image cannot be read.
    """
    images = {name: load_image(image_folder / name) for name in dict.fromkeys(name for row in rows for name in row.images)}
    return [Question([images[name] for name in row.images], row.text) for row in rows]


def answer_rows(assistant: Assistant, rows: Sequence[Row], options: Options, image_folder: Path, model_id: str) -> list[dict[str, Any]]:
    """Answer rows in one batch; where that fails, one by one, so that a bad row fails alone.

    Returns:
        A line of the journal per row.
    """

    def work(some: Sequence[Row]) -> list[dict[str, Any]]:
        answers = assistant.answer_batch(questions_of(some, image_folder), options)
        return [_answered(row, answer, model_id, len(some)) for row, answer in zip(some, answers, strict=True)]

    records, failures = attempt(work, rows)
    return [record or _failed(row, failures[index]) for index, (row, record) in enumerate(zip(rows, records, strict=True))]


def _failed(row: Row, failure: Failure) -> dict[str, Any]:
    """A line of the journal with an error."""
    logger.warning("question %r failed: %s", row.question_id, failure.reason)
    error = {"question_id": row.question_id, "prompt": row.text, "error": failure.reason}
    return {"row": row.index, "error": error, "id": uuid.uuid4().hex}


def _answered(row: Row, answer: Answer, model_id: str, batch_size: int) -> dict[str, Any]:
    """A line of the journal with an answer in LLaVA's format; the milliseconds are those of the whole batch."""
    metadata = {
        "granularity": [report.granularity for report in answer.reports],
        "visual_tokens": sum(report.num_visual_tokens for report in answer.reports),
        "full_visual_tokens": sum(report.full_visual_tokens for report in answer.reports),
        "logits": [None if report.logits is None else [round(value, 5) for value in report.logits.tolist()] for report in answer.reports],
        "milliseconds": {part: round(value, 3) for part, value in answer.milliseconds.items()},
        "batch_size": batch_size,
        "prompt_tokens": answer.prompt_tokens,
        "new_tokens": len(answer.token_ids),
        "finish_reason": answer.finish_reason,
    }
    line = {
        "question_id": row.question_id,
        "prompt": row.text,
        "text": answer.text,
        "answer_id": uuid.uuid5(uuid.NAMESPACE_OID, f"{model_id} {row.index} {answer.text}").hex,
        "model_id": model_id,
        "metadata": metadata,
        **row.extra,
    }
    return {"row": row.index, "answer": line}


def answer_all(args: argparse.Namespace, rows: Sequence[Row], options: Options, journal: Journal, place: Place) -> None:
    """Load the model and answer those questions of this process's share that have no answer yet.

    Raises:
        ValueError: a model that cannot answer with these options. NoSpaceError: there is no room for the answers.
    """
    own = share(rows, place.world_size, place.rank)
    done = journal.records()
    left = [row for row in own if "answer" not in done.get(row.index, {})]
    if not left:
        return
    journal.withdraw([done[row.index] for row in left if row.index in done])
    assistant = _load(args, place)
    check_routing(assistant, options.routing)
    check_questions(assistant, ((row.question_id, partial(_question, row, args.image_folder)) for row in rows), options)
    model_id = get_model_name_from_path(args.model_path)
    name = "questions" if place.world_size == 1 else f"process {place.rank}"
    with tqdm(total=len(own), initial=len(own) - len(left), desc=name, unit="question", position=place.rank) as bar:
        for start in range(0, len(left), args.batch_size):
            batch = left[start : start + args.batch_size]
            journal.add(answer_rows(assistant, batch, options, args.image_folder, model_id))
            bar.update(len(batch))


def _question(row: Row, image_folder: Path) -> Question:
    return questions_of([row], image_folder)[0]


def _load(args: argparse.Namespace, place: Place) -> Assistant:
    device = args.device or pick_device()
    if device == "cuda" and place.world_size > 1:
        device = f"cuda:{place.local_rank}"
    return Assistant.load(args.model_path, args.model_base, load_8bit=args.load_8bit, load_4bit=args.load_4bit, device=device)


def join(rows: Sequence[Row], own: Sequence[Row], journal: Journal, answers_file: Path) -> bool | None:
    """Write answers and errors in the order of the questions, once every question has one of the two.

    Errors are reported once and then withdrawn, so the next run tries their questions again.

    Args:
        own: this process's share, whose outcomes it has written to the journal.

    Returns:
        `None` while other processes are running, else whether all questions were answered.

    Raises:
        OSError: this process's answers are gone, or there is no room for the files.
    """
    records = journal.records()
    missing = [row for row in rows if row.index not in records]
    if any(row in own for row in missing):
        raise OSError(f"{journal.folder} was changed by another program; the same command answers what is missing.")
    if missing:
        logger.info("other processes still have %d of %d questions to answer; the last of them joins the parts", len(missing), len(rows))
        return None
    ordered = [records[row.index] for row in rows]
    answers = [record["answer"] for record in ordered if "answer" in record]
    errors = [record["error"] for record in ordered if "answer" not in record]
    write_whole(answers_file, json_lines(answers), shared=True)
    errors_file = answers_file.with_name(answers_file.name + ".errors.jsonl")
    if errors:
        write_whole(errors_file, json_lines(errors), shared=True)
    else:
        errors_file.unlink(missing_ok=True)
    journal.withdraw(ordered)
    print(summary(answers, len(rows), answers_file))
    if errors:
        print(
            f"error: {len(errors)} of {len(rows)} questions failed and have no answer; {errors_file} says why. "
            "The same command tries them again.",
            file=sys.stderr,
        )
    return not errors


def summary(answers: Sequence[dict[str, Any]], asked: int, file: Path) -> str:
    """One line: the number of answers, their file, their cost, and how many are empty."""
    text = f"{len(answers)} of {asked} questions answered: {file}"
    tokens = sum(answer["metadata"]["visual_tokens"] for answer in answers)
    full = sum(answer["metadata"]["full_visual_tokens"] for answer in answers)
    if full:
        text += f"; {tokens / len(answers):.1f} visual tokens per question, {100 * (1 - tokens / full):.1f} % saved"
    empty = sum(not answer["text"].strip() for answer in answers)
    if empty:
        text += f"; {empty} of {len(answers)} answers {'is' if empty == 1 else 'are'} empty"
    return text


def _options(args: argparse.Namespace) -> Options:
    """The options of the flags, checked as far as possible without the model.

    Raises:
        ValueError: flags that cannot work.
    """
    options = options_of(args)
    if args.conv_mode is not None:
        get_template(args.conv_mode)
    if args.batch_size < 1:
        raise ValueError(f"--batch-size is {args.batch_size}, expected 1 or more.")
    if args.batch_size > 1 and args.temperature > 0:
        raise ValueError(
            f"--batch-size is {args.batch_size} and --temperature {args.temperature}, but a sampled answer depends on its batch; use 1."
        )
    if not 0 <= args.chunk_idx < args.num_chunks:
        raise ValueError(f"--chunk-idx is {args.chunk_idx} of --num-chunks {args.num_chunks}, expected 0 to {args.num_chunks - 1}.")
    if args.load_4bit and args.load_8bit:
        raise ValueError("--load-4bit and --load-8bit are both on; choose one.")
    return options


def run(args: argparse.Namespace) -> int:
    """Answer the questions of this process; 0, or 1 if the run is complete and a question failed.

    Raises:
        ValueError: input that cannot work, or an answers file of another run.
    """
    options = _options(args)
    args.model_path = args.model_path or micro_model_path()
    args.image_folder = args.image_folder or args.question_file.parent
    rows = share(read_questions(args.question_file, args.image_folder, handed_on), args.num_chunks, args.chunk_idx)
    folder = args.answers_file.with_name(args.answers_file.name + ".parts")
    if args.answers_file.exists() and not folder.exists():
        raise ValueError(f"{args.answers_file} exists, but not {folder}, which would describe its run; choose another --answers-file.")
    place = Place.here()
    journal = Journal(folder, place.rank)
    with (
        keeping(lambda: f"{_answered_rows(journal)} of {len(rows)} answers are kept in {folder}; the same command resumes"),
        journal.alone(),
    ):
        journal.begin(describe_run(args, options), RUN_LABELS, "Choose another --answers-file, or delete the folder and the answers.")
        answer_all(args, rows, options, journal, place)
        # A process that exits with an error makes its launcher kill the others, so only the last one reports failures.
        return 1 if join(rows, share(rows, place.world_size, place.rank), journal, args.answers_file) is False else 0


def _answered_rows(journal: Journal) -> int:
    return sum("answer" in record for record in journal.records().values())
