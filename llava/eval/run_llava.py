"""Ask a model about pictures: `eval_model(args)` for LLaVA's callers, `python -m llava.eval.run_llava` for the shell."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from llava.images import load_images
from llava.inference import Answer, Assistant, Options, cached_assistant
from llava.model.routing import RoutingRequest
from llava.visualize import draw_granularity

DEFAULTS: dict[str, Any] = {
    "model_base": None,
    "model_path": None,
    "conv_mode": None,
    "sep": ",",
    "temperature": 0.0,
    "top_p": None,
    "num_beams": 1,
    "max_new_tokens": 512,
    "vis_token_granularity": None,
    "max_visual_tokens": None,
    "granularity_bias": 0.0,
    "seed": None,
    "load_8bit": False,
    "load_4bit": False,
    "device": None,
}
"""What a field is when the argument object lacks it."""

LOADING = ("load_8bit", "load_4bit", "device")


def eval_model(args: Any) -> str:
    """Answer one question about one or more pictures, print the answer and return it.

    A second call with the same model reuses it.

    Args:
        args: any object with `query` and `image_file` (paths or http(s) URLs joined by `sep`); the fields of `DEFAULTS` may be missing.

    Raises:
        ValueError: input that cannot work.
    """
    answer = _answer(args)
    print(answer.text)
    return answer.text


def _answer(args: Any) -> Answer:
    assistant = _assistant(args)
    return assistant.answer(_images(args), args.query, options_of(args))


def _field(args: Any, name: str) -> Any:
    return getattr(args, name, DEFAULTS[name])


def _assistant(args: Any) -> Assistant:
    loading = {name: _field(args, name) for name in LOADING}
    return cached_assistant(_field(args, "model_path"), _field(args, "model_base"), **loading)


def _images(args: Any) -> list[Any]:
    names = getattr(args, "image_file", None)
    return load_images([name.strip() for name in names.split(_field(args, "sep"))], allow_remote=True) if names else []


def options_of(args: Any) -> Options:
    """How to answer, from an argument object; the fields of `DEFAULTS` may be missing."""
    return Options(
        conv_mode=_field(args, "conv_mode"),
        temperature=_field(args, "temperature"),
        top_p=_field(args, "top_p"),
        num_beams=_field(args, "num_beams"),
        max_new_tokens=_field(args, "max_new_tokens"),
        seed=_field(args, "seed"),
        routing=RoutingRequest(
            _field(args, "vis_token_granularity"), _field(args, "max_visual_tokens"), _field(args, "granularity_bias")
        ),
    )


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
        for level, (granularity, tokens) in enumerate(report.tokens_per_level.items()):
            asked = report.logits is not None and report.probabilities is not None
            logit = f"{report.logits[level]:7.3f}" if asked else f"{'-':>7}"  # type: ignore[index]
            probability = f"{report.probabilities[level]:11.3f}" if asked else f"{'-':>11}"  # type: ignore[index]
            mark = "  <- chosen" if granularity == report.granularity else ""
            lines.append(f"  {granularity:>15}  {tokens:>13}  {logit}  {probability}{mark}")
    parts = "  ".join(f"{part} {value:.1f}" for part, value in answer.milliseconds.items())
    lines.append(f"milliseconds: {parts}")
    lines.append(f"prompt positions {answer.prompt_tokens}, new tokens {len(answer.token_ids)}, finished by {answer.finish_reason}")
    return "\n".join(lines)


def granularity_argument(text: str) -> int | list[int] | None:
    """Read `auto`, a number, or a comma-separated list."""
    if text == "auto":
        return None
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not auto, a number or a comma-separated list of numbers") from error
    return numbers[0] if len(numbers) == 1 else numbers


def add_flag(parser: argparse.ArgumentParser, name: str, **options: Any) -> None:
    """Add a flag that is read with dashes and with underscores; its default is that of `DEFAULTS` unless another is given."""
    dashed = name.replace("_", "-")
    options.setdefault("default", DEFAULTS.get(name))
    parser.add_argument(*dict.fromkeys((f"--{dashed}", f"--{name}")), dest=name, **options)


def add_model_and_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which model answers and how, the same for one question and for a file of them."""

    def add(name: str, **options: Any) -> None:
        add_flag(parser, name, **options)

    add("model_path", help="checkpoint folder or hub id; the shipped micro model when missing")
    add("model_base", help="language model of a projector-only checkpoint")
    add("conv_mode", help="conversation template; the checkpoint's when missing")
    add("temperature", type=float, help="0 is greedy (default)")
    add("top_p", type=float, help="nucleus sampling, with --temperature above 0")
    add("num_beams", type=int, help="beam search")
    add("max_new_tokens", type=int, help="length of an answer at most (default: 512)")
    add("seed", type=int, help="makes sampling repeatable")
    add("vis_token_granularity", type=granularity_argument, help="auto (default), tokens per view, or a list such as 36,144 to choose from")
    add("max_visual_tokens", type=int, help="budget for all pictures of a question together")
    add("granularity_bias", type=float, help="added to the router's logits per log2 of the tokens; negative is cheaper")
    add("device", help="cuda, mps or cpu; the best that is there when missing")
    for flag in ("load_8bit", "load_4bit"):
        add(flag, action="store_true", help="quantise the language model")


def build_parser() -> argparse.ArgumentParser:
    """The command line's flags: LLaVA's names, with dashes or underscores."""
    parser = argparse.ArgumentParser(prog="python -m llava.eval.run_llava", description="Ask a model about one or more pictures.")
    add_model_and_options(parser)
    add_flag(parser, "image_file", help="path or URL of the picture; several are joined by --sep")
    parser.add_argument("--query", required=True, help="the question; <image> marks where a picture goes")
    add_flag(parser, "sep", help="what separates several pictures (default: comma)")
    parser.add_argument("--stream", action="store_true", help="print the answer as it is written")
    parser.add_argument("--explain", action="store_true", help="print logits, tokens at each granularity and milliseconds per part")
    parser.add_argument("--explain-image", metavar="OUT.png", help="draw views and the chosen token grid over the picture")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0, or 1 with one sentence on standard error."""
    args = build_parser().parse_args(argv)
    try:
        _run(args)
    except (ValueError, FloatingPointError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _run(args: argparse.Namespace) -> None:
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
        draw_granularity(images, answer.reports, assistant.model.config).save(args.explain_image)


if __name__ == "__main__":
    sys.exit(main())
