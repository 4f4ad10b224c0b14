"""A worker over the shipped model: answers equal those without a server, whoever asks and however many at once."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
import time
from io import BytesIO
from typing import Literal

import httpx
import openai
import pytest
from PIL import Image, ImageDraw
from pydantic import BaseModel, Field

from llava.inference import Assistant, Options, write_prompt
from llava.inference import Message as Turn
from llava.messages import RoutingRequest
from llava.serve.api.worker_app import create_worker_app
from llava.serve.engine.embedded import EmbeddedEngine
from llava.serve.protocol import Limits
from tests.serve.bodies import CHAT, WORKER, data_url
from tests.serve.running import RunningApp

QUESTIONS = ("What shape is in the image?", "What color is the shape?", "Is there a red shape?", "Does the image contain a circle?")


def drawing(index: int) -> Image.Image:
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((10 + index, 12, 44 + index, 46), fill=("red", "blue", "green", "black")[index % 4])
    return image


def png(image: Image.Image) -> str:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture(scope="module")
def assistant():
    return Assistant.load(device="cpu")


@pytest.fixture(scope="module")
def running(assistant):
    engine = EmbeddedEngine(assistant, "micro", max_batch_rows=8, max_queue=32)
    with RunningApp(create_worker_app(engine, Limits(max_queue=32), concurrency=8)) as served:
        yield served


def question(index: int, **fields):
    parts = [
        {"type": "text", "text": QUESTIONS[index % 4]},
        {"type": "image_url", "image_url": {"url": data_url(png(drawing(index)))}},
    ]
    return {"model": "micro", "messages": [{"role": "user", "content": parts}], "max_tokens": 12, **fields}


def expected(assistant, index: int, granularity: int | None = None):
    options = Options(max_new_tokens=12, routing=RoutingRequest(granularity))
    return assistant.answer([drawing(index)], QUESTIONS[index % 4] + "\n<image>", options)


def test_answers_are_those_of_the_model_alone_whoever_else_asks(running, assistant):
    choices = [None, 4, 64, 16]

    async def ask_all():
        async with httpx.AsyncClient(base_url=running.url, timeout=120, trust_env=False) as client:
            bodies = [question(index, granularity=choices[index % 4]) for index in range(12)]
            return await asyncio.gather(*(client.post(CHAT, json=body) for body in bodies))

    for index, response in enumerate(asyncio.run(ask_all())):
        answer = expected(assistant, index, choices[index % 4])
        body = response.json()
        assert body["choices"][0]["message"]["content"].strip() == answer.text
        assert body["choices"][0]["finish_reason"] == answer.finish_reason
        assert body["usage"]["prompt_tokens"] == answer.prompt_tokens
        assert body["usage"]["granularities"] == [answer.reports[0].granularity]
        assert body["usage"]["visual_tokens"] == answer.reports[0].num_visual_tokens


def test_the_sdk_streams_the_same_answer(running, assistant):
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        body = question(1)
        stream = client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}, logprobs=True, top_logprobs=2)
        chunks = list(stream)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        scores = [score for chunk in chunks if chunk.choices and chunk.choices[0].logprobs for score in chunk.choices[0].logprobs.content]
        answer = expected(assistant, 1)
        assert text.strip() == answer.text and chunks[-1].usage.completion_tokens == len(answer.token_ids)
        assert scores and all(score.logprob <= 0 and len(score.top_logprobs) == 2 for score in scores)
        image = chunks[-1].avg_llava["images"][0]
        assert len(image["probabilities"]) == 5 and sum(image["probabilities"]) == pytest.approx(1, abs=1e-3)


def test_llavas_own_way_of_asking(running, assistant):
    prompt = write_prompt([Turn("user", "<image>\n" + QUESTIONS[0])], 1, assistant.model.config.conv_version)
    body = {"model": "micro", "prompt": prompt, "temperature": 0.0, "top_p": 1.0, "max_new_tokens": 12, "stop": "</s>",
            "images": [png(drawing(0))], "vis_token_granularity": 16}  # fmt: skip
    response = httpx.post(running.url + WORKER, json=body, timeout=60, trust_env=False)
    parts = [json.loads(part) for part in response.content.split(b"\0") if part]
    answer = assistant.answer([drawing(0)], "<image>\n" + QUESTIONS[0], Options(max_new_tokens=12, routing=RoutingRequest(16)))
    assert {part["error_code"] for part in parts} == {0}
    assert parts[-1]["text"].removeprefix(prompt).strip() == answer.text


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_asks(running, assistant, tmp_path):
    file = tmp_path / "body.json"
    file.write_text(json.dumps(question(2, stream=True)))
    command = ["curl", "-sS", "-N", "--noproxy", "*", running.url + CHAT, "-H", "Content-Type: application/json", "-d", f"@{file}"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split("\n\n")
    assert lines[-2] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text.strip() == expected(assistant, 2).text


def test_what_the_engine_refuses_is_typed(running):
    for fields in ({"max_visual_tokens": 1}, {"messages": [{"role": "user", "content": "word " * 4000}]}):
        response = httpx.post(running.url + CHAT, json=question(0, **fields), timeout=60, trust_env=False)
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert error["code"] in ("invalid_request", "context_length_exceeded")
        assert (error.get("least", 0) > 1) == ("max_visual_tokens" in fields)
    many = httpx.post(running.url + CHAT, json=question(0, temperature=1.0, seed=3, n=3), timeout=60, trust_env=False).json()
    again = httpx.post(running.url + CHAT, json=question(0, temperature=1.0, seed=3, n=3), timeout=60, trust_env=False).json()
    assert [choice["message"] for choice in many["choices"]] == [choice["message"] for choice in again["choices"]]


@pytest.mark.slow
def test_streaming_adds_little_to_the_time(running):
    """Processor time of the server's threads: on a busy machine the clock on the wall measures the others."""
    took = {False: 0.0, True: 0.0}
    with httpx.Client(base_url=running.url, timeout=60, trust_env=False) as client:
        for round_number in range(101):
            for stream in (False, True):
                body = question(0, stream=stream, temperature=2.0, seed=round_number, max_tokens=200)
                start = time.process_time() - time.thread_time()
                client.post(CHAT, json=body)
                if round_number:  # the first one warms up
                    took[stream] += time.process_time() - time.thread_time() - start
    print(f"server's processor seconds of 100 answers, whole: {took[False]:.2f}, streamed: {took[True]:.2f}")
    assert took[True] < 1.05 * took[False]


