"""The flags that say which model answers and how, the same for every command; their defaults are those of `Options`."""

from __future__ import annotations

import argparse
import math
from dataclasses import fields
from typing import Any

from llava.inference import Options
from llava.messages import RoutingRequest

LOADING: dict[str, Any] = {"model_path": None, "model_base": None, "load_8bit": False, "load_4bit": False, "device": None}
"""Flags about loading, and their defaults."""
ANSWERING = ("conv_mode", "temperature", "top_p", "num_beams", "max_new_tokens", "seed")
"""Flags that are fields of `Options`."""
ROUTING = {"vis_token_granularity": "granularity", "max_visual_tokens": "max_visual_tokens", "granularity_bias": "bias"}
"""Flags that are fields of `RoutingRequest`, under LLaVA's names."""


def _defaults() -> dict[str, Any]:
    answering = {field.name: field.default for field in fields(Options)}
    routing = {field.name: field.default for field in fields(RoutingRequest)}
    return {
        **LOADING,
        **{name: answering[name] for name in ANSWERING},
        **{flag: routing[name] for flag, name in ROUTING.items()},
    }


DEFAULTS = _defaults()
"""What a flag is where it is not given, and a field where an argument object lacks it."""


def field_of(args: Any, name: str) -> Any:
    """A field of an argument object, or its default where the object lacks it."""
    return getattr(args, name, DEFAULTS[name])


def options_of(args: Any) -> Options:
    """How to answer, from an argument object; the fields of `DEFAULTS` may be missing.

    Raises:
        ValueError: options that cannot work.
    """
    routing = RoutingRequest(**{name: field_of(args, flag) for flag, name in ROUTING.items()})
    if not math.isfinite(routing.bias):
        raise ValueError(f"granularity_bias is {routing.bias}, expected a finite number.")
    return Options(**{name: field_of(args, name) for name in ANSWERING}, routing=routing)


def granularity_argument(text: str) -> int | list[int] | None:
    """Read `auto`, a number, or a comma-separated list."""
    if text == "auto":
        return None
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not auto, a number or a comma-separated list of numbers") from error
    return numbers[0] if len(numbers) == 1 else numbers


def add_flag(parser: argparse.ArgumentParser, name: str, *more: str, **options: Any) -> None:
    """Add a flag that is read with dashes and with underscores; its default is that of `DEFAULTS` unless another is given.

    Args:
        more: other names of the flag, as they are typed.
    """
    dashed = name.replace("_", "-")
    options.setdefault("default", DEFAULTS.get(name))
    parser.add_argument(*dict.fromkeys((f"--{dashed}", f"--{name}", *more)), dest=name, **options)


def add_model_and_options(parser: argparse.ArgumentParser, terminal: bool = False) -> None:
    """Add the flags of `DEFAULTS`.

    Args:
        terminal: add those of a chat in the terminal: under one name each, without beams, which cannot be streamed, and with those
            wishes about cost that its commands can change again, which leaves out the bias.
    """

    def add(name: str, short: str | None = None, **options: Any) -> None:
        if terminal:
            parser.add_argument(short or f"--{name.replace('_', '-')}", dest=name, default=DEFAULTS[name], **options)
        else:
            add_flag(parser, name, *([short] if short else []), **options)

    add("model_path", help="checkpoint folder or hub id; the shipped micro model when missing")
    add("model_base", help="language model of a projector-only or adapter folder")
    add("conv_mode", help="conversation template; the checkpoint's when missing")
    add("temperature", type=float, help="0 is greedy (default: %(default)s)")
    add("top_p", type=float, help="nucleus sampling, with --temperature above 0")
    if not terminal:
        add("num_beams", type=int, help="beam search")
    add("max_new_tokens", type=int, help="length of an answer at most (default: %(default)s)")
    add("seed", type=int, help="makes sampling repeatable")
    granularity_help = "auto (default), tokens per view, or a list such as 36,144 to choose from"
    add("vis_token_granularity", "--granularity", type=granularity_argument, help=granularity_help)
    add("max_visual_tokens", type=int, help="budget for all pictures of a question together")
    if not terminal:
        add("granularity_bias", type=float, help="added to the router's logits per log2 of the tokens; negative is cheaper")
    add("device", help="cuda, mps or cpu; the best that is there when missing")
    add("load_8bit", action="store_true", help="quantise the language model to 8 bits")
    add("load_4bit", action="store_true", help="quantise the language model to 4 bits")
