"""The cost of an answer, measured with single requests to `Assistant.answer`.

Policies take turns, so that the machine's load affects all equally.
Times and peak memory come from separate passes, because profiling every allocation slows a request down.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from llava.eval.report.answers import Record
from llava.images import load_image
from llava.inference import Answer, Assistant, Options
from llava.messages import RoutingRequest
from llava.model.memory import kv_cache_bytes

PARTS = ("views", "vision", "router", "splice", "prefill", "decode", "other")
"""Where an answer's time goes, in order; `other` is the rest: tokenisation, detokenisation, bookkeeping."""
WARM_UP = 2
MEMORY_QUESTIONS = 10
PROFILER_QUIET = "6"
"""`KINETO_LOG_LEVEL` at which the profiler logs nothing, not even that it starts and stops (level 5)."""


@dataclass(frozen=True)
class Cost:
    """One question under one policy. Milliseconds are those of the repetition with the median total time.

    milliseconds: of each of `PARTS`; ttft: until the first token; total: the whole call.
    kv_bytes: size of the KV cache, computed from shapes.
    peak_bytes: most tensor memory at once on top of the loaded weights; `None` where it was not measured.
    """

    milliseconds: dict[str, float]
    ttft: float
    total: float
    new_tokens: float
    kv_bytes: float
    peak_bytes: float | None


@dataclass(frozen=True)
class Measurements:
    """Costs by policy, one per sampled question. `answers`: how many were compared with the batch's; `differing`: how many differ."""

    sample: list[Record]
    costs: dict[str, list[Cost]]
    answers: int
    differing: int


def balanced_sample(records: Sequence[Record], count: int, seed: int) -> list[Record]:
    """`count` questions, spread over the families as evenly as possible."""
    lots = random.Random(seed)
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.family, []).append(record)
    queues = [lots.sample(group, len(group)) for group in groups.values()]
    turns = [queue[place] for place in range(max(map(len, queues))) for queue in queues if place < len(queue)]
    return turns[:count]


def measure(
    assistant: Assistant,
    sample: Sequence[Record],
    folder: Path,
    requests: Mapping[str, RoutingRequest],
    expected: Mapping[str, Sequence[str]],
    max_new_tokens: int,
    repeats: int,
) -> Measurements:
    """Time every policy on every sampled question. The policy that goes first rotates with the question and with the repetition.

    Args:
        requests: the policies by name. expected: for each, the batch's answer to each sampled question.
        repeats: how often each request is made; the one of median time counts (of an even number, the faster of the middle two).
    """
    names = list(requests)
    runs: dict[str, list[list[tuple[Answer, float]]]] = {name: [[] for _ in sample] for name in names}
    images = [load_image(folder / record.image) for record in sample]

    def request(index: int, name: str) -> tuple[Answer, float]:
        options = Options(max_new_tokens=max_new_tokens, routing=requests[name])
        start = time.perf_counter()
        answer = assistant.answer([images[index]], sample[index].text, options)
        return answer, 1000 * (time.perf_counter() - start)

    for index in range(min(WARM_UP, len(sample))):
        for name in names:
            request(index, name)
    with tqdm(total=repeats * len(sample) * len(names), desc="timing", unit="request") as progress:
        for repetition in range(repeats):
            for index in range(len(sample)):
                first = (index + repetition) % len(names)
                for name in names[first:] + names[:first]:
                    runs[name][index].append(request(index, name))
                progress.update(len(names))
    peaks: list[dict[str, float]] = [{} for _ in sample]
    for index in tqdm(range(min(MEMORY_QUESTIONS, len(sample))), desc="memory", unit="question"):
        peaks[index] = peak_bytes({name: partial(request, index, name) for name in names}, assistant.model.device)
    costs = {
        name: [_cost(assistant.model, runs[name][index], peaks[index].get(name)) for index in range(len(sample))] for name in names
    }
    differing = sum(
        runs[name][index][0][0].text != expected[name][index] for name in names for index in range(len(sample))
    )
    return Measurements(list(sample), costs, len(names) * len(sample), differing)


