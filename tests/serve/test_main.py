"""`python -m llava.serve`: worker, API and page in one process."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

from llava.serve import __main__ as main_module
from llava.serve import gradio_web_server, model_worker
from llava.serve.__main__ import build_app, build_parser, main
from llava.serve.api.worker_app import create_worker_app
from llava.serve.http.listen_address import check_address, shown_url
from llava.serve.http.server import make_server, run_server
from llava.serve.page.app import PageOptions, create_page_app
from llava.serve.page.beside_worker import Split, join_apps
from tests.serve.fake_backend import HTTP
from tests.serve.fake_engine import FakeEngine
from tests.serve.page_backend import running
from tests.serve.ports import free_port
from tests.serve.running import wait_until

ROOT = Path(__file__).resolve().parents[2]


def test_one_address_has_the_api_and_the_page():
    port = free_port()
    page = create_page_app(PageOptions(f"http://127.0.0.1:{port}", api_key="key", mode="reload", log_folder=None))
    app = join_apps(create_worker_app(FakeEngine(), api_keys=("key",)), page)
    with running(app, port) as url:
        assert HTTP.get(f"{url}/health").json() == {"status": "alive"}
        assert HTTP.get(f"{url}/v1/models").status_code == 401
        assert HTTP.get(f"{url}/v1/models", headers={"authorization": "Bearer key"}).json()["data"][0]["id"] == "fake"
        assert "gradio_config" in HTTP.get(url).text
        gradio_client = pytest.importorskip("gradio_client")
        client = gradio_client.Client(url, verbose=False, analytics_enabled=False)
        answer = client.predict({"text": "one two", "files": []}, "", "auto", 0, api_name="/ask")
        assert answer["text"].split() == ["one", "two"]


@pytest.mark.parametrize(
    ("flags", "host", "status"),
    [
        ((), "rebound.example:8000", 403),
        ((), "127.0.0.1:8000", 200),
        (("--allow-host", "chat.example.org"), "chat.example.org", 200),
        (("--host", "0.0.0.0"), "rebound.example:8000", 200),
        (("--host", "0.0.0.0", "--allow-host", "chat.example.org"), "rebound.example:8000", 403),
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/config"])
def test_names_that_nobody_gave_it_are_refused(flags, host, status, path, tmp_path, monkeypatch):
    monkeypatch.setattr(main_module, "load_engine", lambda args: FakeEngine())
    app = build_app(build_parser().parse_args(["--port", str(free_port()), "--log-dir", str(tmp_path), *flags]))

    async def get():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            return await client.get(path, headers={"host": host})

    answer = asyncio.run(get())
    assert answer.status_code == status and ("--allow-host" in answer.text) == (status == 403)


@pytest.mark.parametrize(
    ("method", "path", "accept", "typed"),
    [
        ("POST", "/generate", "*/*", True),
        ("GET", "/v2/models", "application/json", True),
        ("PUT", "/config", "*/*", True),
        ("POST", "/gradio_api/nothing", "*/*", True),
        ("GET", "/nothing", "text/html,application/xhtml+xml,*/*;q=0.8", False),
    ],
)
def test_what_is_not_there_is_a_typed_error_with_an_id_but_to_browsers(method, path, accept, typed):
    page = create_page_app(PageOptions("http://127.0.0.1:9", log_folder=None))
    app = join_apps(create_worker_app(FakeEngine()), page)

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            return await client.request(method, path, headers={"accept": accept, "x-request-id": "mine"})

    answer = asyncio.run(ask())
    assert answer.status_code == 404
    if typed:
        assert answer.headers["x-request-id"] == answer.json()["error"]["request_id"] == "mine"
        assert answer.json()["error"]["code"] == "not_found"
    else:
        assert answer.text == "There is nothing at this address."


def test_the_page_alone_answers_programs_so_too(monkeypatch):
    apps = []
    monkeypatch.setattr("llava.serve.http.server.run_server", lambda server: apps.append(server.config.app) or 0)
    assert gradio_web_server.main(["--controller", "http://127.0.0.1:9", "--port", str(free_port()), "--no-log"]) == 0

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(apps[0]), base_url="http://127.0.0.1") as client:
            return await client.post("/tokenize", json={})

    answer = asyncio.run(ask())
    assert (answer.status_code, answer.json()["error"]["request_id"]) == (404, answer.headers["x-request-id"])


_SLOW_PROGRAM = """
import signal, sys
from llava.serve import __main__, model_worker
from tests.serve.fake_engine import FakeEngine
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job, as tests may be, is started deaf to Ctrl-C
program = {"all": __main__, "worker": model_worker}[sys.argv.pop(1)]
program.load_engine = lambda args: FakeEngine(piece_delay=0.05, pieces=lambda request: ("word ",) * 20_000)
sys.exit(program.main())
"""


@pytest.mark.parametrize("program", ["all", "worker"])
def test_a_second_ctrl_c_while_an_answer_streams_ends_without_a_traceback(program, tmp_path):
    port = free_port()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", _SLOW_PROGRAM, program, "--host", "127.0.0.1", "--port", str(port)]
    with (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            wait_until(lambda: process.poll() is not None or "Uvicorn running" in (tmp_path / "log").read_text(), 180)
            body = {"model": "fake", "messages": [{"role": "user", "content": "x"}], "stream": True}
            with HTTP.stream("POST", f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=60) as answer:
                lines = answer.iter_lines()
                assert any("word" in line for line in lines)
                process.send_signal(signal.SIGINT)
                wait_until(lambda: "draining" in (tmp_path / "log").read_text())
                process.send_signal(signal.SIGINT)
                with pytest.raises(httpx.RemoteProtocolError):
                    assert list(lines) == []
            assert process.wait(60) == 0
        finally:
            process.kill()
            process.wait()
        told = (tmp_path / "log").read_text()
        assert "'/v1/chat/completions' was aborted by the shutdown" in told
        assert not any(word in told for word in ("Traceback", "CancelledError", "Exception"))


def test_without_a_page_only_the_api_is_there():
    with running(join_apps(create_worker_app(FakeEngine()), None)) as url:
        assert HTTP.get(url).status_code == 404
        assert HTTP.get(f"{url}/v1/models").status_code == 200


@pytest.mark.parametrize(
    ("path", "wanted"),
    [("/v1/models", "worker"), ("/v1", "worker"), ("/metrics", "worker"), ("/", "page"), ("/v1x", "page"), ("/gradio_api/v1", "page")],
)
def test_paths_are_split(path, wanted):
    def app(name):
        async def answer(scope, receive, send):
            asked.append(name)

        return answer

    asked = []
    coroutine = Split(app("worker"), app("page"))({"path": path}, None, None)
    with pytest.raises(StopIteration):
        coroutine.send(None)
    assert asked == [wanted]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--port", "0"], "expected 1 to 65535"),
        (["--load-4bit", "--load-8bit"], "choose one"),
        (["--model-path", "/nowhere/at/all"], "nowhere"),
    ],
)
def test_flags_that_cannot_work_end_with_one_sentence(flags, told, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(flags) == 1
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
        ("::1", "http://[::1]:8000"),
        ("192.0.2.7", "http://192.0.2.7:8000"),
        ("localhost", "http://localhost:8000"),
    ],
)
def test_the_address_shown_is_one_that_can_be_opened(host, url):
    assert shown_url(host, 8000) == url


@pytest.mark.slow
def test_the_command_serves_the_micro_model_and_ends_well_on_sigterm(tmp_path):
    port = free_port()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "llava.serve", "--port", str(port), "--log-dir", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    watch = threading.Timer(300, process.kill)
    watch.start()
    try:
        greeting = [process.stdout.readline().strip() for _ in range(4)]
        assert greeting[0] == "Model avg-llava-micro is ready."
        assert greeting[1].startswith(f"API   http://127.0.0.1:{port}/v1") and greeting[2] == f"Page  http://127.0.0.1:{port}/"
        url = f"http://127.0.0.1:{port}"
        body = {"model": "avg-llava-micro", "messages": [{"role": "user", "content": "Which colour?"}], "max_tokens": 4}
        answer = HTTP.post(f"{url}/v1/chat/completions", json=body, timeout=60)  # once: who reads that it is ready may ask
        assert answer.status_code == 200 and answer.json()["choices"][0]["message"]["content"]
        assert "gradio_config" in HTTP.get(url).text
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        watch.cancel()
        process.kill()
        process.wait()


def refuse_to_load(*args, **options):
    raise AssertionError("The model is loaded although the port is taken.")


@pytest.mark.parametrize("program", [main_module, model_worker])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_taken_port_is_noticed_before_the_model_is_loaded(program, host, monkeypatch, capsys):
    monkeypatch.setattr(program, "load_engine", refuse_to_load)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert program.main(["--host", host, "--port", str(port)]) == 1
    written = capsys.readouterr()
    assert f"port {port} of {host} is taken; " in written.err and "is ready" not in written.out


@pytest.mark.parametrize(
    ("host", "port", "told"),
    [("127.0.0.1", 70000, "expected 0 to 65535"), ("192.0.2.7", 0, "no address of this machine"), ("no such host", 0, "no address of")],
)
def test_addresses_that_cannot_work_are_refused(host, port, told):
    with pytest.raises(ValueError, match=told):
        check_address(host, port)


def test_an_address_that_has_just_been_used_is_free():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            server.accept()[0].close()  # this side ends first, so that its port lingers
            client.recv(1)
    check_address("127.0.0.1", port)


def test_it_is_ready_once_it_listens():
    told = []

    def ask():
        told.append(server.servers[0].is_serving())
        server.should_exit = True

    server = make_server(create_worker_app(FakeEngine()), "127.0.0.1", 0, log_level="warning", on_started=ask)
    assert run_server(server) == 0 and told == [True]


@pytest.mark.parametrize(
    ("program", "flags"),
    [
        ("llava.serve", ()),
        ("llava.serve.controller", ()),
        ("llava.serve.model_worker", ()),
        ("llava.serve.sglang_worker", ("--backend", "http://127.0.0.1:9")),
        ("llava.serve.gradio_web_server", ()),
    ],
)
def test_without_the_extra_a_program_says_what_to_install(program, flags, tmp_path):
    for name in ("fastapi", "uvicorn"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('No module named {name}', name={name!r})")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    ended = subprocess.run([sys.executable, "-m", program, *flags], capture_output=True, text=True, env=environment, timeout=300)
    assert ended.returncode == 1 and len(ended.stderr.splitlines()) == 1
    assert 'install the serve extra: pip install -e ".[serve]"' in ended.stderr
