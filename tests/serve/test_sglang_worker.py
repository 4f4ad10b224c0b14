"""The bridge as a program and as a worker: behind our own API, and behind backends that misbehave."""

from __future__ import annotations

import base64
import json
from io import BytesIO
from typing import Any

import pytest
from openai import APIStatusError, OpenAI
from PIL import Image

from llava.inference import Message, write_prompt
from llava.serve.api.worker_app import create_worker_app
from llava.serve.backend.bridge_app import create_bridge_app
from llava.serve.backend.openai_server import Backend
from llava.serve.http.client import Timeouts
from llava.serve.protocol import ErrorKind, Limits, ServeError
from llava.serve.sglang_worker import backend_from, build_parser, main
from llava.serve.worker_flags import read_limits, read_registration
from tests.serve.fake_backend import HTTP, Exchange, FakeBackend
from tests.serve.fake_engine import FakeEngine
from tests.serve.ports import free_port
from tests.serve.running import RunningApp, wait_until

PATIENT = Timeouts(connect=10.0, headers=10.0, read=10.0, total=60.0)


def bridge_to(url: str, model: str = "fake", **options: Any) -> RunningApp:
    return RunningApp(create_bridge_app(Backend(url, model, **{"timeouts": PATIENT, "poll_seconds": 0.05, **options})))


def is_ready(running: RunningApp) -> bool:
    return HTTP.get(running.url + "/ready").status_code == 200


def picture(width: int = 4, height: int = 3) -> str:
    buffer = BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def chat(text: str = "What is this", **fields: Any) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": "data:image/png;base64," + picture()}}, {"type": "text", "text": text}]
    return {"model": "fake", "messages": [{"role": "user", "content": parts}], **fields}


def test_our_own_api_as_the_backend_gives_the_same_answers_and_reports() -> None:
    engine = FakeEngine()
    with RunningApp(create_worker_app(engine, api_keys=["backend-key"])) as behind, bridge_to(behind.url, api_key="backend-key") as bridge:
        wait_until(lambda: is_ready(bridge))
        body = chat(granularity=36, max_visual_tokens=900, granularity_bias=-0.5, seed=3, stop=["END"], temperature=0.7)
        through = HTTP.post(bridge.url + "/v1/chat/completions", json=body).json()
        asked = engine.requests[-1]
        direct = HTTP.post(behind.url + "/v1/chat/completions", json=body, headers={"Authorization": "Bearer backend-key"}).json()
        assert through["choices"] == direct["choices"] and through["usage"] == direct["usage"]
        assert through["avg_llava"]["images"] == direct["avg_llava"]["images"] and through["avg_llava"]["milliseconds"]["vision"] == 2.0
        assert asked.messages == engine.requests[-1].messages and asked.routing == engine.requests[-1].routing
        assert asked.sampling == engine.requests[-1].sampling and asked.images == engine.requests[-1].images
        listed = HTTP.get(bridge.url + "/v1/models").json()["data"][0]
        assert (listed["id"], listed["granularities"], listed["has_router"]) == ("fake", [36, 144, 576], True)


