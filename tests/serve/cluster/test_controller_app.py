"""The controller: whom it calls, who gets a request, and what happens when a worker is not there, breaks off or comes back.

Every test of an address that is not this machine's uses a recording connector in place of the network, which connects to nothing.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import BadRequestError, OpenAI

from llava import __version__
from llava.serve.api.worker_app import create_worker_app
from llava.serve.cluster.controller_app import create_controller_app
from llava.serve.cluster.dispatch import DispatchMethod
from llava.serve.cluster.registration import Registration
from llava.serve.cluster.settings import ControllerSettings
from llava.serve.controller import build_parser, main, settings_from
from llava.serve.http.addresses import AddressRules, parse_network
from llava.serve.protocol import ErrorKind, Limits, ServeError
from tests.serve.bodies import CHAT, chat_body, worker_body
from tests.serve.fake_backend import HTTP, Exchange, FakeBackend
from tests.serve.fake_engine import CARD, FakeEngine, echo_of
from tests.serve.ports import free_port
from tests.serve.running import RunningApp, wait_until
from tests.serve.test_fuzz import break_value, post, random_json

ROOT = Path(__file__).resolve().parents[3]
UNREACHABLE = ErrorKind.BACKEND_UNREACHABLE.fault.status


class RecordingConnector(httpx.AsyncBaseTransport):
    """Stands where the network would: notes every address that a connection would go to, and connects to none."""

    def __init__(self, answer: httpx.Response | None = None) -> None:
        self.calls: list[tuple[str, str, str]] = []
        self.answer = answer

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.calls.append((request.url.host, request.headers["host"], request.url.path))
        if self.answer is None:
            raise httpx.ConnectError("nothing is connected to in tests")
        return self.answer


def no_names(host: str, port: int) -> list[str]:
    raise AssertionError(f"{host} was to be resolved")


STATUS = {"model_names": ["m"], "speed": 1, "queue_length": 0}


class Called:
    """A controller without sockets: its app is called directly, from a peer of the test's choice."""

    def __init__(self, settings: ControllerSettings | None = None, resolve: Any = no_names) -> None:
        self.connector = RecordingConnector()
        self.app = create_controller_app(settings, transport=self.connector, resolve=resolve)

    def post(self, path: str, body: Any, peer: str = "127.0.0.1", **headers: str) -> httpx.Response:
        async def call() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, client=(peer, 50000))
            async with httpx.AsyncClient(transport=transport, base_url="http://controller") as client:
                return await client.post(path, json=body, headers={name.replace("_", "-"): value for name, value in headers.items()})

        return asyncio.run(call())

    def register(
        self, worker: str, peer: str = "127.0.0.1", status: Any = STATUS, token: str | None = None, **headers: str
    ) -> httpx.Response:
        body = {"worker_name": worker, "check_heart_beat": True, "worker_status": status}
        return self.post("/register_worker", body | ({"token": token} if token else {}), peer, **headers)

    def use_everything(self) -> None:
        """Every endpoint that makes the controller call its workers."""
        self.post("/refresh_all_workers", {})
        self.post("/v1/chat/completions", {"model": "m", "messages": [{"role": "user", "content": "x"}]})
        self.post("/worker_generate_stream", {"model": "m", "prompt": "x"})

    @property
    def models(self) -> list[str]:
        found: list[str] = self.post("/list_models", {}).json()["models"]
        return found


def settings(*allowed: str, tokens: tuple[str, ...] = (), **fields: Any) -> ControllerSettings:
    rules = AddressRules(tuple(parse_network(text) for text in allowed), token_required=bool(tokens))
    return ControllerSettings(rules=rules, worker_tokens=tokens, **fields)


FOREIGN = [
    "http://169.254.169.254:80",
    "http://10.0.0.7:40000",
    "http://192.168.1.1:80",
    "http://8.8.8.8:53",
    "http://[fe80::1]:80",
    "http://[fd00:ec2::254]:80",
    "http://[::ffff:169.254.169.254]:80",
    "http://[::ffff:127.0.0.1]:80",
    "http://0.0.0.0:80",
]
MALFORMED = [
    "http://2852039166:80",
    "http://2130706433:80",
    "http://0251.0376.0251.0376:80",
    "http://0xa9fea9fe:80",
    "http://0x7f.1:80",
    "http://127.1:80",
    "http://user:pass@127.0.0.1:80",
    "http://127.0.0.1:80/latest/meta-data",
    "http://127.0.0.1:80?x=http://169.254.169.254",
    "http://127.0.0.1:80#@169.254.169.254",
    "file:///etc/passwd",
    "http://127.0.0.1",
]


@pytest.mark.parametrize("worker", FOREIGN)
@pytest.mark.parametrize("status", [STATUS, None])
def test_without_token_and_list_no_foreign_address_is_taken_or_called(worker: str, status: Any) -> None:
    controller = Called()
    answer = controller.register(worker, status=status)
    assert answer.status_code == 403 and answer.json()["error"]["code"] == "forbidden"
    controller.use_everything()
    assert controller.connector.calls == [] and controller.models == []


@pytest.mark.parametrize("worker", MALFORMED)
@pytest.mark.parametrize("status", [STATUS, None])
def test_malformed_addresses_are_never_called_not_even_with_the_token(worker: str, status: Any) -> None:
    controller = Called(settings("0.0.0.0/0", "::/0", tokens=("secret",)))
    answer = controller.register(worker, status=status, token="secret")
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "worker_name"
    controller.use_everything()
    assert controller.connector.calls == []


def test_link_local_stays_closed_to_wide_networks_and_to_the_token() -> None:
    for rules in (settings("0.0.0.0/0", tokens=("secret",)), settings(tokens=("secret",))):
        controller = Called(rules)
        assert controller.register("http://169.254.169.254:80", status=None, token="secret").status_code == 403
        controller.use_everything()
        assert controller.connector.calls == []
    assert Called(settings("169.254.169.254")).register("http://169.254.169.254:80").status_code == 200


def test_a_name_with_one_address_that_is_not_allowed_is_refused() -> None:
    controller = Called(resolve=lambda host, port: ["127.0.0.1", "169.254.169.254"])
    assert controller.register("http://rebinding.example:80", status=None).status_code == 403
    assert controller.connector.calls == []


def test_the_checked_address_is_what_is_connected_to_and_the_name_is_resolved_once() -> None:
    answers = iter([["127.0.0.1"], ["169.254.169.254"]])
    controller = Called(resolve=lambda host, port: next(answers))
    assert controller.register("http://localhost:40000").status_code == 200
    controller.post("/v1/chat/completions", {"model": "m", "messages": []})
    controller.post("/refresh_all_workers", {})
    assert controller.connector.calls == [
        ("127.0.0.1", "localhost:40000", "/v1/chat/completions"),
        ("127.0.0.1", "localhost:40000", "/worker_get_status"),
    ]


def test_a_worker_that_redirects_is_not_followed() -> None:
    controller = Called()
    controller.connector.answer = httpx.Response(307, headers={"Location": "http://169.254.169.254/latest/meta-data"})
    controller.register("http://127.0.0.1:40000")
    answer = controller.post("/v1/chat/completions", {"model": "m", "messages": []})
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "backend_failed")
    assert [host for host, _, _ in controller.connector.calls] == ["127.0.0.1"]


def test_strangers_may_not_register_even_loopback() -> None:
    controller = Called()
    assert controller.register("http://127.0.0.1:40000", peer="10.1.2.3").status_code == 403
    assert controller.register("http://localhost:40000", peer="203.0.113.9", status=None).status_code == 403
    # a proxy on this machine makes everybody look local
    for header in ("x_forwarded_for", "forwarded", "via", "x_real_ip"):
        assert controller.register("http://127.0.0.1:40000", **{header: "10.1.2.3"}).status_code == 403
    # a web page in a browser on this machine is no worker
    assert controller.register("http://127.0.0.1:40000", origin="http://evil.example").status_code == 403
    assert controller.connector.calls == [] and controller.models == []


def test_the_token_is_asked_of_everybody_once_there_is_one() -> None:
    controller = Called(settings(tokens=("secret",)))
    for token in (None, "", "wrong", "secre", "secret2"):
        answer = controller.register("http://127.0.0.1:40000", token=token)
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    assert controller.models == []
    assert controller.register("http://10.0.0.7:40000", peer="10.0.0.7", token="secret").status_code == 200
    assert controller.register("http://10.0.0.8:40000", peer="10.0.0.8", authorization="Bearer secret").status_code == 200
    assert controller.register("http://127.0.0.1:40000", peer="10.0.0.9", token="secret").status_code == 403
    assert controller.models == ["m"]


