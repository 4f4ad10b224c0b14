"""Encoded images through a stock vllm-router before several engines: it passes them on, and spreads the requests."""

from __future__ import annotations

import asyncio
from pathlib import Path

from PIL import Image

from llava.inference import Assistant
from llava.messages import Message, RoutingRequest
from llava.serve.backend.openai_server import Backend
from llava.serve.protocol import GenerationRequest, Piece, Sampling
from llava.serve.split.engine import SplitEngine
from tests.clients.test_stock_clients import IMAGE, NUMBER_ON_THE_SIGN, environment, program, pytestmark
from tests.serve.fake_backend import Exchange, FakeBackend
from tests.serve.ports import free_port
from tests.serve.split.fake_vllm import MODELS, FakeVllm

__all__ = ["environment", "pytestmark"]


def models(exchange: Exchange) -> None:
    """What the router asks for: health, and the models."""
    exchange.reply(MODELS if "models" in exchange.path else {"status": "ok"})


def test_rows_pass_a_stock_router(environment: Path, tmp_path: Path) -> None:
    fake = FakeVllm(Assistant.load(device="cpu"))
    front, image = Assistant.load(device="cpu", front_only=True), Image.open(IMAGE).convert("RGB")

    async def said(url: str) -> list[str]:
        engine = SplitEngine(front, "micro", Backend(url, ""))
        texts = []
        try:
            assert await engine.look()
            for granularity in (64, None, 64):
                turn = Message("user", "Which number does the sign show?")
                routing, images = RoutingRequest(granularity), (engine.prepare_image(image),)
                request = GenerationRequest("r", (turn,), images=images, sampling=Sampling(max_new_tokens=24), routing=routing)
                texts.append("".join([event.text async for event in engine.submit(request) if isinstance(event, Piece)]))
        finally:
            await engine.close()
        return texts

    with FakeBackend(fake, models) as first, FakeBackend(fake, models) as second:
        url = f"http://127.0.0.1:{(port := free_port())}"
        flags = ["--host", "127.0.0.1", "--port", str(port), "--worker-urls", first.url, second.url, "--policy", "round_robin"]
        command = [str(environment / "bin" / "vllm-router"), *flags, "--prometheus-port", str(free_port())]
        with program(command, url + "/health", tmp_path / "log"):
            assert asyncio.run(said(url)) == [NUMBER_ON_THE_SIGN] * 3
        assert len(first.requests) == len(second.requests) == 2  # one of them is the engine's own look
