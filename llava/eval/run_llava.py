"""Ask a model about pictures: `eval_model(args)` for LLaVA's callers, `python -m llava.eval.run_llava` for the shell."""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from llava.durable import whole_file
from llava.flags import LOADING, add_flag, add_model_and_options, field_of, options_of
from llava.images import load_images
from llava.inference import Answer, Assistant, cached_assistant
from llava.interrupts import run_program
from llava.model.routing import RoutingReport
from llava.visualize import draw_granularity

SEPARATOR = ","
"""Between the names of several pictures."""
DATA_URL = re.compile(r"data:[^,]*,[\w+/=%-]*", re.IGNORECASE | re.ASCII)
"""One address with its image inside, which always holds a comma."""


def eval_model(args: Any) -> str:
    """Answer one question about one or more pictures, print the answer and return it.

    A second call with the same model reuses it.

    Args:
        args: any object with `query` and `image_file` (paths or http(s) URLs joined by `sep`, a comma); `sep` and
            the fields of `llava.flags.DEFAULTS` may be missing.

    Raises:
        ValueError: input that cannot work.
    """
    answer = _answer(args)
    print(answer.text)
    return answer.text


def _answer(args: Any) -> Answer:
    options = options_of(args)
    return _assistant(args).answer(_images(args), args.query, options)


def _assistant(args: Any) -> Assistant:
    return cached_assistant(**{name: field_of(args, name) for name in LOADING})


def _images(args: Any) -> list[Any]:
    names = getattr(args, "image_file", None)
    return load_images(split_names(names, getattr(args, "sep", SEPARATOR)), allow_remote=True) if names else []


def split_names(text: str, separator: str = SEPARATOR) -> list[str]:
    """The names of images in a text of several; a separator within the name of a file that exists, or within a data URL, is part of it."""
    names: list[str] = []
    parts = text.split(separator)
    while parts:
        count = next((count for count in range(len(parts), 1, -1) if _is_one_name(separator.join(parts[:count]).strip())), 1)
        names.append(separator.join(parts[:count]).strip())
        del parts[:count]
    return names


def _is_one_name(text: str) -> bool:
    return os.path.isfile(text) or DATA_URL.fullmatch(text) is not None


def explain(answer: Answer) -> str:
    """A table of how the answer's cost came about: logits and tokens at each granularity, milliseconds per part."""
    lines = []
    for index, report in enumerate(answer.reports):
        name = f"image {index + 1}: " if len(answer.reports) > 1 else ""
        saved = 100 * (1 - report.num_visual_tokens / report.full_visual_tokens)
        lines.append(
            f"{name}granularity {report.granularity}, {report.num_visual_tokens} visual tokens of {report.full_visual_tokens} "
            f"({saved:.0f} % saved)"
        )
        lines.append(f"  {'tokens per view':>15}  {'visual tokens':>13}  {'logit':>7}  {'probability':>11}")
        for (granularity, tokens), logit, probability in zip(
            report.tokens_per_level.items(), _column(report, report.logits), _column(report, report.probabilities), strict=True
        ):
            mark = "  <- chosen" if granularity == report.granularity else ""
            lines.append(f"  {granularity:>15}  {tokens:>13}  {logit:>7}  {probability:>11}{mark}")
    parts = "  ".join(f"{part} {value:.1f}" for part, value in answer.milliseconds.items())
    lines.append(f"milliseconds: {parts}")
    lines.append(f"prompt positions {answer.prompt_tokens}, new tokens {len(answer.token_ids)}, finished by {answer.finish_reason}")
    return "\n".join(lines)


def _column(report: RoutingReport, values: Tensor | None) -> list[str]:
    """A value per level, or dashes where no router was asked."""
    return ["-"] * len(report.tokens_per_level) if values is None else [f"{value:.3f}" for value in values.tolist()]


def build_parser() -> argparse.ArgumentParser:
    """The command line's flags: LLaVA's names, with dashes or underscores."""
    parser = argparse.ArgumentParser(prog="python -m llava.eval.run_llava", description="Ask a model about one or more pictures.")
    add_model_and_options(parser)
    add_flag(parser, "image_file", help="path or URL of the image; several are joined by --sep")
    parser.add_argument("--query", required=True, help="the question; <image> marks where a picture goes")
    add_flag(parser, "sep", default=SEPARATOR, help="what separates several pictures (default: %(default)s)")
    parser.add_argument("--stream", action="store_true", help="print the answer as it is written")
    parser.add_argument("--explain", action="store_true", help="print logits, tokens at each granularity and milliseconds per part")
    parser.add_argument("--explain-image", metavar="OUT.png", help="draw views and the chosen token grid over the picture")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0, or 1 with one sentence on standard error, or 130 after Ctrl-C."""
    args = build_parser().parse_args(argv)

    def work() -> int:
        try:
            _run(args)
        except (ValueError, FloatingPointError, OSError, ImportError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        return 0

    return run_program(work)


def _run(args: argparse.Namespace) -> None:
    if not args.query.strip():
        raise ValueError("--query is empty, as an unset variable of the shell makes it; give a question.")
    if args.explain_image and not args.image_file:
        raise ValueError("--explain-image needs a picture to draw on; give --image-file.")
    if args.explain_image and Path(args.explain_image).suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"--explain-image is {args.explain_image!r}, expected a file name ending in .png, .jpg or .webp.")
    options, images = options_of(args), _images(args)
    assistant = _assistant(args)
    if args.stream:
        stream = assistant.stream(images, args.query, options)
        for piece in stream:
            print(piece, end="", flush=True)
        print()
        answer = stream.answer
    else:
        answer = assistant.answer(images, args.query, options)
        print(answer.text)
    if args.explain:
        print(explain(answer))
    if args.explain_image:
        with whole_file(Path(args.explain_image)) as draft:
            draw_granularity(images, answer.reports, assistant.model.config).save(draft)


if __name__ == "__main__":
    sys.exit(main())