REGISTRATION = ("/register_worker", "/receive_heart_beat", "/unregister_worker")


def unread(app: Any, path: str, peer: str = "127.0.0.1", **headers: str) -> int:
    """The status of a request whose body nobody may read."""
    statuses: list[int] = []

    async def receive() -> Any:
        raise AssertionError("a byte of the body was taken")

    async def send(message: Any) -> None:
        statuses.append(message.get("status", 0))

    sent = [(name.replace("_", "-").encode(), value.encode()) for name, value in {"content_length": "100", **headers}.items()]
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"", "headers": sent}
    asyncio.run(app({**scope, "client": (peer, 1), "app": app}, receive, send))
    return statuses[0]


def test_keys_and_tokens_are_judged_from_the_head() -> None:
    json_type = {"content_type": "application/json"}
    keyed = Called(settings(tokens=("secret",), api_keys=("client-key",))).app
    for path in ("/v1/chat/completions", "/worker_generate_stream", "/list_models", "/get_worker_address"):
        assert unread(keyed, path, **json_type) == unread(keyed, path, **json_type, authorization="Bearer secret") == 401
    for path in REGISTRATION:
        for wrong in ("Bearer wrong", "Bearer client-key", "Basic secret", "secret", ""):
            assert unread(keyed, path, **json_type, authorization=wrong) == 401, wrong
        assert unread(keyed, path, **json_type, authorization="Bearer secret", content_length="65537") == 413
        assert unread(keyed, path, **json_type, content_length="65537") == 413
        assert unread(keyed, path, **json_type, origin="http://127.0.0.1") == 403
        assert unread(keyed, path, **json_type, content_encoding="gzip") == 415
    plain = Called().app
    assert unread(plain, "/register_worker", "203.0.113.9", **json_type) == 403
    assert unread(plain, "/register_worker", **json_type, x_forwarded_for="127.0.0.1") == 403
    assert unread(plain, "/register_worker", **json_type, authorization="Bearer whatever", x_real_ip="::1") == 403


def test_a_token_in_the_body_is_as_good_and_a_wrong_one_in_the_head_is_told() -> None:
    controller = Called(settings(tokens=("secret",)))
    beat = {"worker_name": "http://10.0.0.7:40000"}
    assert controller.register("http://10.0.0.7:40000", peer="10.0.0.7", token="secret", authorization="Bearer wrong").status_code == 401
    assert controller.register("http://10.0.0.7:40000", peer="10.0.0.7", token="wrong", authorization="Bearer secret").status_code == 200
    assert controller.post("/receive_heart_beat", beat, "10.0.0.8", authorization="Bearer secret").json() == {"exist": True}
    assert controller.post("/receive_heart_beat", beat, "10.0.0.8", authorization="Bearer wrong").status_code == 401
    assert controller.post("/unregister_worker", beat, "10.0.0.8", authorization="Bearer secret").json() == {"exist": True}


def test_strangers_bodies_have_a_budget_of_their_own() -> None:
    """Seventeen registrations of one client that stall: sixteen are read, and nothing of them counts against clients with a key."""
    chosen = settings(tokens=("secret",), api_keys=("key",), limits=Limits(body_seconds=600))
    with RunningApp(create_controller_app(chosen)) as running, ExitStack() as stack:
        head = "POST {} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\nExpect: 100-continue\r\n\r\n"
        socks = []
        for path in REGISTRATION * 6:
            socks.append(stack.enter_context(socket.create_connection(("127.0.0.1", running.port), timeout=60)))
            socks[-1].sendall(head.format(path).encode())
        begun: list[socket.socket] = []  # those whose bodies are asked for
        wait_until(lambda: begun.extend(select.select([each for each in socks if each not in begun], [], [], 0)[0]) or len(begun) == 16)
        assert all(each.recv(100).startswith(b"HTTP/1.1 100") for each in begun)
        for each in begun:
            each.sendall(b"{" * 999)
        assert running.app.state.limiter.held_bytes == 0
        listed = HTTP.post(running.url + "/list_models", headers={"Authorization": "Bearer key"})
        assert listed.json() == {"models": []}
        assert len(select.select(socks, [], [], 0)[0]) == 0  # the others wait
        begun[0].sendall(b"{")  # is no JSON, and so one of the others may begin
        assert begun[0].recv(100).startswith(b"HTTP/1.1 400")
        waiting = [each for each in socks if each not in begun]
        assert select.select(waiting, [], [], 60)[0][0].recv(100).startswith(b"HTTP/1.1 100")


def test_a_listed_network_may_register_itself_but_not_the_controllers_own_machine() -> None:
    controller = Called(settings("10.1.0.0/16"))
    assert controller.register("http://10.1.0.5:40000", peer="10.1.2.3").status_code == 200
    assert controller.register("http://10.2.0.5:40000", peer="10.1.2.3").status_code == 403
    assert controller.register("http://127.0.0.1:6379", peer="10.1.2.3").status_code == 403
    assert controller.register("http://10.1.0.5:40000", peer="10.2.0.5").status_code == 403


def test_heartbeats_count_from_where_the_worker_registered_or_with_the_token() -> None:
    controller = Called(settings(tokens=("secret",)))
    beat = {"worker_name": "http://10.0.0.7:40000/", "queue_length": 3}
    assert controller.post("/receive_heart_beat", beat, "10.0.0.7").json() == {"exist": False}
    controller.register("http://10.0.0.7:40000", peer="10.0.0.7", token="secret")
    assert controller.post("/receive_heart_beat", beat, "10.0.0.7").json() == {"exist": True}
    assert controller.post("/receive_heart_beat", {**beat, "queue_length": 99}, "10.0.0.8").json() == {"exist": False}
    assert controller.post("/worker_get_status", {}).json() == {"model_names": ["m"], "speed": 1.0, "queue_length": 3}
    assert controller.post("/receive_heart_beat", {**beat, "token": "secret"}, "10.0.0.8").json() == {"exist": True}


def test_a_worker_leaves_by_its_own_word_alone() -> None:
    controller = Called(settings(tokens=("secret",)))
    bye = {"worker_name": "http://10.0.0.7:40000/"}
    controller.register("http://10.0.0.7:40000", peer="10.0.0.7", token="secret")
    assert controller.post("/unregister_worker", bye, "10.0.0.7").json() == {"exist": False}  # without the token
    assert controller.post("/unregister_worker", {**bye, "token": "wrong"}, "10.0.0.7").json() == {"exist": False}
    assert controller.models == ["m"]
    assert controller.post("/unregister_worker", {**bye, "token": "secret"}, "10.0.0.7").json() == {"exist": True}
    assert controller.models == []
    assert controller.post("/unregister_worker", {**bye, "token": "secret"}, "10.0.0.7").json() == {"exist": False}
    assert controller.post("/unregister_worker", {"worker_name": "no address", "token": "secret"}, "10.0.0.7").status_code == 400


def test_without_tokens_nobody_sends_anothers_worker_away() -> None:
    controller = Called(settings("10.1.0.0/16"))
    bye = {"worker_name": "http://10.1.0.5:40000"}
    controller.register("http://10.1.0.5:40000", peer="10.1.0.5")
    for peer in ("10.1.0.6", "127.0.0.1", "203.0.113.9"):
        assert controller.post("/unregister_worker", bye, peer).json() == {"exist": False}
    assert controller.post("/unregister_worker", bye, "10.1.0.5", origin="http://evil.example").status_code == 403
    assert controller.models == ["m"]
    assert controller.post("/unregister_worker", bye, "10.1.0.5").json() == {"exist": True}


