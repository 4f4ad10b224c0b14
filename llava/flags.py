"""The command line of every program: one parser, and the flags that mean the same in all of them. Nothing here needs torch.

A program's module imports what its flags need and nothing else. What it runs is imported by the functions that run it, after the flags are
read, so that `--help` and a mistyped flag are answered at once.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from llava.messages import Options, RoutingRequest

LOADING: dict[str, Any] = {"model_path": None, "model_base": None, "load_8bit": False, "load_4bit": False, "device": None}
"""Flags about loading, and their defaults."""
ANSWERING = ("conv_mode", "temperature", "top_p", "num_beams", "max_new_tokens", "seed")
"""Flags that are fields of `Options`."""
ROUTING = {"vis_token_granularity": "granularity", "max_visual_tokens": "max_visual_tokens", "granularity_bias": "bias"}
"""Flags that are fields of `RoutingRequest`, under LLaVA's names."""
ENGINES = ("embedded", "vllm")
LOG_LEVELS = ("debug", "info", "warning", "error")


# ---- the parser


class HelpFormatter(argparse.HelpFormatter):
    """Shows each flag once, by the name it is declared with, and its default; the usage line names what has to be given."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)

    def add_usage(self, usage: str | None, actions: Iterable[argparse.Action], groups: Any, prefix: str | None = None) -> None:
        if usage is None:
            required = [f" {self._format_action_invocation(action)}" for action in actions if action.required]
            usage = f"%(prog)s{''.join(required)} [flags]"
        super().add_usage(usage, [], [], prefix)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(super(HelpFormatter, self)._fill_text(part, width, indent) for part in text.split("\n\n"))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or "--help" in action.option_strings:
            return super()._format_action_invocation(action)
        if action.nargs == 0:
            return action.option_strings[0]
        return f"{action.option_strings[0]} {self._format_args(action, self._get_default_metavar_for_optional(action))}"

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if "default" in text or action.default in (None, False, "", argparse.SUPPRESS, []):
            return text
        return f"{text} (default: %(default){'g' if isinstance(action.default, float) else 's'})"


class GroupedHelp(argparse.ArgumentParser):
    """Shows the flags that people use first in a group of their own, in front of the others.

    Attributes:
        first: those flags, by the names they are declared with.
    """

    first: Sequence[str] = ()

    def format_help(self) -> str:
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        first = [self._option_string_actions[name] for name in self.first]
        formatter.start_section("used most")
        formatter.add_arguments(first)
        formatter.end_section()
        positionals, others, *groups = self._action_groups  # the two that argparse makes itself
        for group in (positionals, *groups, others):
            formatter.start_section(group.title)
            formatter.add_arguments([action for action in group._group_actions if action not in first])
            formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()


class Parser(GroupedHelp):
    """The flags of a program: shown with dashes, and read with underscores too, as LLaVA writes many of them.

    Args:
        prog: how the program is called. description: what it does. first: the flags that people use first.
    """

    def __init__(self, prog: str, description: str, first: Sequence[str] = (), **options: Any) -> None:
        super().__init__(prog=prog, description=description, formatter_class=HelpFormatter, **options)
        self.first = first

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        arguments = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._with_dashes(argument) for argument in arguments], namespace)

    def _with_dashes(self, argument: str) -> str:
        flag, equals, value = argument.partition("=")
        dashed = flag.replace("_", "-")
        known = flag.startswith("--") and any(name.startswith(dashed) for name in self._option_string_actions)
        return f"{dashed}{equals}{value}" if known else argument


class OneValue(argparse.Action):
    """Stores a number of a flag with several names, and refuses another number under another name."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        given = vars(namespace).setdefault("values_by_name", {})
        for name, value in given.items():
            if name != option_string and value != values:
                raise argparse.ArgumentError(self, f"{name} is {value} and {option_string} {values}; they mean the same, give one.")
        given[option_string] = values
        setattr(namespace, self.dest, values)


FlagGroup = argparse._ArgumentGroup | argparse.ArgumentParser
"""What flags are added to."""


