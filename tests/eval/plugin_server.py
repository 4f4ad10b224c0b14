"""A stand-in for a vLLM with the plug-in: the micro model of the tests, asked in the plug-in's words."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from llava.images import load_image
from llava.inference import Assistant, Options
from llava.messages import RoutingRequest
from tests.serve.fake_backend import Exchange, FakeBackend

MODELS = {"object": "list", "data": [{"id": "avg", "object": "model", "owned_by": "vllm", "root": "/models/avg"}]}


def plugin_server(assistant: Assistant, change: Callable[[dict[str, Any]], dict[str, Any]] = lambda body: body) -> FakeBackend:
    """`with plugin_server(assistant) as server:` answers as the assistant does. change: what becomes of each answer's body."""
    lock = threading.Lock()

    def answer(exchange: Exchange) -> None:
        body = exchange.json
        parts = body["messages"][-1]["content"]
        parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
        images = [load_image(part["image_url"]["url"]) for part in parts if part["type"] == "image_url"]
        text = "\n".join(part["text"] for part in parts if part["type"] == "text")
        wishes = body.get("mm_processor_kwargs", {})
        wish = wishes.get("vis_token_granularity")
        routing = RoutingRequest(wish, wishes.get("max_visual_tokens"), wishes.get("granularity_bias", 0.0))
        with lock:
            said = assistant.answer(images, text, Options(max_new_tokens=body["max_tokens"], routing=routing))
        usage = {"prompt_tokens": said.prompt_tokens, "completion_tokens": len(said.token_ids)}
        choice = {"message": {"content": f" {said.text}"}, "finish_reason": said.finish_reason}
        exchange.reply(change({"choices": [choice], "usage": usage}))

    return FakeBackend(answer, models=MODELS)