def test_the_openai_sdk_streams_through_the_bridge() -> None:
    with RunningApp(create_worker_app(FakeEngine())) as behind, bridge_to(behind.url) as bridge:
        wait_until(lambda: is_ready(bridge))
        client = OpenAI(base_url=bridge.url + "/v1", api_key="none", max_retries=0)
        chunks = list(
            client.chat.completions.create(**chat(stream=True, stream_options={"include_usage": True}, logprobs=True, top_logprobs=1))
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == "<image> What is this [4x3]"
        assert [
            token.token for chunk in chunks if chunk.choices and chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content
        ] == [
            "<image> ",
            "What ",
            "is ",
            "this ",
            "[4x3]",
        ]
        assert chunks[-1].usage.completion_tokens == 5 and chunks[-1].usage.visual_tokens == 180
        with pytest.raises(APIStatusError) as caught:
            client.chat.completions.create(**{**chat(), "model": "unknown"})
        assert caught.value.status_code == 404


def test_llavas_protocol_goes_through_the_bridge() -> None:
    engine = FakeEngine()
    prompt = write_prompt([Message("user", "What is this")], 1, "vicuna_v1")
    with RunningApp(create_worker_app(engine)) as behind, bridge_to(behind.url) as bridge:
        wait_until(lambda: is_ready(bridge))
        body = {"model": "fake", "prompt": prompt, "images": [picture()], "temperature": 0, "max_new_tokens": 9, "stop": "</s>"}
        response = HTTP.post(bridge.url + "/worker_generate_stream", json=body)
        parts = [json.loads(part) for part in response.content.split(b"\0") if part]
        assert parts[-1]["text"] == prompt + "<image> What is this [4x3]" and parts[-1]["error_code"] == 0
        assert [message.role for message in engine.requests[0].messages] == ["system", "user"]
        assert engine.requests[0].messages[1].text == "<image>\nWhat is this"
        refused = HTTP.post(bridge.url + "/worker_generate_stream", json={**body, "prompt": "<image> of no template"})
        assert refused.status_code == 400 and refused.json()["error_code"] == ErrorKind.INVALID_REQUEST.fault.code
        status = HTTP.post(bridge.url + "/worker_get_status").json()
        assert status == {"model_names": ["fake"], "speed": 1, "queue_length": 0}


def test_errors_of_our_own_api_keep_their_kind() -> None:
    for kind in (ErrorKind.OUT_OF_MEMORY, ErrorKind.CONTEXT_LENGTH):
        with RunningApp(create_worker_app(FakeEngine(failure=ServeError(kind, "details")))) as behind, bridge_to(behind.url) as bridge:
            answer = HTTP.post(bridge.url + "/v1/chat/completions", json=chat())
            assert (answer.status_code, answer.json()["error"]["code"]) == (kind.fault.status, kind.value)
            assert answer.json()["error"]["message"] == kind.fault.text


def redirecting(exchange: Exchange) -> None:
    exchange.reply({}, 302, Location="http://127.0.0.1:9/")


def dying(exchange: Exchange) -> None:
    exchange.begin_stream()
    exchange.event({"choices": [{"index": 0, "delta": {"content": "Half an "}}]})
    exchange.die()


@pytest.mark.parametrize(
    "behaviour", [redirecting, lambda exchange: exchange.head(200, "text/html", Content_Length="0"), lambda exchange: exchange.until_gone()]
)
def test_a_misbehaving_backend_is_a_typed_error_with_a_request_id(behaviour: Any) -> None:
    timeouts = Timeouts(connect=10.0, headers=0.5, read=0.5)
    with FakeBackend(behaviour) as fake, bridge_to(fake.url, "other", name="fake", timeouts=timeouts) as bridge:
        answer = HTTP.post(bridge.url + "/v1/chat/completions", json=chat(), headers={"X-Request-Id": "mine-1"})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["request_id"]) == (502, "backend_failed", "mine-1")
        assert answer.headers["x-request-id"] == "mine-1"


def test_a_backend_that_dies_while_streaming_is_an_error_in_the_stream() -> None:
    with FakeBackend(dying) as fake, bridge_to(fake.url, "other", name="fake") as bridge:
        answer = HTTP.post(bridge.url + "/v1/chat/completions", json=chat(stream=True))
        events = [event[6:] for event in answer.text.split("\n\n") if event]
        assert "Half an " in answer.text and events[-1] == "[DONE]"
        assert json.loads(events[-2])["error"]["code"] == "backend_failed"


def test_a_client_that_goes_away_ends_the_backends_work() -> None:
    engine = FakeEngine(piece_delay=0.05, pieces=lambda request: ("word ",) * 4000)
    with RunningApp(create_worker_app(engine)) as behind, bridge_to(behind.url) as bridge:
        with HTTP.stream("POST", bridge.url + "/v1/chat/completions", json=chat(stream=True)) as response:
            next(response.iter_bytes())
        wait_until(lambda: engine.cancelled and not engine.active)


