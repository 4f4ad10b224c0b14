"""Requests in flight, bytes of bodies, and draining."""

from __future__ import annotations

import asyncio

import pytest

from llava.serve.api.worker_app import create_worker_app
from llava.serve.http.request_limiter import RequestLimiter
from llava.serve.protocol import ErrorKind, Limits, ServeError
from tests.serve.bodies import CHAT, chat_body
from tests.serve.fake_engine import FakeEngine
from tests.serve.http.test_middleware import call


def test_all_bodies_together_are_bounded():
    limiter = RequestLimiter(10, 1000)
    limiter.reserve_bytes(900)
    with pytest.raises(ServeError) as refused:
        limiter.reserve_bytes(101)
    assert refused.value.kind is ErrorKind.OVERLOADED and limiter.held_bytes == 900


def test_each_choice_counts_as_in_flight():
    app = create_worker_app(FakeEngine(), Limits(max_queue=0), concurrency=2)
    assert call(app, "POST", CHAT, json=chat_body(n=2)).status_code == 200
    with app.state.limiter.admit():
        full = call(app, "POST", CHAT, json=chat_body(n=2))
    assert full.status_code == 503 and full.headers["retry-after"] == "1"
    assert app.state.limiter.in_flight == 0


def test_more_choices_than_the_capacity_are_refused_for_good():
    app = create_worker_app(FakeEngine(), Limits(max_queue=0), concurrency=2)
    for stream in (False, True):
        refused = call(app, "POST", CHAT, json=chat_body(n=3, stream=stream))
        error = refused.json()["error"]
        assert (refused.status_code, error["code"], error["param"]) == (400, "invalid_request", "n")
        assert "n is 3" in error["message"] and "at most 2" in error["message"] and "retry-after" not in refused.headers
    assert app.state.limiter.in_flight == 0


def test_a_draining_server_admits_nothing_and_finishes_what_is_in_flight():
    limiter = RequestLimiter(5, 0)
    with limiter.admit():
        limiter.start_draining()
        with pytest.raises(ServeError) as refused, limiter.admit():
            pass
        assert refused.value.kind is ErrorKind.DRAINING
        with limiter.admit_more(2):
            assert limiter.in_flight == 3
    assert limiter.in_flight == 0
    asyncio.run(asyncio.wait_for(limiter.finish(), 60))