def add_ignored(group: FlagGroup, reasons: Mapping[str, str]) -> None:
    """Accept flags that scripts written for LLaVA pass and that change nothing here; `start_logging` warns of each that is given.

    Args:
        reasons: flag -> why it changes nothing.
    """
    for flag, reason in reasons.items():
        warning = f"{flag} changes nothing: {reason}"
        group.add_argument(flag, action="append_const", dest="ignored", const=warning, default=[], help=argparse.SUPPRESS)


def add_log_level(group: FlagGroup, default: str = "info") -> None:
    """How much is logged, to standard error."""
    group.add_argument("--log-level", default=default, choices=LOG_LEVELS, help="least level that is logged")


def start_logging(args: argparse.Namespace, logger: logging.Logger) -> None:
    """Log from `--log-level` on, and warn of flags that change nothing."""
    from llava.log import setup_logging

    setup_logging(args.log_level.upper())
    for warning in getattr(args, "ignored", []):
        logger.warning(warning)


# ---- which model answers, and how


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


def add_model_flags(group: FlagGroup) -> None:
    """Which model is loaded, where, and in how many bits: the flags of `LOADING`."""
    group.add_argument("--model-path", metavar="PATH", help="checkpoint folder or hub id; without it the micro model that ships with us")
    group.add_argument("--model-base", metavar="PATH", help="language model underneath a folder that holds a projector or an adapter only")
    group.add_argument("--device", help="cuda, mps or cpu; without it the best there is (CUDA_VISIBLE_DEVICES chooses GPUs)")
    group.add_argument("--load-8bit", action="store_true", help="quantise the language model to 8 bits")
    group.add_argument("--load-4bit", action="store_true", help="quantise the language model to 4 bits")


def add_engine_flags(group: FlagGroup, in_process: bool = True) -> None:
    """Who answers a file of questions.

    Args:
        in_process: whether vLLM may run in the command's own process, so that an address is not needed.
    """
    which = (
        "its model is asked, and --model-path chooses among several); without it vLLM runs in this process"
        if in_process
        else "it has the checkpoint of --model-path, of which this process loads all but the decoder layers)"
    )
    group.add_argument("--engine", choices=ENGINES, default="embedded",
                       help="embedded: the model in this process; vllm: a stock vLLM with the plug-in, many questions at once")  # fmt: skip
    group.add_argument("--vllm", metavar="ADDRESS",
                       help=f"with --engine vllm: the server to ask, as in http://localhost:8000 ({which}")


def add_routing_flags(group: FlagGroup, with_bias: bool = True) -> None:
    """How many visual tokens an answer may cost.

    Args:
        with_bias: whether `--granularity-bias` is among them.
    """
    group.add_argument("--granularity", "--vis-token-granularity", dest="vis_token_granularity", type=granularity_argument,
                       metavar="auto|N|N,M",
                       help="let the router choose (auto, the default), fix the tokens per view, or limit the choice")  # fmt: skip
    group.add_argument("--max-visual-tokens", type=int, metavar="N", help="budget for all images of a question together")
    if with_bias:
        group.add_argument("--granularity-bias", type=float, default=DEFAULTS["granularity_bias"], metavar="B",
                           help="added to the router's logits per log2 of the visual tokens; below 0 is cheaper")  # fmt: skip


def add_answer_flags(group: FlagGroup, with_beams: bool = True) -> None:
    """How an answer is decoded.

    Args:
        with_beams: whether `--num-beams` is among them; beams cannot be streamed.
    """
    group.add_argument("--max-new-tokens", type=int, default=DEFAULTS["max_new_tokens"], metavar="N", help="longest answer, in tokens")
    group.add_argument("--temperature", type=float, default=DEFAULTS["temperature"], metavar="T", help="0 decodes greedily")
    group.add_argument("--top-p", type=float, metavar="P", help="nucleus sampling, with --temperature above 0")
    if with_beams:
        group.add_argument("--num-beams", type=int, default=DEFAULTS["num_beams"], metavar="N", help="beam search with N beams")
    group.add_argument("--seed", type=int, metavar="N", help="makes sampling repeatable")
    group.add_argument("--conv-mode", metavar="NAME", help="conversation template; without it the checkpoint's own")
