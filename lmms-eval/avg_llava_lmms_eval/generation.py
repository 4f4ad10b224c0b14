"""A task's generation settings as the options of one answer: honoured or refused, never dropped without a word."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava.inference import Options
from llava.messages import RoutingRequest

KNOWN = ("until", "max_new_tokens", "temperature", "top_p", "num_beams", "do_sample")
MAX_NEW_TOKENS = 1024
"""Where a task says nothing: what the harness's own LLaVA takes."""


def read_options(settings: Mapping[str, Any], conv_template: str | None, routing: RoutingRequest) -> Options:
    """Translate `generation_kwargs` of a task (or `--gen_kwargs`).

    Greedy unless a temperature above 0 or `do_sample` asks for sampling; `top_p` then counts, and means nothing to a greedy answer.

    Raises:
        ValueError: a setting that is not known here, or settings that contradict each other.
    """
    unknown = sorted(set(settings) - set(KNOWN))
    if unknown:
        raise ValueError(
            f"The generation settings hold {', '.join(unknown)}, which avg_llava cannot honour; expected some of {', '.join(KNOWN)}. "
            "Change the task's generation_kwargs."
        )
    temperature = _temperature(settings)
    top_p = settings.get("top_p")
    return Options(
        conv_mode=conv_template,
        temperature=temperature,
        top_p=None if top_p is None or temperature == 0 else float(top_p),
        num_beams=int(settings.get("num_beams", 1)),
        max_new_tokens=int(settings.get("max_new_tokens", MAX_NEW_TOKENS)),
        stop=_stops(settings.get("until")),
        routing=routing,
    )


def _temperature(settings: Mapping[str, Any]) -> float:
    """0 for greedy. Sampling without a temperature means 1, as in transformers."""
    sample, temperature = settings.get("do_sample"), settings.get("temperature")
    if sample is not None and temperature is not None and bool(sample) != (float(temperature) > 0):
        raise ValueError(
            f"The generation settings say do_sample {sample} and temperature {temperature}, which contradict each other; "
            "set one of them with --gen_kwargs."
        )
    if temperature is not None:
        return float(temperature)
    return 1.0 if sample else 0.0


def _stops(until: Any) -> tuple[str, ...]:
    if until is None:
        return ()
    texts = (until,) if isinstance(until, str) else tuple(until)
    wrong = [text for text in texts if not isinstance(text, str) or not text]
    if wrong:
        raise ValueError(f"until holds {wrong[0]!r}, expected texts of one character or more.")
    return texts