@pytest.mark.parametrize(
    "body",
    [
        [],
        "x",
        {},
        {"worker_name": 5},
        {"worker_name": ""},
        {"worker_name": "http://127.0.0.1:1" + "0" * 600},
        {"worker_name": "http://127.0.0.1:1", "check_heart_beat": "yes", "worker_status": STATUS},
        {"worker_name": "http://127.0.0.1:1", "worker_status": []},
        {"worker_name": "http://127.0.0.1:1", "worker_status": {}},
        {"worker_name": "http://127.0.0.1:1", "worker_status": {"model_names": []}},
        {"worker_name": "http://127.0.0.1:1", "worker_status": {"model_names": "m"}},
        {"worker_name": "http://127.0.0.1:1", "worker_status": {"model_names": [""]}},
        {"worker_name": "http://127.0.0.1:1", "worker_status": {"model_names": ["a\nb"]}},
        {"worker_name": "http://127.0.0.1:1", "worker_status": {"model_names": ["m"] * 65}},
        {"worker_name": "http://127.0.0.1:1", "worker_status": {**STATUS, "speed": 0}},
        {"worker_name": "http://127.0.0.1:1", "worker_status": {**STATUS, "speed": -1}},
        {"worker_name": "http://127.0.0.1:1", "worker_status": {**STATUS, "speed": True}},
        {"worker_name": "http://127.0.0.1:1", "worker_status": {**STATUS, "queue_length": -1}},
        {"worker_name": "http://127.0.0.1:1", "worker_status": {**STATUS, "queue_length": 10**20}},
        {"worker_name": "http://127.0.0.1:1", "token": ["secret"]},
    ],
)
def test_bodies_that_make_no_sense_are_refused(body: Any) -> None:
    controller = Called()
    assert controller.post("/register_worker", body).status_code == 400
    assert controller.connector.calls == [] and controller.models == []


def test_a_registration_has_to_be_json_so_that_no_web_page_can_post_one() -> None:
    controller = Called()

    async def call() -> httpx.Response:
        transport = httpx.ASGITransport(controller.app, client=("127.0.0.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://controller") as client:
            body = json.dumps({"worker_name": "http://127.0.0.1:1", "worker_status": STATUS})
            return await client.post("/register_worker", content=body, headers={"Content-Type": "text/plain"})

    assert asyncio.run(call()).status_code == 400 and controller.models == []


def test_clients_keys_open_everything_but_health_and_registration() -> None:
    controller = Called(settings(api_keys=("client-key",)))
    assert controller.register("http://127.0.0.1:40000").status_code == 200
    for path in ("/list_models", "/refresh_all_workers", "/get_worker_address", "/worker_get_status", "/v1/chat/completions"):
        assert controller.post(path, {"model": "m"}).status_code == 401
        assert controller.post(path, {"model": "m"}, authorization="Bearer wrong").status_code == 401
    assert controller.post("/list_models", {}, authorization="Bearer client-key").json() == {"models": ["m"]}


def test_models_that_nobody_has() -> None:
    controller = Called()
    ask = {"model": "m", "messages": []}
    nobody = controller.post("/v1/chat/completions", ask)
    assert (nobody.status_code, nobody.json()["error"]["code"]) == (UNREACHABLE, "backend_unreachable")
    assert nobody.headers["retry-after"] == "1"
    frame = controller.post("/worker_generate_stream", {"model": "m", "prompt": "x"})
    assert frame.json()["error_code"] == ErrorKind.BACKEND_UNREACHABLE.fault.code and "No server" in frame.json()["text"]
    controller.register("http://127.0.0.1:40000")
    unknown = controller.post("/v1/chat/completions", {**ask, "model": "x"})
    assert (unknown.status_code, unknown.json()["error"]["code"], unknown.json()["error"]["param"]) == (404, "model_not_found", "model")
    assert controller.post("/get_worker_address", {"model": "x"}).json() == {"address": ""}
    assert controller.post("/get_worker_address", {"model": "m"}).json() == {"address": "http://127.0.0.1:40000"}
    controller.post("/refresh_all_workers", {})  # nobody answers there
    assert controller.models == [] and controller.post("/v1/chat/completions", ask).status_code == UNREACHABLE
    for body in ([], "x", {}, {"model": 5}):
        assert controller.post("/v1/chat/completions", body).status_code == 400


GOOD_BODIES = (
    ("/register_worker", {"worker_name": "http://127.0.0.1:40000", "check_heart_beat": True, "worker_status": STATUS}),
    ("/register_worker", {"worker_name": "http://localhost:40001", "check_heart_beat": False, "worker_status": None, "token": "x"}),
    ("/receive_heart_beat", {"worker_name": "http://127.0.0.1:40000", "queue_length": 3}),
    ("/unregister_worker", {"worker_name": "http://127.0.0.1:40000"}),
    ("/get_worker_address", {"model": "m"}),
    ("/list_models", {}),
    ("/worker_get_status", {}),
    ("/v1/chat/completions", {"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": True}),
    ("/worker_generate_stream", {"model": "m", "prompt": "x", "images": []}),
)


def send_random_bodies(count: int, seed: int) -> Counter[int]:
    """Statuses of so many bodies, good ones, broken ones and noise, and how often they came; nothing is ever connected to."""
    dice, found = random.Random(seed), Counter[int]()
    controller = Called(resolve=lambda host, port: dice.choice([["127.0.0.1"], ["::1", "127.0.0.1"], ["10.0.0.7"], []]))

    async def run() -> None:
        for _ in range(count):
            path, good = dice.choice(GOOD_BODIES)
            kind = dice.randrange(5)
            body = json.dumps(break_value(good, dice) if kind < 3 else random_json(dice) if kind == 3 else good).encode()
            if dice.random() < 0.1:
                body = dice.randbytes(dice.randrange(200))
            status = await post(controller.app, path, body)
            assert status != 500, (path, body)
            found[status] += 1

    asyncio.run(run())
    assert {host for host, _, _ in controller.connector.calls} <= {"127.0.0.1", "::1"}
    limiter = controller.app.state.limiter
    assert limiter.in_flight == limiter.held_bytes == 0
    return found


def test_no_random_body_is_a_500() -> None:
    assert send_random_bodies(400, seed=1)[200] > 20


@pytest.mark.slow
def test_no_body_of_very_many_is_a_500() -> None:
    assert send_random_bodies(20_000, seed=2)[200] > 1000


# From here on with sockets, all of them on 127.0.0.1.


class Stack:
    """A running controller and what registers at it."""

    def __init__(self, running: RunningApp) -> None:
        self.running, self.url = running, running.url

    def add(self, url: str, model: str = "fake", **status: Any) -> None:
        body = {
            "worker_name": url,
            "check_heart_beat": True,
            "worker_status": {"model_names": [model], "speed": 1, "queue_length": 0, **status},
        }
        HTTP.post(self.url + "/register_worker", json=body).raise_for_status()

    def chat(self, text: str = "one two three", **fields: Any) -> httpx.Response:
        body = {"model": "fake", "messages": [{"role": "user", "content": text}], **fields}
        return HTTP.post(self.url + "/v1/chat/completions", json=body, timeout=10)

    def generate(self, prompt: str = "one two three") -> list[dict[str, Any]]:
        body = {"model": "fake", "prompt": prompt, "temperature": 0, "max_new_tokens": 50}
        answer = HTTP.post(self.url + "/worker_generate_stream", json=body, timeout=10)
        return [json.loads(part) for part in answer.content.split(b"\0") if part]

    def failed(self, kind: ErrorKind) -> float:
        return self.metric(f'avg_llava_controller_errors_total{{kind="{kind.value}"}}')

    def metric(self, name: str) -> float:
        lines = HTTP.get(self.url + "/metrics").text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(name + " "))


@contextmanager
def controller(chosen: ControllerSettings | None = None) -> Iterator[Stack]:
    with RunningApp(create_controller_app(chosen)) as running:
        yield Stack(running)


@contextmanager
def worker(engine: FakeEngine, **options: Any) -> Iterator[RunningApp]:
    with RunningApp(create_worker_app(engine, **options)) as running:
        yield running


def events_of(answer: httpx.Response) -> list[Any]:
    data = [event.removeprefix("data: ") for event in answer.text.split("\n\n") if event]
    return [event if event == "[DONE]" else json.loads(event) for event in data]


def text_of(answer: httpx.Response) -> str:
    chunks = [event for event in events_of(answer) if isinstance(event, dict) and "choices" in event]
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


