"""Ask the shipped micro model coarse and fine questions about one image, and check its answers.

The questions and their right answers are in `samples.json`, beside the images. Exits with 1 when an answer is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llava.flags import Parser
from llava.messages import Options

if TYPE_CHECKING:
    from PIL.Image import Image

    from llava.inference import Assistant

ROOT = Path(__file__).resolve().parents[1]
IMAGE = ROOT / "playground" / "images" / "scene_beige.png"
FAMILIES = ("shape", "digit", "cell", "pole", "number")
"""Two kinds of question that a few tokens answer, and three that need more and more of them."""
LONGEST_ANSWER = 24
HEADING = ("question", "answer", "right?", "granularity", "tokens", "saved", "ms")


@dataclass(frozen=True)
class Question:
    """One row of `samples.json`."""

    family: str
    text: str
    answer: str


def read_questions(image: Path, families: list[str]) -> list[Question]:
    """The questions of these families about an image, from the `samples.json` beside it.

    Raises:
        ValueError: the file has no questions about the image, or none of a family.
    """
    listing = image.parent / "samples.json"
    if not listing.is_file():
        raise ValueError(f"{listing} is missing; it holds the questions about the images beside it.")
    entries = {entry["image"]: entry["questions"] for entry in json.loads(listing.read_text(encoding="utf-8"))}
    if image.name not in entries:
        raise ValueError(f"{listing} has no questions about {image.name}; it has {', '.join(sorted(entries))}.")
    questions = {row["family"]: Question(**row) for row in entries[image.name]}
    unknown = [family for family in families if family not in questions]
    if unknown:
        known = ", ".join(sorted(questions))
        raise ValueError(f"There is no question of family {', '.join(unknown)} about {image.name}; choose from {known}.")
    return [questions[family] for family in families]


def build_parser() -> Parser:
    """The options of the quick start."""
    parser = Parser("python scripts/quickstart.py", __doc__.split("\n")[0], ("--model-path", "--image-file", "--families"))
    parser.add_argument("--model-path", help="checkpoint folder; the shipped micro model when missing")
    parser.add_argument("--image-file", type=Path, default=IMAGE, help="an image of playground/images")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), help="kinds of question to ask")
    return parser


def table(rows: list[tuple[str, ...]], right_aligned: int) -> str:
    """Rows of text in aligned columns, the last `right_aligned` of them flushed right; the first row is the heading."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    first_right = len(widths) - right_aligned
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        padded = [cell.rjust(width) if index >= first_right else cell.ljust(width) for index, (cell, width) in enumerate(cells)]
        lines.append("  ".join(padded).rstrip())
    return "\n".join([lines[0], "-" * max(len(line) for line in lines), *lines[1:]])


def ask(assistant: Assistant, images: list[Image], question: Question) -> tuple[bool, tuple[str, ...]]:
    """Whether the answer is right, and its row of the table."""
    answer = assistant.answer(images, question.text, Options(max_new_tokens=LONGEST_ANSWER))
    report = answer.reports[0]
    right = answer.text.lower() == question.answer.lower()
    saved = 100 * (1 - report.num_visual_tokens / report.full_visual_tokens)
    milliseconds = answer.milliseconds["ttft"] + answer.milliseconds["decode"]
    return right, (
        question.text,
        answer.text,
        "right" if right else f"wrong, it is {question.answer}",
        str(report.granularity),
        f"{report.num_visual_tokens} of {report.full_visual_tokens}",
        f"{saved:.0f} %",
        f"{milliseconds:.0f}",
    )


def run(args: argparse.Namespace) -> bool:
    """Ask, print the table, and return whether every answer was right."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from llava.images import load_images
    from llava.inference import Assistant

    questions = read_questions(args.image_file, args.families)
    start = time.perf_counter()
    disable_progress_bar()
    torch.set_num_threads(1)  # the model is so small that a second thread only waits for the first
    assistant = Assistant.load(args.model_path)
    images = load_images([str(args.image_file)])
    print(f"{args.image_file} ({images[0].width}x{images[0].height}); model loaded in {time.perf_counter() - start:.1f} s\n")
    asked = [ask(assistant, images, question) for question in questions]
    print(table([HEADING, *(row for _, row in asked)], right_aligned=4))
    print("\ngranularity: visual tokens per view, chosen by the router; tokens: what the image cost, of what the finest would cost")
    return all(right for right, _ in asked)


def main(argv: list[str] | None = None) -> int:
    """0 when every answer is right; 1 with one sentence otherwise."""
    args = build_parser().parse_args(argv)
    try:
        if run(args):
            return 0
        print("error: not every answer was right, see the table.", file=sys.stderr)
    except (ValueError, FloatingPointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
