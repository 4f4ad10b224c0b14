"""The worker as a program: its flags, what it refuses before loading anything, and what it hands on."""

from __future__ import annotations

import argparse
import logging

import httpx
import pytest

from llava.serve import model_worker
from llava.serve.model_worker import build_app, build_parser, check_arguments, load_engine, main, serve
from llava.serve.worker_flags import read_api_keys, read_limits, read_registration, start_logging
from tests.serve.bodies import CHAT, chat_body
from tests.serve.fake_engine import FakeEngine
from tests.serve.running import RunningApp

PUBLISHED = [
    "--host 0.0.0.0 --controller http://localhost:30000 --port 40000 --worker http://localhost:40000 --model-path zhibinlan/AVG-LLaVA",
    "--host 0.0.0.0 --controller http://localhost:30000 --port 40001 --worker http://localhost:40001 --model-path ckpt2",
    "--host 0.0.0.0 --controller http://localhost:30000 --port 40000 --worker http://localhost:40000 --model-path x --load-4bit",
    "--host 0.0.0.0 --controller http://localhost:30000 --port 40000 --worker http://localhost:40000 --model-path x --load-8bit",
    "--controller-address http://c:1 --worker-address http://w:2 --model-path x --model-base y --model-name z --device mps --multi-modal "
    "--limit-model-concurrency 5 --stream-interval 2 --no-register",
]


def parsed(text: str = "") -> argparse.Namespace:
    return build_parser().parse_args(text.split())


@pytest.mark.parametrize("line", PUBLISHED)
def test_the_published_commands_are_understood(line):
    args = parsed(line)
    check_arguments(args)
    read_limits(args)
    registration = read_registration(args)
    if args.no_register:
        assert registration is None and args.max_batch_rows == 5
    else:
        assert registration.controller_url == "http://localhost:30000"
        assert registration.worker_url == f"http://localhost:{args.port}"


def test_no_controller_is_needed():
    assert read_registration(parsed()) is None


@pytest.mark.parametrize(
    ("line", "url"),
    [
        ("--host 0.0.0.0 --port 5", "http://127.0.0.1:5"),
        ("--host 10.0.0.7 --port 5", "http://10.0.0.7:5"),
        ("--host ::1 --port 5", "http://[::1]:5"),
        ("--worker http://other:7/", "http://other:7"),
    ],
)
def test_the_workers_own_address(line, url):
    assert read_registration(parsed(f"{line} --controller http://c:1/")).worker_url == url


