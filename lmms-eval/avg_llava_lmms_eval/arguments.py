"""What may stand in `--model_args`, checked before anything is loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llava.conversation import get_template
from llava.eval.checks import check_server
from llava.messages import RoutingRequest

DTYPES = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class ModelArguments:
    """The arguments of the model, as its parts need them.

    pretrained: checkpoint folder or hub id.
    routing: granularity, budget and bias.
    conv_template: name of a conversation template; `None` takes the checkpoint's.
    batch_size: questions per batch and process.
    device: cuda, cuda:N, mps or cpu; `None` takes the best, or this process's own under a launcher.
    dtype: `None` takes the checkpoint's.
    attn_implementation: transformers' name; `None` takes its default.
    sample_log: folder of the log of samples; `None` takes the harness's output folder.
    engine, vllm: who answers, see `llava.eval.checks.check_server`.
    """

    pretrained: str
    routing: RoutingRequest
    conv_template: str | None
    batch_size: int
    device: str | None
    dtype: torch.dtype | None
    attn_implementation: str | None
    sample_log: str | None
    engine: str
    vllm: str | None


NAMES = (
    "pretrained", "granularity", "max_visual_tokens", "granularity_bias", "conv_template", "batch_size", "device", "dtype",
    "attn_implementation", "sample_log", "engine", "vllm",
)  # fmt: skip
"""Every argument there is."""


def parse_arguments(given: Mapping[str, Any]) -> ModelArguments:
    """Check and convert the arguments.

    Args:
        given: by name, as the harness reads them (numbers where they look like numbers) or as a Python caller writes them.

    Raises:
        ValueError: an unknown name, or a value that cannot be; every complaint names what was found and what is expected.
    """
    unknown = sorted(set(given) - set(NAMES))
    if unknown:
        raise ValueError(f"The model has no argument {', '.join(unknown)}; expected some of {', '.join(NAMES)}.")
    pretrained = given.get("pretrained")
    if not pretrained:
        raise ValueError("pretrained is missing from the model's arguments; give a checkpoint folder or a hub id.")
    dtype = given.get("dtype") or "auto"
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}.")
    template = given.get("conv_template")
    if template is not None:
        get_template(template)
    engine, address = given.get("engine", "embedded"), given.get("vllm")
    check_server(engine, address)
    if engine == "vllm" and template is not None:
        raise ValueError(f"conv_template is {template!r}, but a server writes its model's own template; leave it out.")
    return ModelArguments(
        pretrained=str(pretrained),
        routing=RoutingRequest(
            granularity=read_granularity(given.get("granularity", "auto")),
            max_visual_tokens=_whole_number("max_visual_tokens", given.get("max_visual_tokens")),
            bias=_number("granularity_bias", given.get("granularity_bias", 0.0)),
        ),
        conv_template=template,
        batch_size=_whole_number("batch_size", given.get("batch_size", 1)) or 1,
        device=given.get("device"),
        dtype=DTYPES[dtype],
        attn_implementation=given.get("attn_implementation"),
        sample_log=given.get("sample_log"),
        engine=engine,
        vllm=address,
    )


def name_of(routing: RoutingRequest) -> str:
    """What is asked of the granularities, as part of the name of a file: runs that differ in it do not share their files."""
    wanted = routing.granularity
    levels = "auto" if wanted is None else "-".join(map(str, [wanted] if isinstance(wanted, int) else wanted))
    budget = "" if routing.max_visual_tokens is None else f"_max_visual_tokens-{routing.max_visual_tokens}"
    return f"granularity-{levels}{budget}" + (f"_granularity_bias{routing.bias:+g}" if routing.bias else "")


def read_granularity(value: Any) -> int | tuple[int, ...] | None:
    """Read `auto`, tokens per view, or several to choose from.

    Args:
        value: "auto", a number, a sequence of numbers, or text such as `36:144` (a comma would end the argument in `--model_args`;
            `36;144` means the same, but a shell wants it quoted).

    Raises:
        ValueError: anything else.
    """
    if value is None or value == "auto":
        return None
    parts = value if isinstance(value, Sequence) and not isinstance(value, str) else re.split("[:;]", str(value))
    try:
        numbers = tuple(_integer(part) for part in parts)
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise ValueError(f"granularity is {value!r}, expected auto, tokens per view, or several to choose from such as 36:144.")
    return numbers[0] if len(numbers) == 1 else numbers


def _integer(value: Any) -> int:
    if isinstance(value, bool) or float(value) != int(float(value)):
        raise ValueError(value)
    return int(float(value))


def _whole_number(name: str, value: Any) -> int | None:
    if value is None:
        return None
    try:
        number = _integer(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is {value!r}, expected a whole number.") from error
    if number < 1:
        raise ValueError(f"{name} is {number}, expected 1 or more.")
    return number


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is {value!r}, expected a number.") from error
    if not math.isfinite(number):
        raise ValueError(f"{name} is {value!r}, expected a finite number.")
    return number