def test_the_backend_may_come_later_and_come_back() -> None:
    port = free_port()
    with bridge_to(f"http://127.0.0.1:{port}") as bridge:
        answer = HTTP.post(bridge.url + "/v1/chat/completions", json=chat())
        assert answer.json()["error"]["code"] == "backend_unreachable" and not is_ready(bridge)
        with RunningApp(create_worker_app(FakeEngine()), port=port):
            wait_until(lambda: is_ready(bridge))
            assert HTTP.post(bridge.url + "/v1/chat/completions", json=chat()).status_code == 200


def parsed(*flags: str) -> Any:
    return build_parser().parse_args(["--controller", "http://localhost:10000", "--port", "40002", *flags])


def test_the_published_flags_and_their_other_names() -> None:
    args = parsed("--worker", "http://localhost:40002", "--sgl-endpoint", "http://127.0.0.1:30000", "--model", "llava-v1.5-7b")
    backend = backend_from(args, read_limits(args))
    registration = read_registration(args)
    assert (backend.url, backend.model, backend.name, backend.max_images) == (
        "http://127.0.0.1:30000",
        "llava-v1.5-7b",
        None,
        Limits().max_images,
    )
    assert registration is not None and registration.worker_url == "http://localhost:40002"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--backend", "127.0.0.1:30000"), "--backend"),
        (("--backend", "http://127.0.0.1:30000", "--backend-timeout", "0"), "--backend-timeout"),
        (("--backend", "http://127.0.0.1:30000", "--backend-api-key-file", "/nowhere"), "key file"),
        (("--backend", "http://127.0.0.1:30000", "--max-queue", "-1"), "--max-queue"),
        (("--backend", "http://127.0.0.1:30000", "--without-router"), "give both or neither"),
    ],
)
def test_flags_that_cannot_work_are_one_sentence(flags: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*flags, "--model", "m", "--port", "0"]) == 1
    told = capsys.readouterr().err
    assert said in told and "Traceback" not in told


def test_a_plug_ins_granularities_come_from_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    args = parsed("--backend", "http://127.0.0.1:30000", "--granularities", "4,16,64", "--without-router")
    backend = backend_from(args, read_limits(args))
    assert backend.granularities == (4, 16, 64) and not backend.has_router
    for wrong in ("64,16", "4,4", "0,4", "4,x", ""):
        with pytest.raises(SystemExit, match="2"):
            parsed("--backend", "http://127.0.0.1:30000", "--granularities", wrong)
        assert "is no ascending list of tokens per view" in capsys.readouterr().err


def test_visual_tokens_of_a_vllm_reach_the_client() -> None:
    def answer(exchange: Exchange) -> None:
        exchange.begin_stream()
        exchange.event({"choices": [{"index": 0, "delta": {"content": "red"}, "finish_reason": "stop"}]})
        details = {"multimodal_tokens": {"image": 24}}
        exchange.event({"choices": [], "usage": {"prompt_tokens": 40, "completion_tokens": 1, "prompt_tokens_details": details}})
        exchange.event("[DONE]")
        exchange.end_stream()

    with FakeBackend(answer) as fake, bridge_to(fake.url, "other", name="fake", granularities=(4, 16)) as bridge:
        wait_until(lambda: is_ready(bridge))
        usage = HTTP.post(bridge.url + "/v1/chat/completions", json=chat(granularity=16)).json()["usage"]
        assert usage["visual_tokens"] == 24 and fake.requests[-1].json["mm_processor_kwargs"] == {"vis_token_granularity": 16}
        refused = HTTP.post(bridge.url + "/v1/chat/completions", json=chat(granularity=5))
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "granularity"
        assert "avg_llava_visual_tokens_total 24.0" in HTTP.get(bridge.url + "/metrics").text


def test_without_a_model_name_the_only_one_of_the_backend_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    two = {"data": [{"id": "a"}, {"id": "b"}]}
    with FakeBackend(lambda exchange: exchange.chat(["x"]), two) as fake:
        assert main(["--backend", fake.url, "--port", "0"]) == 1
    assert "expected one model; name it with --model" in capsys.readouterr().err


def test_without_its_backend_the_bridge_says_that_this_is_why() -> None:
    with bridge_to("http://127.0.0.1:9") as bridge:
        told = HTTP.get(bridge.url + "/ready")
    assert told.status_code == 503 and told.json()["error"]["code"] == "backend_unreachable"
