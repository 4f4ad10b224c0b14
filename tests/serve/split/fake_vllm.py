"""A vLLM with the plug-in, played by the whole model: rows in, token ids out, over the wire form that vLLM speaks.

What a real one does is tested in `tests/vllm`; this one shows that what we send and read fits together, and can be told to misbehave.
"""

from __future__ import annotations

import base64
import time
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import torch
from torch import Tensor

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.inference import Assistant, Options
from llava.messages import Message, text_of_parts
from llava.model.compose import ComposedRow
from llava.model.splice import prompt_row, splice_rows
from llava.timing import StageTimer
from tests.serve.fake_backend import Exchange, FakeBackend

IMAGE_ID = 0
"""What stands in an image's place in the server's prompt."""
MODELS = {"object": "list", "data": [{"id": "micro", "object": "model", "owned_by": "vllm", "max_model_len": 1024}]}


@dataclass
class FakeVllm:
    """Answers chat completions with rows for images.

    assistant: the whole model. pause: seconds between two tokens. bodies: what came. written: tokens of each answer that were sent.
    """

    assistant: Assistant
    pause: float = 0.0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    written: list[int] = field(default_factory=list)

    def __call__(self, exchange: Exchange) -> None:
        body = exchange.json
        self.bodies.append(body)
        turns, rows = read_messages(body["messages"])
        with torch.inference_mode():
            prompt = prompt_row(self.assistant.prompt_ids(turns, len(rows)))
            model = self.assistant.model
            [row] = splice_rows([prompt], rows, model.embed_text, model.config.context_length)
            options = Options(max_new_tokens=body["max_tokens"], min_new_tokens=body.get("min_tokens", 0))
            [answer] = self.assistant.answer_rows([ComposedRow(row, [])], options, StageTimer(torch.device("cpu")))
            targets = [torch.tensor(answer.token_ids)]
            [scores] = self.assistant._answer_log_probabilities([row], targets)
        costs = iter(len(each) for each in rows)
        ids = [token for number in prompt.ids.tolist() for token in ([IMAGE_ID] * next(costs) if number < 0 else [number])]
        self._stream(exchange, body, ids, answer.token_ids, answer.finish_reason, scores)

    def _stream(self, exchange: Exchange, body: dict[str, Any], ids: list[int], new: list[int], reason: str, scores: Tensor) -> None:
        assert body["stream"] and body["return_token_ids"]
        exchange.begin_stream()
        exchange.event({"prompt_token_ids": ids, "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        self.written.append(0)
        for place, token in enumerate(new):
            time.sleep(self.pause)
            choice: dict[str, Any] = {"index": 0, "delta": {"content": "?"}, "token_ids": [token], "finish_reason": None}
            if body.get("logprobs"):
                choice["logprobs"] = {"content": [scored(token, scores[place], body["top_logprobs"])]}
            if place == len(new) - 1:
                choice["finish_reason"] = reason
            exchange.event({"choices": [choice]})
            self.written[-1] += 1
        exchange.event({"choices": [], "usage": {"prompt_tokens": len(ids), "completion_tokens": len(new)}})
        exchange.event("[DONE]")
        exchange.end_stream()


def scored(token: int, scores: Tensor, count: int) -> dict[str, Any]:
    """A token's log probability, and those of the likeliest, as `return_tokens_as_token_ids` writes them."""
    values, others = scores.topk(count)
    top = [{"token": f"token_id:{other}", "logprob": value} for other, value in zip(others.tolist(), values.tolist(), strict=True)]
    return {"token": f"token_id:{token}", "logprob": float(scores[token]), "top_logprobs": top}


def read_messages(messages: list[dict[str, Any]]) -> tuple[list[Message], list[Tensor]]:
    """Turns and rows of a body, the parts of a turn a line each."""
    turns, rows = [], []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            rows += [rows_of(part) for part in content if part["type"] == "image_embeds"]
            content = text_of_parts([part.get("text", DEFAULT_IMAGE_TOKEN) for part in content])
        turns.append(Message(message["role"], content))
    return turns, rows


def rows_of(part: dict[str, Any]) -> Tensor:
    """The rows of a content part, as vLLM's media loader reads them."""
    rows: Tensor = torch.load(BytesIO(base64.b64decode(part["image_embeds"])), weights_only=True)
    return rows


def serving(fake: Any, models: Any = MODELS) -> FakeBackend:
    """A server on a free port that answers as `fake` does."""
    return FakeBackend(fake, models)
