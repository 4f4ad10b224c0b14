"""Ask a model about images: `eval_model(args)` for LLaVA's callers, `python -m llava.eval.run_llava` for the shell."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava import flags
from llava.flags import Parser, field_of, options_of, start_logging
from llava.interrupts import run_program

if TYPE_CHECKING:
    from PIL.Image import Image

    from llava.inference import Answer, Assistant

logger = logging.getLogger("llava.eval.run_llava")

PROG = "python -m llava.eval.run_llava"
FIRST = (
    *("--model-path", "--model-base", "--image-file", "--query", "--granularity", "--max-visual-tokens", "--max-new-tokens"),
    *("--stream", "--explain", "--explain-image"),
)
SEPARATOR = ","
"""Between the names of several images."""
DATA_URL = re.compile(r"data:[^,]*,[\w+/=%-]*", re.IGNORECASE | re.ASCII)
"""A data URL with an image; it always holds a comma."""


def eval_model(args: Any) -> str:
    """Answer one question about one or more images, print the answer and return it.

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
    from llava.inference import cached_assistant

    return cached_assistant(**{name: field_of(args, name) for name in flags.LOADING})


def _images(args: Any) -> list[Image]:
    return load_images(image_parser(args)) if getattr(args, "image_file", None) else []


def image_parser(args: Any) -> list[str]:
    """The names of images in `args.image_file`, which `args.sep` separates."""
    return split_names(args.image_file, getattr(args, "sep", SEPARATOR))


def load_image(image_file: str) -> Image:
    """Load one image, a path or an address; see `llava.images.load_image`."""
    from llava import images

    return images.load_image(image_file, allow_remote=True)


def load_images(image_files: Sequence[str]) -> list[Image]:
    """Load several images in order."""
    from llava import images

    return images.load_images(image_files, allow_remote=True)


def split_names(text: str, separator: str = SEPARATOR) -> list[str]:
    """Split a text into image names; a separator within an existing file's name or a data URL belongs to that."""
    names: list[str] = []
    parts = text.split(separator)
    while parts:
        count = next((count for count in range(len(parts), 1, -1) if _is_one_name(separator.join(parts[:count]).strip())), 1)
        names.append(separator.join(parts[:count]).strip())
        del parts[:count]
    return names


def _is_one_name(text: str) -> bool:
    return os.path.isfile(text) or DATA_URL.fullmatch(text) is not None


def build_parser(prog: str = PROG) -> Parser:
    """The command line's flags, under LLaVA's names."""
    parser = Parser(prog, "Ask a model about one or more images.", FIRST)
    question = parser.add_argument_group("question")
    question.add_argument("--query", required=True, help="the question; <image> marks where an image goes")
    question.add_argument("--image-file", metavar="IMAGE", help="path or URL of the image; several are joined by --sep")
    question.add_argument("--sep", default=SEPARATOR, help="what separates several images")
    flags.add_model_flags(parser.add_argument_group("model"))
    flags.add_answer_flags(parser.add_argument_group("decoding"))
    flags.add_routing_flags(parser.add_argument_group("visual tokens"))
    output = parser.add_argument_group("output")
    output.add_argument("--stream", action="store_true", help="print the answer as it is generated")
    output.add_argument("--explain", action="store_true", help="print logits, tokens at each granularity and milliseconds per part")
    output.add_argument("--explain-image", metavar="OUT.png", help="draw views and the chosen token grid over the image")
    flags.add_log_level(output, default="warning")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Run the command; 0, or 1 with one sentence on standard error, or 130 after Ctrl-C."""
    args = build_parser(prog).parse_args(argv)
    return run_program(lambda: run(args), errors=(ValueError, FloatingPointError, OSError, ImportError))


def run(args: argparse.Namespace) -> None:
    """Answer the question and print what the flags ask for.

    Raises:
        ValueError: flags, a checkpoint or an image that cannot work. OSError: files that cannot be read or written.
    """
    from llava.durable import whole_file
    from llava.eval.explain import explain
    from llava.visualize import draw_granularity

    start_logging(args, logger)
    if not args.query.strip():
        raise ValueError("--query is empty, perhaps from an unset shell variable; give a question.")
    if args.explain_image and not args.image_file:
        raise ValueError("--explain-image needs an image to draw on; give --image-file.")
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