def _cost(model: Any, runs: Sequence[tuple[Answer, float]], peak: float | None) -> Cost:
    # The parts of one request: medians of each part by itself would not add up to the median of the total.
    answer, total = sorted(runs, key=lambda run: run[1])[(len(runs) - 1) // 2]
    parts = {part: answer.milliseconds.get(part, 0.0) for part in PARTS[:-1]}
    parts["other"] = max(0.0, total - sum(parts.values()))
    new_tokens = len(answer.token_ids)
    return Cost(
        milliseconds=parts,
        ttft=answer.milliseconds["ttft"],
        total=total,
        new_tokens=new_tokens,
        kv_bytes=kv_cache_bytes(model.config.get_text_config(), answer.prompt_tokens + new_tokens, model.dtype.itemsize),
        peak_bytes=peak,
    )


def peak_bytes(requests: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """The most tensor memory in bytes that each of some requests holds at once, on top of what was held before it.

    On CUDA the allocator reports it, on a CPU the profiler sees every allocation and release; other devices report nothing.
    """
    if device.type == "cuda":
        return {name: _peak_on_cuda(request, device) for name, request in requests.items()}
    if device.type != "cpu":
        return {}
    os.environ.setdefault("KINETO_LOG_LEVEL", PROFILER_QUIET)
    mark = "request "
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as watcher:
        for name, request in requests.items():
            with torch.profiler.record_function(mark + name):
                request()
    assert watcher.profiler is not None and watcher.profiler.kineto_results is not None
    events = watcher.profiler.kineto_results.events()
    spans = {event.name().removeprefix(mark): event for event in events if event.name().startswith(mark)}
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    times, sizes = np.array(changes, dtype=np.int64).reshape(-1, 2).T
    peaks = {}
    for name in requests:
        within = (times >= spans[name].start_ns()) & (times <= spans[name].start_ns() + spans[name].duration_ns())
        peaks[name] = float(np.cumsum(sizes[within]).max(initial=0))
    return peaks


def _peak_on_cuda(request: Callable[[], object], device: torch.device) -> float:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    request()
    torch.cuda.synchronize(device)
    return float(torch.cuda.max_memory_allocated(device) - before)


def mixed(fixed: Sequence[Sequence[Cost]], weights: np.ndarray) -> list[Cost]:
    """Expected costs of a policy that no request follows, such as random choice, from those of the fixed levels.

    Args:
        fixed: (G, S) costs of S questions at each level. weights: (S, G) probability of each level.
    """

    def mean(values: Sequence[float], share: np.ndarray) -> float:
        return float(np.dot(values, share))

    mixtures = []
    for share, costs in zip(weights, zip(*fixed, strict=True), strict=True):
        peaks = [cost.peak_bytes for cost in costs]
        mixtures.append(
            Cost(
                milliseconds={part: mean([cost.milliseconds[part] for cost in costs], share) for part in PARTS},
                ttft=mean([cost.ttft for cost in costs], share),
                total=mean([cost.total for cost in costs], share),
                new_tokens=mean([cost.new_tokens for cost in costs], share),
                kv_bytes=mean([cost.kv_bytes for cost in costs], share),
                peak_bytes=None if any(peak is None for peak in peaks) else mean([peak for peak in peaks if peak is not None], share),
            )
        )
    return mixtures


def summarise(costs: Sequence[Cost]) -> dict[str, Any]:
    """Means over questions, for a row of the table. `tokens_per_second` is new tokens over total time, prefill included."""
    total = statistics.mean(cost.total for cost in costs)
    parts = {part: statistics.mean(cost.milliseconds[part] for cost in costs) for part in PARTS}
    peaks = [cost.peak_bytes for cost in costs if cost.peak_bytes is not None]
    return {
        "milliseconds": parts,
        "ttft_ms": statistics.mean(cost.ttft for cost in costs),
        "total_ms": total,
        "tokens_per_second": 1000 * statistics.mean(cost.new_tokens for cost in costs) / total,
        "router_share": 100 * parts["router"] / total,
        "peak_mib": statistics.mean(peaks) / 2**20 if peaks else None,
        "kv_mib": statistics.mean(cost.kv_bytes for cost in costs) / 2**20,
    }
