"""A server that speaks the OpenAI API as a controller does, without a model: questions say how it behaves.

The last question's first word chooses: `slow` (a word every 0.15 s), `long` (words without end), `die` (breaks off in the middle),
`fail` (an error in the stream), `refuse` (503 with a reason), `budget` (400, with the least that would do), `garbage`, `html` (an answer
full of markup); anything else is echoed.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from PIL import Image

from llava.model import LlavaConfig
from llava.model.merge import merged_layout
from llava.visualize import grid_of
from tests.serve.running import wait_until

MARKUP = (
    '<script>window.hacked = 1</script> <img src="http://192.0.2.1/x.png" onerror="window.hacked = 1"> '
    "![picture](http://192.0.2.1/y.png) [link](javascript:window.hacked=1) <b>bold</b>"
)
ABOUT = "A model for tests. It knows how to repeat what it was asked, and nothing else."
LEVELS = (36, 72, 144, 288, 576)
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


class Backend:
    """What the server has seen, and how it is to behave.

    models: their names. key: required as bearer token when set. bodies: of the chats. hung_up: streams whose client went away.
    """

    def __init__(self) -> None:
        self.models = ["avg-llava", "avg-llava-stage3"]
        self.key: str | None = None
        self.bodies: list[dict[str, Any]] = []
        self.hung_up = 0
        self.config = LlavaConfig(
            vision_config={"image_size": 336, "patch_size": 14},
            image_grid_pinpoints=PINPOINTS,
            vis_token_granularity=list(LEVELS),
        )
        self.app = FastAPI()
        self.app.add_api_route("/v1/models", self.list_models)
        self.app.add_api_route("/v1/chat/completions", self.chat, methods=["POST"])

    def list_models(self, request: Request) -> JSONResponse:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return error(401, "The API key is missing or wrong.", "invalid_api_key")
        card = {"granularities": list(LEVELS), "has_router": True, "takes_images": True, "max_images": 8, "description": ABOUT}
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model", **card} for name in self.models]})

    async def chat(self, request: Request) -> Any:
        body = await request.json()
        self.bodies.append(body)
        words = last_text(body).split()
        if words[0] == "refuse":
            return error(503, "The server is at capacity; try again.", "overloaded")
        if words[0] == "budget":
            return error(400, "max_visual_tokens is 5, but ...", "invalid_request_error", param="max_visual_tokens", least=192)
        if words[0] == "garbage":
            return StreamingResponse(iter([b"data: {{{ not json\n\n"]), media_type="text/event-stream")
        return StreamingResponse(self.stream(body, words), media_type="text/event-stream", headers={"x-request-id": "req-7"})

    async def stream(self, body: dict[str, Any], words: list[str]) -> AsyncIterator[bytes]:
        kind, ended = words[0], False
        images = [self.report(size, body) for size in picture_sizes(body)]
        answer = [MARKUP] if kind == "html" else [f"{word} " for word in ["You", "asked", f"{body['model']}:", *words]]
        try:
            yield chunk({"role": "assistant", "content": ""})
            for index, text in enumerate(answer * (1000 if kind == "long" else 1)):
                await asyncio.sleep(0.15 if kind in ("slow", "long") else 0.01)
                if kind == "fail" and index == 2:
                    ended = True
                    yield sse({"error": {"message": "The model computed numbers that are not finite on this request.",
                                         "type": "server_error", "code": "non_finite_logits", "request_id": "req-7"}})  # fmt: skip
                    return
                if kind == "die" and index == 2:
                    ended = True
                    return
                yield chunk({"content": text})
            ended = True
            usage = {"prompt_tokens": 50, "completion_tokens": len(answer), "total_tokens": 50 + len(answer)}
            usage |= {name: sum(image[name] for image in images) for name in ("visual_tokens", "full_visual_tokens")}
            usage["granularities"] = [image["granularity"] for image in images]
            yield chunk({}, "stop")
            yield sse({"choices": [], "usage": usage, "avg_llava": {"images": images, "milliseconds": {"ttft": 12.0, "total": 80.0}}})
            yield b"data: [DONE]\n\n"
        finally:
            self.hung_up += not ended

    def report(self, size: tuple[int, int], body: dict[str, Any]) -> dict[str, Any]:
        level = body.get("granularity") or 144
        costs = {each.tokens: self.cost(size, each) for each in self.config.levels}
        asked = not body.get("granularity")
        return {
            "granularity": level,
            "visual_tokens": costs[level],
            "full_visual_tokens": costs[576],
            "tokens_per_level": {str(name): cost for name, cost in costs.items()},
            "logits": [0.1, 0.4, 2.0, 1.0, -0.3] if asked else [],
            "probabilities": [0.08, 0.11, 0.55, 0.2, 0.06] if asked else [],
            "cached": len(body["messages"]) > 1,
            "grid": grid_of(size, level, self.config),
        }

    def cost(self, size: tuple[int, int], level: Any) -> int:
        down, across = grid_of(size, level.tokens, self.config)["views"][1]["tiles"]
        return merged_layout(level, down * across + 1, (down, across), size, "spatial_unpad", "picture").num_tokens


def error(status: int, message: str, code: str, **more: Any) -> JSONResponse:
    fields = {"message": message, "type": "server_error", "param": None, "code": code, "request_id": "req-503", **more}
    return JSONResponse({"error": fields}, status, headers={"x-request-id": "req-503"})


def sse(value: Any) -> bytes:
    return f"data: {json.dumps(value)}\n\n".encode()


def chunk(delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
    return sse({"id": "chatcmpl-7", "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]})


def last_text(body: dict[str, Any]) -> str:
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def picture_sizes(body: dict[str, Any]) -> list[tuple[int, int]]:
    parts = [part for message in body["messages"] if isinstance(message["content"], list) for part in message["content"]]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    return [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).size for url in urls]


@contextlib.contextmanager
def running(app: Any, port: int = 0) -> Iterator[str]:
    """Serve an ASGI application on the loopback interface, in a thread; gives its address."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started or not thread.is_alive())
    assert server.started, "the server did not start; see its log"
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
