"""What /metrics tells after known traffic."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from llava.serve.api.worker_app import create_worker_app
from llava.serve.http.metrics import Metrics
from llava.serve.protocol import EngineStats, ErrorKind, ServeError
from tests.serve.bodies import CHAT, WORKER, chat_body, data_url, picture, worker_body
from tests.serve.fake_engine import FakeEngine


def after(engine, *requests):
    """The samples of /metrics after some POSTs: name and labels to value."""

    async def send():
        transport = httpx.ASGITransport(app=create_worker_app(engine))
        async with httpx.AsyncClient(transport=transport, base_url="http://worker") as client:
            for path, body in requests:
                await client.post(path, json=body)
            return await client.get("/metrics")

    response = asyncio.run(send())
    assert response.headers["content-type"].startswith("text/plain; version=")
    families = text_string_to_metric_families(response.text)
    return {(sample.name, *sample.labels.values()): sample.value for family in families for sample in family.samples}


def test_answers_are_counted_with_what_they_saved():
    url = data_url(picture())
    found = after(
        FakeEngine(),
        (CHAT, chat_body("one two", (url,), granularity=36)),
        (CHAT, chat_body("one two", (url, url))),
        (WORKER, worker_body("just text", max_new_tokens=1)),
    )
    assert found["avg_llava_requests_total", "stop"] == 2 and found["avg_llava_requests_total", "length"] == 1
    assert found["avg_llava_granularity_total", "36"] == 1 and found["avg_llava_granularity_total", "144"] == 2
    assert found["avg_llava_visual_tokens_total",] == 48 + 2 * 180
    assert found["avg_llava_visual_tokens_saved_total",] == 3 * 600 - (48 + 2 * 180)
    assert found["avg_llava_prompt_tokens_total",] == 58 + 370 + 10
    assert found["avg_llava_completion_tokens_total",] == 4 + 6 + 1
    assert found["avg_llava_ttft_seconds_count",] == found["avg_llava_batch_size_count",] == 3
    assert found["avg_llava_ttft_seconds_sum",] == pytest.approx(3 * 0.0055)
    assert found["avg_llava_tokens_per_second_count",] == 3
    assert found["avg_llava_request_seconds_bucket", "0.025"] == 3


def test_errors_are_counted_by_kind_wherever_they_happen():
    engine = FakeEngine(failure=ServeError(ErrorKind.OUT_OF_MEMORY), fails=lambda request: "fail" in str(request))
    found = after(
        engine,
        (CHAT, chat_body("fail")),
        (CHAT, chat_body(temperature=-1)),
        (CHAT, chat_body(urls=("data:image/png;base64,AAAA",))),
        ("/nothing", {}),
        ("/health", {}),
    )
    kinds = {labels[0]: value for (name, *labels), value in found.items() if name == "avg_llava_errors_total" and value}
    assert kinds == {"out_of_memory": 1, "invalid_request": 2, "invalid_image": 1, "not_found": 1}
    broken = FakeEngine(failure=RuntimeError("x"), fail_after=1)
    assert after(broken, (CHAT, chat_body(stream=True)))["avg_llava_errors_total", "internal_error"] == 1


def test_the_engines_own_counts_are_read_when_asked():
    stats = [EngineStats(1, 2, 3, 4, 5, 6), EngineStats(10, 20, 30, 40, 50, 60)]
    metrics = Metrics(lambda: stats[0])
    stats.pop(0)
    families = text_string_to_metric_families(metrics.render().decode())
    found = {sample.name: sample.value for family in families for sample in family.samples}
    expected = {
        "avg_llava_queue_length": 10, "avg_llava_batch_rows": 20, "avg_llava_cache_entries": 30, "avg_llava_cache_bytes": 40,
        "avg_llava_cache_hits_total": 50, "avg_llava_cache_misses_total": 60,
    }  # fmt: skip
    assert expected.items() <= found.items()


def test_every_app_counts_for_itself():
    create_worker_app(FakeEngine())
    found = after(FakeEngine(), (CHAT, chat_body()))
    assert found["avg_llava_requests_total", "stop"] == 1
