"""Metrics of one service in Prometheus' text format; each app has its own registry."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llava.serve.protocol import EngineStats, ErrorKind, Finished, Started

CONTENT_TYPE = CONTENT_TYPE_LATEST
disable_created_metrics()  # a second series per counter that says when it began

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_RATES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class _EngineCollector(Collector):
    """Reads the engine's own counts when they are scraped."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self.stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self.stats()
        yield GaugeMetricFamily("avg_llava_queue_length", "Requests waiting for a slot in the batch.", stats.waiting)
        yield GaugeMetricFamily("avg_llava_batch_rows", "Requests running now.", stats.running)
        yield GaugeMetricFamily("avg_llava_cache_entries", "Images in the feature cache.", stats.cache_entries)
        yield GaugeMetricFamily("avg_llava_cache_bytes", "Bytes of the feature cache.", stats.cache_bytes)
        yield CounterMetricFamily("avg_llava_cache_hits", "Images whose features were cached.", stats.cache_hits)
        yield CounterMetricFamily("avg_llava_cache_misses", "Images that were encoded.", stats.cache_misses)


class Metrics:
    """Counts what passes through one app.

    Args:
        stats: the engine's own counts.
    """

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self.registry = CollectorRegistry()
        self._stats = stats
        self.registry.register(_EngineCollector(stats))
        counter, histogram = partial(Counter, registry=self.registry), partial(Histogram, registry=self.registry)
        self._requests = counter("avg_llava_requests", "Answers by finish reason.", ["finish_reason"])
        self._errors = counter("avg_llava_errors", "Failed requests by kind.", ["kind"])
        self._prompt_tokens = counter("avg_llava_prompt_tokens", "Prompt positions, visual ones included.")
        self._new_tokens = counter("avg_llava_completion_tokens", "Tokens generated.")
        self._spent = counter("avg_llava_visual_tokens", "Visual tokens spent.")
        self._saved = counter("avg_llava_visual_tokens_saved", "Visual tokens that full granularity would have cost beyond those.")
        self._granularity = counter("avg_llava_granularity", "Images by tokens per view.", ["granularity"])
        self._ttft = histogram("avg_llava_ttft_seconds", "Seconds to the first token.", buckets=_SECONDS)
        self._total = histogram("avg_llava_request_seconds", "Seconds of a whole answer.", buckets=_SECONDS)
        self._rate = histogram("avg_llava_tokens_per_second", "Tokens per second of decoding, per answer.", buckets=_RATES)
        self._rows = histogram("avg_llava_batch_size", "Requests running when one starts.", buckets=_ROWS)
        for kind in ErrorKind:
            self._errors.labels(kind.value)

    def started(self, event: Started) -> None:
        """An answer's prompt was prefilled."""
        self._ttft.observe(event.milliseconds.get("ttft", 0.0) / 1000)
        self._rows.observe(self._stats().running)
        for image in event.images:
            self._granularity.labels(str(image.granularity)).inc()
            self._spent.inc(image.visual_tokens)
            self._saved.inc(max(0, image.full_visual_tokens - image.visual_tokens))

    def finished(self, event: Finished) -> None:
        """An answer is complete."""
        self._requests.labels(event.finish_reason).inc()
        self._prompt_tokens.inc(event.prompt_tokens)
        self._new_tokens.inc(event.completion_tokens)
        self._spent.inc(event.visual_tokens)
        self._total.observe(event.milliseconds.get("total", 0.0) / 1000)
        decode = event.milliseconds.get("decode", 0.0)
        if decode > 0 and event.completion_tokens:
            self._rate.observe(1000 * event.completion_tokens / decode)

    def failed(self, kind: ErrorKind) -> None:
        """A request failed, before or during its answer."""
        self._errors.labels(kind.value).inc()

    def render(self) -> bytes:
        """The body of `/metrics`."""
        return generate_latest(self.registry)
