"""One set of flags for every command, with the defaults of what they are read into."""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import pytest

from llava.flags import DEFAULTS, Parser, add_answer_flags, add_model_flags, add_routing_flags, granularity_argument, options_of
from llava.messages import Options, RoutingRequest


def parse(*flags: str, terminal: bool = False) -> argparse.Namespace:
    parser = Parser("program", "Answers.")
    add_model_flags(parser)
    add_answer_flags(parser, with_beams=not terminal)
    add_routing_flags(parser, with_bias=not terminal)
    return parser.parse_args(flags)


def test_what_is_not_given_is_the_default_of_the_options() -> None:
    assert options_of(parse()) == options_of(parse(terminal=True)) == options_of(SimpleNamespace()) == Options()
    assert vars(parse()) == DEFAULTS
    assert DEFAULTS.keys() - vars(parse(terminal=True)).keys() == {"num_beams", "granularity_bias"}


def test_flags_reach_their_fields() -> None:
    flags = "--temperature 0.5 --top_p 0.9 --max-new-tokens 7 --seed 3 --conv-mode v1 --granularity 36,144 --max-visual-tokens 200"
    routing = RoutingRequest([36, 144], 200, -0.5)
    wanted = Options("v1", 0.5, 0.9, max_new_tokens=7, seed=3, routing=routing)
    assert options_of(parse(*flags.split(), "--granularity-bias", "-0.5")) == wanted
    assert options_of(parse("--num_beams", "2")).num_beams == 2
    with pytest.raises(ValueError, match="temperature is -1"):
        options_of(parse("--temperature=-1"))


def test_one_granularity_under_its_names() -> None:
    for flag in ("--granularity", "--vis-token-granularity", "--vis_token_granularity"):
        assert parse(flag, "36").vis_token_granularity == 36 and parse(flag, "auto").vis_token_granularity is None
    with pytest.raises(argparse.ArgumentTypeError, match="not auto, a number"):
        granularity_argument("fine")