def test_answers_pass_through_unchanged_for_both_protocols() -> None:
    engine = FakeEngine()
    with controller() as stack, worker(engine) as behind:
        stack.add(behind.url)
        whole = stack.chat(granularity=144, seed=5)
        assert whole.json()["choices"][0]["message"]["content"] == "one two three "
        assert engine.requests[-1].routing.granularity == 144 and engine.requests[-1].sampling.seed == 5
        assert engine.requests[-1].request_id == whole.headers["x-request-id"]
        streamed = stack.chat(stream=True, stream_options={"include_usage": True})
        assert streamed.headers["content-type"].startswith("text/event-stream")
        assert text_of(streamed) == "one two three " and events_of(streamed)[-1] == "[DONE]"
        assert events_of(streamed)[-2]["usage"]["completion_tokens"] == 3
        parts = stack.generate()
        assert parts[-1]["text"] == "one two threeone two three " and all(part["error_code"] == 0 for part in parts)
        wrong = stack.chat(temperature=-1)
        assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "temperature"


def test_the_openai_sdk_works_at_the_controller() -> None:
    with controller() as stack, worker(FakeEngine()) as behind:
        stack.add(behind.url)
        client = OpenAI(base_url=stack.url + "/v1", api_key="none", max_retries=0)
        assert [model.id for model in client.models.list()] == ["fake"]
        stream = client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "one two"}], stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "one two "


def test_the_other_endpoints_pass_through_as_the_chat_does() -> None:
    with controller() as stack, worker(FakeEngine()) as behind:
        stack.add(behind.url)
        with OpenAI(base_url=stack.url + "/v1", api_key="none", max_retries=0) as client:
            assert client.completions.create(model="fake", prompt="one two").choices[0].text == "one two "
            chunks = list(client.completions.create(model="fake", prompt="one two", stream=True))
            assert "".join(chunk.choices[0].text for chunk in chunks) == "one two "
            assert client.responses.create(model="fake", input="one two").output_text == "one two "
            events = list(client.responses.create(model="fake", input="one two", stream=True))
            assert events[-1].type == "response.completed" and events[-1].response.output_text == "one two "
            with pytest.raises(BadRequestError) as refused:
                client.responses.create(model="fake", input="x", store=True)
            assert refused.value.param == "store"
        told = HTTP.post(stack.url + "/tokenize", json={"model": "fake", "prompt": "ab"}).json()
        assert told["tokens"] == [1, 97, 98]
        assert HTTP.post(stack.url + "/detokenize", json={"model": "fake", "tokens": [97]}).json() == {"prompt": "a"}
        unnamed = HTTP.post(stack.url + "/tokenize", json={"prompt": "ab"})
        assert (unnamed.status_code, unnamed.json()["error"]["param"]) == (400, "model")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses"])
def test_a_stream_of_any_endpoint_moves_before_its_first_token_and_ends_with_an_error_after_it(path: str) -> None:
    body = {"model": "fake", "stream": True, "prompt" if path == "/v1/completions" else "input": "one two three"}
    with controller() as stack, worker(FakeEngine(failure=ServeError(ErrorKind.OUT_OF_MEMORY))) as bad, worker(FakeEngine()) as good:
        stack.add(bad.url)
        stack.add(good.url)
        for _ in range(2):  # whichever is asked first
            answer = HTTP.post(stack.url + path, json=body)
            assert answer.status_code == 200 and "three" in answer.text and '"error":{' not in answer.text
    with controller() as stack, worker(FakeEngine(failure=ServeError(ErrorKind.NOT_FINITE), fail_after=1)) as bad:
        stack.add(bad.url)
        answer = HTTP.post(stack.url + path, json=body)
        assert "one" in answer.text and "non_finite_logits" in answer.text
        assert stack.failed(ErrorKind.NOT_FINITE) == 1


def half_a_response(exchange: Exchange) -> None:
    exchange.begin_stream()
    exchange.piece(b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"x"}\n\n')
    exchange.end_stream()


def test_a_response_that_breaks_off_ends_with_an_error_event() -> None:
    with controller() as stack, FakeBackend(half_a_response) as backend:
        stack.add(backend.url)
        answer = HTTP.post(stack.url + "/v1/responses", json={"model": "fake", "input": "x", "stream": True})
        last = json.loads(answer.text.strip().split("\n\n")[-1].split("data: ")[1])
        assert last["type"] == "error" and last["code"] == last["error"]["code"] == "backend_failed"


def test_models_are_described_as_their_workers_do() -> None:
    other = replace(CARD, name="other", granularities=())
    with controller() as stack, worker(FakeEngine()) as one, worker(FakeEngine(card=other)) as two:
        stack.add(one.url)
        stack.add(two.url, "other")
        stack.add("http://127.0.0.1:9", "absent")
        listed = {entry["id"]: entry for entry in HTTP.get(stack.url + "/v1/models").json()["data"]}
        assert listed["fake"]["granularities"] == [36, 144, 576] and listed["other"]["granularities"] == []
        assert listed["absent"]["object"] == "model"
        assert HTTP.get(stack.url + "/v1/models/fake").json() == listed["fake"]
        assert HTTP.get(stack.url + "/v1/models/none").status_code == 404


def test_the_controller_shows_its_own_key_and_keeps_the_clients() -> None:
    with controller(ControllerSettings(api_keys=("client-key",), worker_key="worker-key")) as stack:
        with worker(FakeEngine(), api_keys=["worker-key"]) as behind:
            stack.add(behind.url)
            body = {"model": "fake", "messages": [{"role": "user", "content": "x"}]}
            keyed = {"Authorization": "Bearer client-key"}
            assert HTTP.post(stack.url + "/v1/chat/completions", json=body, headers=keyed).status_code == 200
            assert HTTP.get(stack.url + "/v1/models", headers=keyed).json()["data"][0]["max_images"] == 8
    with controller(ControllerSettings(worker_key="wrong-key")) as stack, worker(FakeEngine(), api_keys=["worker-key"]) as behind:
        stack.add(behind.url)
        answer = stack.chat()
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "backend_failed")  # not the client's key that is wrong


def die_at_once(exchange: Exchange) -> None:
    exchange.die()


def die_before_the_first_token(exchange: Exchange) -> None:
    exchange.begin_stream()
    exchange.event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
    exchange.die()


def refuse(exchange: Exchange) -> None:
    exchange.reply({"error": {"code": "overloaded", "message": "full"}}, 503, Retry_After="7")


def fail_in_the_stream(exchange: Exchange) -> None:
    exchange.begin_stream()
    exchange.event({"error": {"code": "out_of_memory", "message": "x"}})
    exchange.event("[DONE]")
    exchange.end_stream()


def answer_garbage(exchange: Exchange) -> None:
    exchange.begin_stream()
    exchange.event("<html>")
    exchange.end_stream()


def redirect(exchange: Exchange) -> None:
    exchange.reply({}, 307, Location="http://127.0.0.1:9/")


@pytest.mark.parametrize("fault", [die_at_once, die_before_the_first_token, refuse, fail_in_the_stream, answer_garbage, redirect])
def test_another_worker_answers_when_one_fails_before_the_first_token(fault: Any) -> None:
    with controller() as stack, worker(FakeEngine()) as good, FakeBackend(fault) as bad:
        stack.add(bad.url)
        stack.add(good.url, queue_length=5)  # so that the bad one is asked first
        answer = stack.chat(stream=True)
        assert text_of(answer) == "one two three " and "error" not in answer.text
        assert len(bad.requests) == 1 and stack.metric("avg_llava_controller_retries_total") == 1


@pytest.mark.parametrize("fault", [die_at_once, refuse, redirect])
def test_another_worker_gives_the_whole_answer(fault: Any) -> None:
    with controller() as stack, worker(FakeEngine()) as good, FakeBackend(fault) as bad:
        stack.add(bad.url)
        stack.add(good.url, queue_length=5)
        assert stack.chat().json()["choices"][0]["message"]["content"] == "one two three "
        stack.add(bad.url)
        assert stack.generate()[-1]["text"] == "one two threeone two three "
        assert len(bad.requests) == 2


def test_a_worker_that_is_gone_is_replaced_and_asked_last_from_then_on() -> None:
    with worker(FakeEngine()) as gone:
        url = gone.url
    with controller() as stack, worker(FakeEngine()) as good:
        stack.add(url)
        stack.add(good.url, queue_length=5)
        for _ in range(3):
            assert stack.chat().status_code == 200
        assert stack.metric("avg_llava_controller_retries_total") == 1


