"""What a controller counts, in Prometheus' format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from llava.serve.cluster.dispatch import WorkerTable
from llava.serve.http.request_limiter import RequestLimiter
from llava.serve.protocol import ErrorKind


class ControllerMetrics:
    """The metrics of one controller: gauges read the table and the limiter, counters are increased by events."""

    def __init__(self, table: WorkerTable, limiter: RequestLimiter) -> None:
        self.registry = CollectorRegistry()
        workers = Gauge("avg_llava_controller_workers", "Registered workers.", registry=self.registry)
        workers.set_function(lambda: len(table.workers))
        in_flight = Gauge("avg_llava_controller_in_flight", "Requests being passed on.", registry=self.registry)
        in_flight.set_function(lambda: limiter.in_flight)
        self._errors = Counter("avg_llava_controller_errors", "Failed requests by kind.", ["kind"], registry=self.registry)
        self._retries = Counter("avg_llava_controller_retries", "Workers replaced by another one.", registry=self.registry)
        self._lost = Counter("avg_llava_controller_lost_workers", "Workers that went silent or were gone.", registry=self.registry)
        for kind in ErrorKind:
            self._errors.labels(kind.value)

    def failed(self, kind: ErrorKind) -> None:
        self._errors.labels(kind.value).inc()

    def retried(self) -> None:
        self._retries.inc()

    def lost(self) -> None:
        self._lost.inc()

    def render(self) -> bytes:
        return generate_latest(self.registry)
