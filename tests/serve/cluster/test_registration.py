"""A worker registers with a controller, registers again when it is forgotten, and unregisters."""

from __future__ import annotations

import time

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from llava.serve.api.worker_app import create_worker_app
from llava.serve.cluster.registration import Registration
from llava.serve.http.middleware import guard_app
from llava.serve.http.request_limiter import RequestLimiter
from llava.serve.protocol import ErrorKind, Limits, ServeError
from tests.serve.bodies import CHAT, chat_body
from tests.serve.fake_engine import FakeEngine
from tests.serve.ports import free_port
from tests.serve.running import RunningApp, wait_until


class Controller:
    """A controller that writes down who registers; `known` is what it remembers."""

    def __init__(self) -> None:
        self.known: set[str] = set()
        self.registered: list[dict] = []
        self.beats: list[dict] = []
        self.left: list[dict] = []
        self.shown: set[str | None] = set()
        self.refuse = False
        self.app = FastAPI()
        guard_app(self.app, RequestLimiter(10, 10**6), Limits())
        self.app.post("/register_worker")(self.register)
        self.app.post("/receive_heart_beat")(self.beat)
        self.app.post("/unregister_worker")(self.leave)

    async def register(self, request: Request):
        if self.refuse:
            raise ServeError(ErrorKind.FORBIDDEN)
        body = await request.json()
        self.registered.append(body)
        self.shown.add(request.headers.get("authorization"))
        self.known.add(body["worker_name"])

    async def beat(self, request: Request):
        body = await request.json()
        self.beats.append(body)
        self.shown.add(request.headers.get("authorization"))
        return JSONResponse({"exist": body["worker_name"] in self.known})

    async def leave(self, request: Request):
        self.left.append(await request.json())
        self.shown.add(request.headers.get("authorization"))
        return JSONResponse({"exist": True})


def test_a_worker_registers_and_comes_back_when_it_is_forgotten():
    controller = Controller()
    with RunningApp(controller.app) as there:
        registration = Registration(there.url, "http://worker:1", "token", interval=0.05)
        with RunningApp(create_worker_app(FakeEngine(), registration=registration)):
            wait_until(lambda: len(controller.beats) >= 2)
            assert controller.registered == [
                {
                    "worker_name": "http://worker:1",
                    "check_heart_beat": True,
                    "worker_status": {"model_names": ["fake"], "speed": 1, "queue_length": 0},
                }
            ]
            assert controller.beats[0] == {"worker_name": "http://worker:1", "queue_length": 0}
            controller.known.clear()
            wait_until(lambda: len(controller.registered) == 2)
        assert controller.left == [{"worker_name": "http://worker:1"}]
        assert controller.shown == {"Bearer token"}  # in the head, where it is judged before a body is taken
        count = len(controller.beats)
        time.sleep(0.2)
        assert len(controller.beats) == count  # a worker that has ended sends no more


def test_a_worker_unregisters_when_it_begins_to_drain_and_still_finishes():
    controller, engine = Controller(), FakeEngine(piece_delay=0.2)
    with RunningApp(controller.app) as there:
        registration = Registration(there.url, "http://worker:1", interval=30)
        app = create_worker_app(engine, registration=registration)
        with RunningApp(app) as worker:
            wait_until(lambda: len(controller.registered) == 1)
            with httpx.stream("POST", worker.url + CHAT, json=chat_body(stream=True), trust_env=False) as answer:
                lines = answer.iter_lines()
                next(lines)
                worker.server.servers[0].get_loop().call_soon_threadsafe(app.state.limiter.start_draining)
                wait_until(lambda: len(controller.left) == 1, 5)
                assert "[DONE]" in "".join(lines)


def test_a_controller_without_unregistration_is_no_obstacle():
    controller = Controller()
    controller.app.router.routes = [route for route in controller.app.router.routes if "unregister" not in route.path]
    with RunningApp(controller.app) as there:
        with RunningApp(create_worker_app(FakeEngine(), registration=Registration(there.url, "http://worker:1"))):
            wait_until(lambda: len(controller.registered) == 1)
            begun = time.monotonic()
        assert time.monotonic() - begun < 5


def test_a_worker_serves_while_no_controller_is_there_and_finds_it_later():
    port = free_port()
    registration = Registration(f"http://127.0.0.1:{port}", "http://worker:1", interval=0.05)
    with RunningApp(create_worker_app(FakeEngine(), registration=registration)) as worker:
        assert httpx.post(worker.url + CHAT, json=chat_body(), trust_env=False).status_code == 200
        controller = Controller()
        controller.refuse = True
        with RunningApp(controller.app, port=port):
            time.sleep(0.2)
            assert controller.registered == [] and httpx.get(f"{worker.url}/ready", trust_env=False).status_code == 200
            controller.refuse = False
            wait_until(lambda: len(controller.registered) == 1)
            assert "token" not in controller.registered[0]
        time.sleep(0.2)
        again = Controller()
        with RunningApp(again.app, port=port):
            wait_until(lambda: len(again.registered) == 1 and len(again.beats) >= 2)