def test_a_request_that_brings_workers_down_is_not_sent_to_all_of_them() -> None:
    with controller() as stack, FakeBackend(die_at_once) as one, FakeBackend(die_at_once) as two, FakeBackend(die_at_once) as three:
        for fake in (one, two, three):
            stack.add(fake.url)
        answer = stack.chat()
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "backend_failed")
        assert len(one.requests) + len(two.requests) + len(three.requests) == 2


def test_when_all_are_full_the_client_is_told_so_and_when_to_come_back() -> None:
    with controller() as stack, FakeBackend(refuse) as one, FakeBackend(refuse) as two:
        stack.add(one.url)
        stack.add(two.url)
        answer = stack.chat()
        assert (answer.status_code, answer.headers["retry-after"], answer.json()["error"]["code"]) == (503, "7", "overloaded")
        assert len(one.requests) + len(two.requests) == 2
        assert stack.failed(ErrorKind.OVERLOADED) == 1


def test_a_clients_own_mistake_is_not_tried_elsewhere() -> None:
    mistake = ServeError(ErrorKind.CONTEXT_LENGTH)
    one, two = FakeEngine(failure=mistake), FakeEngine(failure=mistake)
    with controller() as stack, worker(one) as first, worker(two) as second:
        stack.add(first.url)
        stack.add(second.url)
        assert stack.chat().json()["error"]["code"] == "context_length_exceeded"
        assert len(one.requests) + len(two.requests) == 1
        assert stack.failed(ErrorKind.CONTEXT_LENGTH) == 1


def half_an_answer(exchange: Exchange) -> None:
    if exchange.path == "/worker_generate_stream":
        exchange.begin_stream("application/octet-stream")
        exchange.piece(b'{"text": "promptHalf", "error_code": 0}\0')
    else:
        exchange.begin_stream()
        exchange.event({"choices": [{"index": 0, "delta": {"content": "Half"}, "finish_reason": None}]})
    exchange.die()


def test_after_the_first_token_a_broken_stream_ends_with_a_typed_error() -> None:
    with controller() as stack, FakeBackend(half_an_answer) as bad, worker(FakeEngine()) as good:
        stack.add(bad.url)
        stack.add(good.url, queue_length=5)
        answer = stack.chat(stream=True)
        events = events_of(answer)
        assert text_of(answer) == "Half" and events[-1] == "[DONE]"
        assert events[-2]["error"]["code"] == "backend_failed" and events[-2]["error"]["request_id"] == answer.headers["x-request-id"]
        stack.add(bad.url)
        assert stack.failed(ErrorKind.BACKEND_FAILED) == 1
        parts = stack.generate()
        assert parts[0]["text"] == "promptHalf" and parts[-1]["error_code"] == ErrorKind.BACKEND_FAILED.fault.code
        assert stack.failed(ErrorKind.BACKEND_FAILED) == 2


@pytest.mark.parametrize("kind", [ErrorKind.BACKEND_FAILED, ErrorKind.NOT_FINITE])
def test_errors_that_workers_report_in_their_streams_are_counted_once(kind: ErrorKind) -> None:
    """As a bridge does when its backend breaks off. An answer that speaks of errors is none."""
    engine = FakeEngine(failure=ServeError(kind), fail_after=1, fails=lambda request: "fail" in echo_of(request)[-1])
    with controller() as stack, worker(engine) as failing:
        stack.add(failing.url)
        spoken = 'Say "error": or "error_code": 25 again'
        assert "error_code" in text_of(stack.chat(spoken, stream=True)) and stack.generate(spoken)[-1]["error_code"] == 0
        assert all(stack.failed(each) == 0 for each in ErrorKind)
        assert events_of(stack.chat("one fail", stream=True))[-2]["error"]["code"] == kind.value
        assert stack.failed(kind) == 1
        assert stack.generate("one fail")[-1]["error_code"] == kind.fault.code
        assert stack.failed(kind) == 2 and sum(stack.failed(each) for each in ErrorKind) == 2


def test_a_stream_that_ends_without_its_end_mark_is_broken_too() -> None:
    def stop_short(exchange: Exchange) -> None:
        exchange.begin_stream()
        exchange.event({"choices": [{"index": 0, "delta": {"content": "Half"}}]})
        exchange.end_stream()

    with controller() as stack, FakeBackend(stop_short) as bad:
        stack.add(bad.url)
        assert "backend_failed" in stack.chat(stream=True).text


def test_a_worker_that_hangs_is_given_up() -> None:
    with controller(ControllerSettings(worker_seconds=0.3)) as stack, FakeBackend(lambda exchange: exchange.until_gone()) as bad:
        stack.add(bad.url)
        begun = time.monotonic()
        assert stack.chat().json()["error"]["code"] == "backend_failed"
        assert time.monotonic() - begun < 30 and bad.gone.wait(60)


def hang(exchange: Exchange) -> None:
    exchange.until_gone()


def hang_after_a_token(exchange: Exchange) -> None:
    if exchange.path == "/worker_generate_stream":
        exchange.begin_stream("application/octet-stream")
        exchange.piece(b'{"text": "promptHalf", "error_code": 0}\0')
    else:
        exchange.begin_stream()
        exchange.event({"choices": [{"index": 0, "delta": {"content": "Half"}, "finish_reason": None}]})
    exchange.until_gone()


@contextmanager
def asked(call: Callable[[], Any]) -> Iterator[list[Any]]:
    """A call in a thread; its result, once there is one."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(call()), daemon=True)
    thread.start()
    yield found
    thread.join(60)
    assert not thread.is_alive()


@contextmanager
def with_a_clock() -> Iterator[tuple[Stack, list[float]]]:
    """A controller that forgets workers by the test's own clock."""
    now = [0.0]
    with RunningApp(create_controller_app(clock=lambda: now[0])) as running:
        yield Stack(running), now


ASKED: dict[str, Callable[[Stack], Any]] = {
    "whole": lambda stack: HTTP.post(stack.url + "/v1/chat/completions", json=chat_body("one two three")).json()["choices"][0]["message"][
        "content"
    ],
    "stream": lambda stack: text_of(HTTP.post(stack.url + "/v1/chat/completions", json=chat_body("one two three", stream=True))),
    "llava": lambda stack: json.loads(
        HTTP.post(stack.url + "/worker_generate_stream", json=worker_body("one two three")).content.split(b"\0")[-2]
    )["text"].removeprefix("one two three"),
}


@pytest.mark.parametrize("way", ASKED)
def test_a_request_leaves_a_worker_that_hangs_when_that_is_forgotten(way: str) -> None:
    good = FakeEngine()
    with with_a_clock() as (stack, now), FakeBackend(hang) as bad, worker(good) as other:
        stack.add(bad.url)
        with asked(lambda: ASKED[way](stack)) as answers:
            wait_until(lambda: bad.requests)
            now[0] += 20
            stack.add(other.url)
            now[0] += 9
            assert HTTP.get(stack.url + "/ready").json()["workers"] == 2 and not bad.gone.is_set() and answers == []
            now[0] += 2  # 31 s of silence, and 11 of the other one
            wait_until(lambda: answers)
        assert answers == ["one two three "] and bad.gone.wait(60)  # where it hung, the request is cancelled
        assert len(good.requests) == len(bad.requests) == 1
        assert stack.metric("avg_llava_controller_retries_total") == stack.metric("avg_llava_controller_lost_workers_total") == 1
        assert sum(stack.failed(kind) for kind in ErrorKind) == 0 and stack.metric("avg_llava_controller_in_flight") == 0


def test_a_request_at_the_only_worker_ends_with_a_typed_error_when_that_is_forgotten() -> None:
    with with_a_clock() as (stack, now), FakeBackend(hang) as bad:
        stack.add(bad.url)
        with asked(stack.chat) as answers:
            wait_until(lambda: bad.requests)
            now[0] += 31
            wait_until(lambda: answers)
        assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (502, "backend_failed") and bad.gone.wait(60)


