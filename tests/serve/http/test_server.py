"""Signals, draining and exit statuses."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import pytest
from fastapi import FastAPI

from llava.interrupts import INTERRUPTED, run_program
from llava.serve.api.worker_app import create_worker_app
from llava.serve.http.server import make_server, run_server
from tests.serve.fake_engine import FakeEngine


def test_a_signal_drains_and_leaves_no_handler_behind():
    done = []

    async def drain():
        done.append("drained")

    app = FastAPI()
    app.state.drain = drain
    before = signal.getsignal(signal.SIGTERM)
    server = make_server(app, "127.0.0.1", 0, log_level="warning", on_started=lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run_server(server) == 0 and done == ["drained"]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("signals", [1, 2])
def test_what_does_not_finish_is_left_after_its_time_or_at_the_second_signal(signals):
    def press():
        for _ in range(signals):
            server.stop()

    app = FastAPI()
    app.state.drain = asyncio.Event().wait
    server = make_server(app, "127.0.0.1", 0, log_level="error", drain_seconds=0.3 if signals == 1 else 60, on_started=press)
    start = time.monotonic()
    assert run_server(server) == 0 and time.monotonic() - start < 30


def test_ctrl_c_before_the_server_runs_is_a_status_and_no_traceback(monkeypatch):
    def main():
        app = FastAPI()
        app.state.drain = asyncio.Event().wait
        server = make_server(app, "127.0.0.1", 0)
        monkeypatch.setattr(server, "run", lambda: pytest.fail("it runs although it was interrupted"))
        return run_server(server)

    monkeypatch.setattr("gc.collect", lambda: os.kill(os.getpid(), signal.SIGINT))
    monkeypatch.setattr("gc.freeze", lambda: None)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            main()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert run_program(main) == INTERRUPTED == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert run_program(lambda: 1) == 1


def test_a_server_whose_engine_has_failed_for_good_ends_with_status_1():
    app, broken = create_worker_app(FakeEngine()), []
    app.state.failed = lambda: bool(broken)
    assert run_server(make_server(app, "127.0.0.1", 0, log_level="error", on_started=lambda: broken.append(1))) == 1