def test_the_registration_token(tmp_path):
    file = tmp_path / "token"
    file.write_text("secret\n")
    assert read_registration(parsed(f"--controller http://c --registration-token-file {file}")).token == "secret"
    assert read_registration(parsed("--controller http://c --registration-token other")).token == "other"
    with pytest.raises(ValueError, match="More than one registration token"):
        read_registration(parsed(f"--controller http://c --registration-token a --registration-token-file {file}"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--max-batch-rows 0", "--max-batch-rows is 0"),
        ("--max-batch-tokens -1", "--max-batch-tokens is -1"),
        ("--stream-interval 0", "--stream-interval is 0"),
        ("--cache-mb -1", "--cache-mb is -1"),
        ("--max-queue -1", "--max-queue is -1"),
        ("--max-body-mb 0", "--max-body-mb is 0"),
        ("--max-body-mb nan", "--max-body-mb is nan"),
        ("--max-body-mb 4000.1", "--max-body-mb is 4000.1, expected 0.001 to 4000."),
        ("--allowed-host x", "--allow-remote-images"),
        ("--controller localhost:1", "--controller is 'localhost:1'"),
        ("--controller http://c --worker w", "--worker is 'w'"),
        ("--controller http://[c", "--controller is 'http://[c'"),
        ("--controller http://c:99999", "--controller is"),
        ("--controller http://", "--controller is"),
        ("--controller http://c --port 0", "--port is 0"),
        ("--api-key-file /nonexistent", "cannot be read"),
        ("--log-file /nonexistent/x", "cannot be written"),
        ("--vllm http://v:1", "--vllm: of --engine vllm, but --engine is embedded"),
        ("--engine vllm --load-4bit --prefix-cache-mb 3", "--prefix-cache-mb, --load-4bit: of --engine embedded, but --engine is vllm"),
        ("--engine vllm --vllm http://v:1 --vllm-args=--enforce-eager", "--vllm-args: for a vLLM that is started here"),
        ("--engine vllm --vllm-api-key-file f", "--vllm-api-key-file: for a vLLM that runs"),
        ("--engine vllm --vllm http://v:1 --vllm-timeout 0", "--vllm-timeout is 0, expected 0.001 or more"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_loaded(line, message, capsys, monkeypatch):
    monkeypatch.setattr(model_worker, "load_engine", lambda args: pytest.fail("a model was loaded"))
    assert main(line.split()) == 1
    error = capsys.readouterr().err
    assert message in error and error.strip().splitlines()[-1].startswith("error: ")


def test_two_names_of_one_number_take_the_same_value():
    assert parsed("--max-batch-rows 3 --limit_model_concurrency 3").max_batch_rows == 3
    assert parsed("--max-batch-rows 3 --max-batch-rows 4").max_batch_rows == 4  # the last one counts, as of every flag


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--max-batch-rows 2 --limit-model-concurrency 64", "--max-batch-rows is 2 and --limit-model-concurrency 64"),
        ("--limit_model_concurrency 4 --max-batch-rows 16", "--limit-model-concurrency is 4 and --max-batch-rows 16"),
    ],
)
def test_two_names_of_one_number_take_no_two_values(line, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(line.split())
    assert capsys.readouterr().err.endswith(f": {said}; they mean the same, give one.\n")


def test_two_kinds_of_quantised_weights_are_one_too_many(capsys):
    assert main(["--load-8bit", "--load-4bit", "--port", "0"]) == 1
    assert "choose one" in capsys.readouterr().err


def test_all_numbers_that_cannot_work_are_named_at_once(capsys):
    assert main("--max-batch-rows 0 --cache-mb nan --prefix-cache-mb inf --stream-interval -2".split()) == 1
    told = capsys.readouterr().err
    assert "--max-batch-rows is 0, expected 1 or more; " in told and "--stream-interval is -2, expected 1 or more; " in told
    assert "--cache-mb is nan, expected 0 or more; --prefix-cache-mb is inf, expected a finite number." in told


def test_a_checkpoint_that_is_none_is_one_sentence(tmp_path, capsys):
    assert main(["--model-path", str(tmp_path)]) == 1
    assert "has no config.json" in capsys.readouterr().err


def test_limits_and_keys_come_from_the_flags(tmp_path):
    file = tmp_path / "keys"
    file.write_text("b\nc\n")
    args = parsed(
        f"--api-key a --api-key-file {file} --max-queue 3 --max-new-tokens 9 --max-images 2 --max-body-mb 1.5 --allow-remote-images "
        "--allowed-host one --allowed-host two"
    )
    limits = read_limits(args)
    assert read_api_keys(args) == ("a", "b", "c")
    assert (limits.max_queue, limits.max_new_tokens, limits.max_images, limits.max_body_bytes) == (3, 9, 2, 1_500_000)
    assert limits.allow_remote_images and limits.allowed_hosts == ("one", "two")


def test_the_model_is_loaded_as_the_flags_say(monkeypatch):
    seen = {}

    class Loader:
        @staticmethod
        def load(path, base, **options):
            seen.update(path=path, base=base, **options)
            return "assistant"

    monkeypatch.setattr("llava.inference.Assistant", Loader)
    monkeypatch.setattr("llava.serve.engine.embedded.EmbeddedEngine", lambda assistant, name, **options: seen.update(name=name, **options))
    load_engine(
        parsed(
            "--model-path a/b --model-base c --device cpu --dtype bfloat16 --attn-implementation eager --load-8bit --max-batch-rows 3 "
            "--max-batch-tokens 99 --max-queue 4 --cache-mb 2 --prefix-cache-mb 3 --max-images 5"
        )
    )
    assert seen == {
        "path": "a/b", "base": "c", "name": "b", "device": "cpu", "dtype": "bfloat16", "attn_implementation": "eager", "load_8bit": True,
        "load_4bit": False, "max_batch_rows": 3, "max_batch_tokens": 99, "max_queue": 4, "cache_bytes": 2_000_000,
        "prefix_cache_bytes": 3_000_000, "max_images": 5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--engine vllm --vllm-python /nowhere/python", "no Python of vLLM's at '/nowhere/python'"),
        ("--engine vllm --vllm ftp://v", "--vllm is 'ftp://v', expected http(s)://host:port"),
        ("--engine vllm --vllm http://v:1 --vllm-api-key-file /nonexistent", "cannot be read"),
    ],
)
def test_a_vllm_that_cannot_be_used_is_one_sentence(line, message, capsys):
    assert main(f"{line} --device cpu --port 0".split()) == 1
    assert message in capsys.readouterr().err


def test_a_vllm_is_started_with_what_the_flags_say(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.touch(0o755)
    args = parsed(f"--engine vllm --vllm-python {python} --vllm-args=--enforce-eager --model-name own --device cpu --max-batch-rows 7")
    engine = load_engine(args)
    arguments = engine.child.command
    assert arguments[0] == str(python) and arguments[-1] == "--enforce-eager"
    wanted = {"--served-model-name": "own", "--max-num-seqs": "7", "--dtype": "float32", "--max-model-len": "2048"}
    assert {flag: arguments[arguments.index(flag) + 1] for flag in wanted} == wanted
    assert engine.backend.concurrency == 7 and engine.backend.url.startswith("http://127.0.0.1:")
    assert build_app(args).state.limiter.capacity == 7 + args.max_queue


def test_a_vllm_that_runs_gets_more_requests_at_once():
    engine = load_engine(parsed("--engine vllm --vllm http://v:8000/v1 --device cpu --vllm-timeout 9"))
    assert engine.child is None and engine.backend.concurrency == 128 and engine.backend.timeouts.read == 9
    assert engine.card.name == "avg-llava-micro" and not engine.ready


def test_flags_without_effect_say_so(monkeypatch, caplog):
    monkeypatch.setattr(model_worker, "load_engine", lambda args: FakeEngine())
    monkeypatch.setattr("llava.serve.api.worker_app.run_worker", lambda app, host, port, log_level: 0)
    monkeypatch.setattr(logging.getLogger("llava"), "handlers", [caplog.handler])
    assert serve(parsed("--multi-modal --use-flash-attn --no-register --controller http://c:1 --port 0")) == 0
    for flag in ("--multi-modal changes nothing", "--use-flash-attn changes nothing", "--no-register"):
        assert caplog.text.count(flag) == 1


def test_the_app_has_the_places_that_the_flags_name(monkeypatch):
    monkeypatch.setattr(model_worker, "load_engine", lambda args: FakeEngine())
    app = build_app(parsed("--limit-model-concurrency 2 --max-queue 3 --api-key k --stream-interval 4"))
    assert app.state.limiter.capacity == 5 and app.state.handler.stream_interval == 4
    with RunningApp(app) as running, httpx.Client(base_url=running.url, trust_env=False) as client:
        assert client.post(CHAT, json=chat_body()).status_code == 401
        assert client.post(CHAT, json=chat_body(), headers={"Authorization": "Bearer k"}).status_code == 200


def test_a_log_file_gets_the_log(tmp_path):
    file = tmp_path / "worker.log"
    start_logging(parsed(f"--log-file {file}"), model_worker.logger)
    logging.getLogger("llava.serve.test").warning("a line")
    assert "a line" in file.read_text()