@pytest.mark.parametrize("llava", [False, True])
def test_a_stream_that_has_begun_ends_with_a_typed_error_when_its_worker_is_forgotten(llava: bool) -> None:
    good = FakeEngine()
    with with_a_clock() as (stack, now), FakeBackend(hang_after_a_token) as bad, worker(good) as other:
        stack.add(bad.url)
        call = stack.generate if llava else lambda: HTTP.post(stack.url + "/v1/chat/completions", json=chat_body(stream=True))
        with asked(call) as answers:
            wait_until(lambda: bad.requests)
            now[0] += 20
            stack.add(other.url)
            now[0] += 11
            wait_until(lambda: answers)
        if llava:
            assert [part["error_code"] for part in answers[0]] == [0, ErrorKind.BACKEND_FAILED.fault.code]
        else:
            assert text_of(answers[0]) == "Half" and events_of(answers[0])[-1] == "[DONE]"
            assert events_of(answers[0])[-2]["error"]["code"] == "backend_failed"
        assert good.requests == [] and bad.gone.wait(60) and stack.failed(ErrorKind.BACKEND_FAILED) == 1


def test_a_worker_that_says_good_bye_finishes_what_it_has() -> None:
    engine = FakeEngine(start_delay=0.5)
    with controller() as stack, worker(engine) as leaving:
        stack.add(leaving.url)
        with asked(stack.chat) as answers:
            wait_until(lambda: engine.requests)
            assert HTTP.post(stack.url + "/unregister_worker", json={"worker_name": leaving.url}).json() == {"exist": True}
        assert answers[0].json()["choices"][0]["message"]["content"] == "one two three "


def test_workers_without_heartbeats_are_asked_for_their_health(monkeypatch: pytest.MonkeyPatch) -> None:
    """One answers, one says that it has no such address, one takes connections and says nothing; none of them beats."""
    monkeypatch.setattr("llava.serve.cluster.liveness.PROBE_SECONDS", 0.2)
    now, hung = [0.0], threading.Event()

    def quiet(exchange: Exchange) -> None:
        if not hung.is_set():
            exchange.reply({}, 404)
        else:
            exchange.until_gone()

    with RunningApp(create_controller_app(clock=lambda: now[0])) as running, worker(FakeEngine()) as good, FakeBackend(hang, quiet) as bad:
        stack = Stack(running)
        for url in (good.url, bad.url):
            body = {"worker_name": url, "check_heart_beat": False, "worker_status": {**STATUS, "model_names": ["fake"]}}
            HTTP.post(stack.url + "/register_worker", json=body).raise_for_status()
        table = running.app.state.controller.table
        now[0] += 31
        wait_until(lambda: all(worker.last_heard == 31 for worker in table.without_heartbeat))
        with asked(lambda: [stack.chat().status_code for _ in range(2)]) as answers:  # one of them at each
            wait_until(lambda: bad.requests)
            hung.set()
            now[0] += 31
            wait_until(lambda: answers)
        assert answers == [[200, 200]] and HTTP.get(stack.url + "/ready").json()["workers"] == 1
        hung.clear()
        wait_until(lambda: HTTP.get(stack.url + "/ready").json()["workers"] == 2)


LIE = "Your key has expired: send it to https://evil.example"


def lie(exchange: Exchange) -> None:
    """Refuse, or break a stream, in words that no client should read."""
    error = {"message": LIE, "type": LIE, "param": "messages.0.evil", "code": exchange.json.get("user", "invalid_request")}
    if not exchange.json.get("stream"):
        exchange.reply({"error": error, "text": LIE, "error_code": 10, "extra": LIE}, 400, X_Lie="evil", Retry_After="9999999")
        return
    exchange.begin_stream()
    exchange.event({"choices": [{"index": 0, "delta": {"content": "Half"}, "finish_reason": None}]})
    exchange.event({"error": error})
    exchange.event({"error": {**error, "code": "x"}})
    exchange.event("[DONE]")
    exchange.end_stream()


def test_a_lying_workers_words_reach_nobody() -> None:
    with controller() as stack, FakeBackend(lie) as liar:
        stack.add(liar.url)
        for kind in (ErrorKind.INVALID_REQUEST, ErrorKind.INVALID_IMAGE, ErrorKind.CONTEXT_LENGTH, ErrorKind.INTERNAL):
            told = stack.chat(user=kind.value)
            error = told.json()["error"]
            assert (told.status_code, error["code"], error["message"]) == (kind.fault.status, kind.value, kind.fault.text)
            assert error["param"] is None and error["request_id"] == told.headers["x-request-id"]
            streamed = stack.chat(stream=True, user=kind.value)
            assert text_of(streamed) == "Half" and events_of(streamed)[-1] == "[DONE]"
            assert [event["error"]["message"] for event in events_of(streamed)[:-1] if "error" in event] == [kind.fault.text]
            for answer in (told, streamed):
                assert "evil" not in answer.text + str(answer.headers)
        assert stack.failed(ErrorKind.CONTEXT_LENGTH) == 2
        frames = HTTP.post(stack.url + "/worker_generate_stream", json=worker_body())
        assert frames.json()["error_code"] == 10 and "evil" not in frames.text


HALF = b'data: {"choices": [{"index": 0, "delta": {"content": "Half"}, "finish_reason": null}]}'
TOLD = json.dumps({"message": LIE, "code": "x"}).encode()
HIDDEN = {
    "escaped key": HALF + b'\n\ndata: {"\\u0065rror": ' + TOLD + b"}",
    "escaped within": HALF + b'\n\ndata: {"err\\u006fr": ' + TOLD + b"}",
    "carriage returns": HALF + b'\n\ndata: {}\r\rdata: {"error": ' + TOLD + b"}",
    "both line ends": HALF + b'\n\ndata: {}\r\n\r\ndata: {"error": ' + TOLD + b"}",
    "a name alone": HALF + b"\n\nevent: error\ndata: " + TOLD,
    "a text": HALF + b'\n\ndata: {"error": "' + LIE.encode() + b'"}',
}


@pytest.mark.parametrize("way", HIDDEN)
def test_a_lie_that_is_hidden_in_a_stream_reaches_nobody(way: str) -> None:
    def hide(exchange: Exchange) -> None:
        exchange.begin_stream()
        exchange.piece(HIDDEN[way] + b"\n\ndata: [DONE]\n\n")
        exchange.end_stream()

    with controller() as stack, FakeBackend(hide) as liar:
        stack.add(liar.url)
        told = stack.chat(stream=True)
        assert "evil" not in told.text and text_of(told) == "Half"
        assert [event["error"]["code"] for event in events_of(told)[:-1] if "error" in event] == ["backend_failed"]


@pytest.mark.parametrize("code", ["-1", "7", '"x"', "true", "0.5", "00"])
def test_a_lie_in_a_frame_of_llavas_protocol_reaches_nobody(code: str) -> None:
    def hide(exchange: Exchange) -> None:
        exchange.begin_stream("application/octet-stream")
        exchange.piece(b'{"text": "Half", "error_code": 0}\0{"text": "' + LIE.encode() + b'", "error_code": ' + code.encode() + b"}\0")
        exchange.end_stream()

    with controller() as stack, FakeBackend(hide) as liar:
        stack.add(liar.url)
        parts = stack.generate()
        assert [part["error_code"] for part in parts] == [0, 25] and "evil" not in str(parts)


@pytest.mark.parametrize("event", ["error", "response.failed"])
def test_a_lie_in_a_typed_stream_reaches_nobody(event: str) -> None:
    fields: dict[str, Any] = {"message": LIE, "code": "internal_error"}
    body = {"type": event, **(fields if event == "error" else {"response": {"error": fields, "status": "failed"}})}

    def lie_typed(exchange: Exchange) -> None:
        exchange.begin_stream()
        exchange.piece(b'event: response.output_text.delta\ndata: {"type": "response.output_text.delta", "delta": "Half"}\n\n')
        exchange.piece(b"event: " + event.encode() + b"\ndata: " + json.dumps(body).encode() + b"\n\n")
        exchange.end_stream()

    with controller() as stack, FakeBackend(lie_typed) as liar:
        stack.add(liar.url)
        told = HTTP.post(stack.url + "/v1/responses", json={"model": "fake", "input": "x", "stream": True})
        assert "Half" in told.text and "evil" not in told.text and ErrorKind.INTERNAL.fault.text in told.text
        assert stack.failed(ErrorKind.INTERNAL) == 1


