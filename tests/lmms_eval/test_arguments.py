"""`--model_args` and generation settings: read as meant, or refused by name."""

from __future__ import annotations

import pytest
import torch
from avg_llava_lmms_eval.arguments import name_of, parse_arguments, read_granularity
from avg_llava_lmms_eval.generation import MAX_NEW_TOKENS, read_options

from llava.messages import RoutingRequest


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("auto", None), (None, None), (36, 36), ("36", 36), (36.0, 36), ("36:144", (36, 144)), ("36;144", (36, 144)),
        ([36, 144], (36, 144)), ("576", 576),
    ],
)  # fmt: skip
def test_granularity_is_auto_a_number_or_several(written, meant):
    assert read_granularity(written) == meant


def test_names_of_what_is_asked_differ_where_it_differs():
    wishes = [{}, {"granularity": 4}, {"granularity": "4:16"}, {"max_visual_tokens": 48}, {"granularity_bias": -0.5}]
    names = [name_of(parse_arguments({"pretrained": "x", **wish}).routing) for wish in wishes]
    ends = ["auto", "4", "4-16", "auto_max_visual_tokens-48", "auto_granularity_bias-0.5"]
    assert names == [f"granularity-{end}" for end in ends]


@pytest.mark.parametrize("written", ["coarse", "36:", "36.5", "0", "-36", "", [], True])
def test_another_granularity_is_refused_with_what_it_was(written):
    with pytest.raises(ValueError, match="expected auto, tokens per view, or several"):
        read_granularity(written)


def test_every_argument_reaches_its_place():
    arguments = parse_arguments(
        {
            "pretrained": "some/model", "granularity": "36:144", "max_visual_tokens": 700, "granularity_bias": -0.5, "conv_template": "v1",
            "batch_size": "8", "device": "cuda:1", "dtype": "bfloat16", "attn_implementation": "sdpa", "sample_log": "logs",
        }
    )  # fmt: skip
    assert arguments.routing == RoutingRequest((36, 144), 700, -0.5)
    assert (arguments.pretrained, arguments.conv_template, arguments.batch_size) == ("some/model", "v1", 8)
    assert (arguments.device, arguments.dtype, arguments.attn_implementation) == ("cuda:1", torch.bfloat16, "sdpa")
    assert arguments.sample_log == "logs"


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({}, "pretrained is missing"),
        ({"pretrained": "m", "granulariti": 4, "temperature": 0}, "no argument granulariti, temperature; expected some of pretrained"),
        ({"pretrained": "m", "dtype": "int8"}, "dtype is 'int8', expected one of auto"),
        ({"pretrained": "m", "batch_size": "auto"}, "batch_size is 'auto', expected a whole number"),
        ({"pretrained": "m", "batch_size": 0}, "batch_size is 0, expected 1 or more"),
        ({"pretrained": "m", "max_visual_tokens": "many"}, "max_visual_tokens is 'many'"),
        ({"pretrained": "m", "granularity_bias": "low"}, "granularity_bias is 'low', expected a number"),
        ({"pretrained": "m", "granularity_bias": "-inf"}, "granularity_bias is '-inf', expected a finite number"),
        ({"pretrained": "m", "conv_template": "nobody"}, "nobody"),
        ({"pretrained": "m", "engine": "sglang"}, "engine is 'sglang', expected one of embedded, vllm"),
        ({"pretrained": "m", "engine": "vllm"}, "engine is vllm and vllm is None; the engine vllm needs the address"),
        ({"pretrained": "m", "vllm": "http://x"}, "the embedded one takes none"),
        ({"pretrained": "m", "engine": "vllm", "vllm": "http://x", "conv_template": "v1"}, "a server writes its model's own template"),
    ],
)
def test_what_cannot_be_is_refused_by_name(given, complaint):
    with pytest.raises(ValueError, match=complaint):
        parse_arguments(given)


def options(**settings):
    return read_options(settings, None, RoutingRequest())


def test_settings_of_the_stock_tasks_are_greedy():
    stock = options(max_new_tokens=16, temperature=0, top_p=1.0, num_beams=1, do_sample=False)
    assert (stock.temperature, stock.top_p, stock.num_beams, stock.max_new_tokens, stock.stop) == (0.0, None, 1, 16, ())
    assert options(until=["ASSISTANT:"]).stop == ("ASSISTANT:",) and options(until="Q:").stop == ("Q:",)
    assert options(temperature=0, top_p=0).top_p is None  # means nothing to a greedy answer
    assert options().max_new_tokens == MAX_NEW_TOKENS and options().temperature == 0


def test_sampling_is_honoured():
    sampled = options(do_sample=True, temperature=0.2, top_p=0.7)
    assert (sampled.temperature, sampled.top_p) == (0.2, 0.7)
    assert options(do_sample=True).temperature == 1.0
    assert options(num_beams=3).num_beams == 3


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"repetition_penalty": 1.2}, "hold repetition_penalty, which avg_llava cannot honour"),
        ({"image_aspect_ratio": "original", "top_k": 1}, "image_aspect_ratio, top_k"),
        ({"do_sample": False, "temperature": 0.2}, "do_sample False and temperature 0.2, which contradict"),
        ({"do_sample": True, "temperature": 0}, "contradict"),
        ({"until": [""]}, "until holds ''"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": 1, "top_p": 0}, "top_p is 0"),
    ],
)
def test_what_cannot_be_honoured_is_refused(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        options(**settings)