class Sign(BaseModel):
    colour: Literal["red", "sky blue"]
    number: int = Field(ge=0, le=99)
    lit: bool


@pytest.mark.filterwarnings("ignore::UserWarning:pydantic")  # the SDK's own
def test_the_sdk_parses_answers_that_follow_a_pydantic_model(running):
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        messages = question(0)["messages"]
        whole = client.chat.completions.parse(model="micro", messages=messages, response_format=Sign)
        assert whole.choices[0].message.parsed == Sign.model_validate_json(whole.choices[0].message.content)
        again = [*messages, whole.choices[0].message, {"role": "user", "content": "And now?"}]
        assert client.chat.completions.parse(model="micro", messages=again, response_format=Sign).choices[0].message.parsed
        with client.chat.completions.stream(model="micro", messages=messages, response_format=Sign) as stream:
            assert stream.get_final_completion().choices[0].message.parsed == whole.choices[0].message.parsed
        response = client.responses.parse(model="micro", input="Make up a sign.", text_format=Sign)
        assert isinstance(response.output_parsed, Sign)
        with pytest.raises(openai.BadRequestError) as refused:
            schema = {"type": "array", "uniqueItems": True}
            wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
            client.chat.completions.create(model="micro", messages=messages, response_format=wanted)
        assert refused.value.param == "response_format.json_schema.schema" and "uniqueItems" in str(refused.value)