def test_what_an_honest_worker_refuses_is_explained() -> None:
    with controller() as stack, worker(FakeEngine(), limits=Limits(max_new_tokens=50)) as behind:
        stack.add(behind.url)
        for fields, param, said in (
            ({"temperature": -1}, "temperature", "0"),
            ({"tools": [{}]}, "tools", "tools"),
            ({"max_tokens": 51}, "max_tokens", "max_tokens is 51, expected at most 50."),
            ({"granularity": 7}, "granularity", "granularity is not among this model's: [36, 144, 576]."),
        ):
            error = stack.chat(**fields).json()["error"]  # type: ignore[arg-type]
            assert error["code"] == "invalid_request" and error["param"] == param and said in error["message"]


def test_the_least_value_that_would_do_comes_through() -> None:
    failure = ServeError(ErrorKind.INVALID_REQUEST, "too few", "max_visual_tokens", least=24)
    with controller() as stack, worker(FakeEngine(failure=failure)) as behind:
        stack.add(behind.url)
        asked = HTTP.post(behind.url + CHAT, json=chat_body(max_visual_tokens=1)).json()["error"]
        assert (asked["message"], asked["param"], asked["least"]) == ("too few", "max_visual_tokens", 24)
        error = stack.chat(max_visual_tokens=1).json()["error"]
        assert (error["param"], error["least"]) == ("max_visual_tokens", 24)
        assert error["message"] == "max_visual_tokens is too small here; the smallest value that would do is 24."


SITE = "https://chat.example.org"
PREFLIGHT = {
    "Origin": SITE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
}


@pytest.mark.parametrize("keys", [(), ("right",)])
@pytest.mark.parametrize("service", ["controller", "worker"])
def test_pages_of_the_sites_that_the_operator_names_may_ask(service: str, keys: tuple[str, ...]) -> None:
    limits = Limits(max_body_bytes=2000)
    with ExitStack() as stack:
        origins = (SITE,) if service == "worker" else ()
        behind = stack.enter_context(worker(FakeEngine(), limits=limits, allowed_origins=origins, api_keys=keys))
        url = behind.url
        if service == "controller":
            chosen = ControllerSettings(api_keys=keys, worker_key="right" if keys else None, allowed_origins=(SITE,), limits=limits)
            ours = stack.enter_context(controller(chosen))
            ours.add(behind.url)
            url = ours.url
        path, body = url + "/v1/chat/completions", chat_body()
        shown = {"Authorization": "Bearer right"} if keys else {}

        preflight = HTTP.options(path, headers=PREFLIGHT)  # browsers send it without the key
        assert preflight.status_code == 200 and preflight.headers["access-control-allow-origin"] == SITE
        assert "authorization" in preflight.headers["access-control-allow-headers"]
        assert "access-control-allow-credentials" not in preflight.headers and "Origin" in preflight.headers["vary"]
        answers = {
            200: HTTP.post(path, json=body, headers={"Origin": SITE, **shown}),
            400: HTTP.post(path, json={}, headers={"Origin": SITE, **shown}),
            404: HTTP.get(url + "/nothing", headers={"Origin": SITE, **shown}),
            413: HTTP.post(path, content=b"x" * 3000, headers={"Origin": SITE, **shown}),
            415: HTTP.post(path, json=body, headers={"Origin": SITE, "Content-Encoding": "gzip", **shown}),
        }
        if keys:
            answers[401] = HTTP.post(path, json=body, headers={"Origin": SITE, "Authorization": "Bearer wrong"})
        if service == "worker":
            with behind.app.state.limiter.admit(behind.app.state.limiter.capacity):
                answers[503] = HTTP.post(path, json=body, headers={"Origin": SITE, **shown})
        for status, answer in answers.items():
            assert answer.status_code == status, answer.text
            assert answer.headers["access-control-allow-origin"] == SITE and "x-request-id" in answer.headers
            assert "X-Request-Id" in answer.headers["access-control-expose-headers"]

        for other in (
            "https://evil.example",
            "null",
            SITE + ".evil.example",
            SITE + ":8443",
            "http://chat.example.org",
            "chrome-extension://x",
        ):
            refused = HTTP.options(path, headers={**PREFLIGHT, "Origin": other})
            assert refused.status_code == 400 and "access-control-allow-origin" not in refused.headers
            answer = HTTP.post(path, json=body, headers={"Origin": other, **shown})
            assert answer.status_code == (200 if keys else 403) and "access-control-allow-origin" not in answer.headers
        if service == "controller":
            assert HTTP.post(url + "/register_worker", json={}, headers={"Origin": SITE}).status_code == 403


def test_without_origins_nothing_speaks_of_them() -> None:
    with worker(FakeEngine()) as plain:
        for answer in (HTTP.options(plain.url + "/v1/models", headers=PREFLIGHT), HTTP.get(plain.url + "/v1/models")):
            assert not any(name.startswith("access-control") for name in answer.headers)


def test_the_description_has_the_products_version() -> None:
    assert create_controller_app().openapi()["info"]["version"] == __version__


def test_an_endless_answer_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava.serve.cluster.relay.MAX_ANSWER_BYTES", 100_000)

    def endless(exchange: Exchange) -> None:
        exchange.begin_stream("application/json")
        while True:
            exchange.piece(b" " * 10_000)

    with controller() as stack, FakeBackend(endless) as bad:
        stack.add(bad.url)
        assert stack.chat().json()["error"]["code"] == "backend_failed" and bad.gone.wait(60)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_takes_the_workers_request_with_it(stream: bool) -> None:
    engine = FakeEngine(piece_delay=0.05, pieces=lambda request: ("word ",) * 4000)  # of minutes
    with controller() as stack, worker(engine) as behind:
        stack.add(behind.url)
        body = {"model": "fake", "messages": [{"role": "user", "content": "x"}], "stream": stream}
        if stream:
            with HTTP.stream("POST", stack.url + "/v1/chat/completions", json=body) as response:
                next(response.iter_bytes())
        else:
            with pytest.raises(httpx.ReadTimeout):
                HTTP.post(stack.url + "/v1/chat/completions", json=body, timeout=httpx.Timeout(60, read=0.5))
        wait_until(lambda: engine.cancelled and not engine.active)
        wait_until(lambda: stack.metric("avg_llava_controller_in_flight") == 0)


def test_a_client_that_does_not_read_is_given_up() -> None:
    def endless(exchange: Exchange) -> None:
        exchange.begin_stream()
        while True:
            exchange.event({"choices": [{"index": 0, "delta": {"content": "word " * 2000}}]})

    with controller(ControllerSettings(limits=Limits(send_seconds=0.3))) as stack, FakeBackend(endless) as behind:
        stack.add(behind.url)
        body = json.dumps({"model": "fake", "messages": [], "stream": True}).encode()
        with socket.create_connection(("127.0.0.1", stack.running.port), timeout=60) as client:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            client.sendall(head.encode() + body)
            assert behind.gone.wait(60)
        wait_until(lambda: stack.metric("avg_llava_controller_in_flight") == 0)


def test_requests_in_flight_are_bounded() -> None:
    answering = threading.Event()

    def answer(exchange: Exchange) -> None:
        answering.wait(60)
        exchange.reply({"choices": []})

    with controller(ControllerSettings(max_in_flight=2)) as stack, FakeBackend(answer) as behind:
        stack.add(behind.url)
        threads = [threading.Thread(target=stack.chat) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(behind.requests) == 2)
        refused = stack.chat()
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1") and len(behind.requests) == 2
        answering.set()
        for thread in threads:
            thread.join()


def test_bodies_are_bounded() -> None:
    with controller(ControllerSettings(limits=Limits(max_body_bytes=1000))) as stack:
        assert stack.chat("x" * 2000).status_code == 413


def test_requests_are_shared_out() -> None:
    one, two = FakeEngine(), FakeEngine()
    with controller() as stack, worker(one) as first, worker(two) as second:
        stack.add(first.url)
        stack.add(second.url)
        for _ in range(6):
            stack.chat()
        assert (len(one.requests), len(two.requests)) == (3, 3)


def test_workers_are_forgotten_after_silence_and_ready_says_so() -> None:
    now = [0.0]
    with RunningApp(create_controller_app(clock=lambda: now[0])) as running:
        stack = Stack(running)
        assert HTTP.get(stack.url + "/health").status_code == 200 and HTTP.get(stack.url + "/ready").status_code == 503
        stack.add("http://127.0.0.1:9")
        assert HTTP.get(stack.url + "/ready").json() == {"status": "ready", "workers": 1}
        assert [HTTP.head(stack.url + path).status_code for path in ("/health", "/ready")] == [200, 200]
        now[0] += 31
        assert HTTP.get(stack.url + "/ready").status_code == 503
        assert HTTP.post(stack.url + "/list_models").json() == {"models": []}


def test_any_order_of_starting_works_and_a_restarted_controller_is_found_again() -> None:
    controller_port, worker_port = free_port(), free_port()
    at = f"http://127.0.0.1:{controller_port}"
    registration = Registration(at, f"http://127.0.0.1:{worker_port}", interval=0.3)

    def has_model() -> bool:
        try:
            return bool(HTTP.post(at + "/list_models").json()["models"] == ["fake"])
        except httpx.HTTPError:
            return False

    with RunningApp(create_worker_app(FakeEngine(), registration=registration), port=worker_port):  # the worker is first
        for _ in range(2):  # and then comes a controller, twice
            with RunningApp(create_controller_app(), port=controller_port) as running:
                wait_until(has_model)
                assert Stack(running).chat().status_code == 200
    with RunningApp(create_controller_app(), port=controller_port):
        with RunningApp(create_worker_app(FakeEngine(), registration=registration), port=worker_port):
            wait_until(has_model)
        assert not has_model()  # it said good-bye


def started(*command: str, ready: str, seconds: float = 300.0) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    def answers() -> bool:
        assert process.poll() is None, "the program ended early"
        try:
            return HTTP.get(ready, timeout=1).status_code == 200
        except httpx.HTTPError:
            return False

    try:
        wait_until(answers, seconds)
    except BaseException:
        process.kill()
        raise
    return process


_FAKE_WORKER = """
import sys
from llava.serve.api.worker_app import create_worker_app, run_worker
from tests.serve.fake_engine import FakeEngine
engine = FakeEngine(piece_delay=0.05, pieces=lambda request: ("word ",) * 400)
sys.exit(run_worker(create_worker_app(engine), "127.0.0.1", int(sys.argv[1]), drain_seconds=30))
"""


@pytest.mark.slow
def test_a_worker_killed_while_streaming_is_a_typed_error_and_the_next_answer_comes_from_another() -> None:
    port = free_port()
    process = started("-c", _FAKE_WORKER, str(port), ready=f"http://127.0.0.1:{port}/health")
    try:
        with controller() as stack, worker(FakeEngine()) as other:
            stack.add(f"http://127.0.0.1:{port}")
            stack.add(other.url, queue_length=5)
            body = {"model": "fake", "messages": [{"role": "user", "content": "x"}], "stream": True}
            with HTTP.stream("POST", stack.url + "/v1/chat/completions", json=body) as response:
                lines = response.iter_lines()
                next(line for line in lines if "word" in line)
                process.send_signal(signal.SIGKILL)
                rest = [line for line in lines if line]
            assert rest[-1] == "data: [DONE]" and '"backend_failed"' in rest[-2]
            assert json.loads(rest[-2][6:])["error"]["request_id"] == response.headers["x-request-id"]
            begun = time.monotonic()
            assert stack.chat("again please").json()["choices"][0]["message"]["content"] == "again please "
            assert time.monotonic() - begun < 10
    finally:
        process.kill()
        process.wait(10)


@pytest.mark.slow
def test_the_published_commands_as_programs_and_sigterm_lets_answers_finish() -> None:
    """Controller on 0.0.0.0, worker by `localhost` names and without a token, bridge in front of the worker; then SIGTERM."""
    ports = {name: free_port() for name in ("controller", "worker", "bridge")}
    urls = {name: f"http://localhost:{port}" for name, port in ports.items()}
    running: list[subprocess.Popen[bytes]] = []

    def run(name: str, module: str, *flags: str) -> None:
        command = ("-m", f"llava.serve.{module}", "--port", str(ports[name]), *flags)
        running.append(started(*command, ready=urls[name] + "/health"))

    try:
        run("controller", "controller", "--host", "0.0.0.0")
        joins = ("--controller", urls["controller"])
        run("worker", "model_worker", "--host", "0.0.0.0", *joins, "--worker", urls["worker"], "--model-name", "micro", "--device", "cpu")
        backend = ("--backend", f"http://127.0.0.1:{ports['worker']}", "--model", "micro", "--model-name", "bridged")
        run("bridge", "sglang_worker", *joins, "--worker", urls["bridge"], *backend)
        wait_until(lambda: HTTP.post(urls["controller"] + "/list_models").json() == {"models": ["bridged", "micro"]})
        listed = HTTP.get(urls["controller"] + "/v1/models").json()["data"]
        assert listed[0]["granularities"] == listed[1]["granularities"] != []
        scene = base64.b64encode((ROOT / "playground" / "images" / "scene_olive.png").read_bytes()).decode()
        question = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{scene}"}},
            {"type": "text", "text": "What is in the picture?"},
        ]
        body = {"messages": [{"role": "user", "content": question}], "max_tokens": 12}
        for wish in ({}, {"granularity": listed[0]["granularities"][0]}):
            answers = [
                HTTP.post(urls["controller"] + "/v1/chat/completions", json={**body, **wish, "model": model}, timeout=60).json()
                for model in ("micro", "bridged")
            ]
            assert answers[0]["choices"][0]["message"] == answers[1]["choices"][0]["message"]
            assert answers[0]["usage"] == answers[1]["usage"] and answers[0]["usage"]["visual_tokens"] > 0
        long = {**body, "model": "bridged", "max_tokens": 100, "stream": True}
        with HTTP.stream("POST", urls["controller"] + "/v1/chat/completions", json=long, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            running[0].send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert running[0].wait(60) == 0
        for process in reversed(running[1:]):
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
    finally:
        for process in running:
            process.kill()
            process.wait(10)


def test_the_flags() -> None:
    parse = build_parser().parse_args
    plain = settings_from(parse(["--host", "0.0.0.0", "--port", "30000"]))
    assert plain == ControllerSettings()
    assert build_parser().get_default("port") == 21001 and plain.expiry_seconds == 30
    bounded = settings_from(
        parse("--body-seconds 7 --body-rate 100 --client-uploads 5 --client-bodies 2 --allowed-origins https://a b://c".split())
    )
    assert bounded.limits == Limits(body_seconds=7, body_rate=100, client_uploads=5, client_bodies=2)
    assert bounded.allowed_origins == ("https://a", "b://c")
    for flags, size in (("--max-body-mb 0.001", 1000), ("--max-body-mb 4000", 4 * 10**9), ("--max-body-bytes 2000", 2000)):
        assert settings_from(parse(flags.split())).limits == Limits(max_body_bytes=size)
    chosen = settings_from(
        parse(
            [
                "--dispatch-method",
                "lottery",
                "--registration-token",
                "t",
                "--allow-worker",
                "10.0.0.0/8",
                "--allow-worker",
                "::1",
                "--api-key",
                "k",
            ]
        )
    )
    assert chosen.method is DispatchMethod.LOTTERY and chosen.rules.token_required and len(chosen.rules.listed) == 2
    assert (chosen.worker_tokens, chosen.api_keys) == (("t",), ("k",))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--allow-worker", "worker"], "--allow-worker"),
        (["--heart-beat-expiration", "0"], "--heart-beat-expiration"),
        (["--max-in-flight", "-3"], "--max-in-flight"),
        (["--worker-token-file", "/nowhere"], "key file"),
        (["--api-key", "with space"], "API key"),
        (["--body-rate", "0"], "--body-rate"),
        (["--max-body-mb", "0.0009"], "--max-body-mb is 0.0009, expected 0.001 to 4000."),
        (["--max-body-mb", "4001"], "--max-body-mb is 4001, expected 0.001 to 4000."),
        (["--max-body-bytes", "999"], "--max-body-mb is 0.000999, expected 0.001 to 4000."),
        (["--client-uploads", "0"], "--client-uploads"),
        (["--allowed-origins", "*"], "no wildcard"),
        (["--allowed-origins", "https://a.example", "null"], "'null'"),
        (["--allowed-origins", "https://a.example/"], "without a path"),
        (["--allowed-origins", "https://a.example:443"], "own port"),
        (["--allowed-origins", "https://A.example"], "lower case"),
        (["--allowed-origins", "a.example"], "https://chat.example.org"),
    ],
)
def test_flags_that_cannot_work_are_one_sentence(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 1
    told = capsys.readouterr().err
    assert said in told and "Traceback" not in told
