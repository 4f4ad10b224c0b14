"""Pictures and request bodies that several tests send."""

from __future__ import annotations

import base64
from io import BytesIO
from typing import Any

from PIL import Image

CHAT = "/v1/chat/completions"
WORKER = "/worker_generate_stream"


def picture(size: tuple[int, int] = (30, 20), file_format: str = "PNG", mode: str = "RGB", **options: Any) -> str:
    """An image file in base64."""
    buffer = BytesIO()
    Image.new(mode, size).save(buffer, file_format, **options)
    return base64.b64encode(buffer.getvalue()).decode()


def data_url(data: str) -> str:
    return f"data:image/png;base64,{data}"


def chat_body(text: str = "what is this", urls: tuple[str, ...] = (), **fields: Any) -> dict[str, Any]:
    """A chat request of one question."""
    parts = [*({"type": "image_url", "image_url": {"url": url}} for url in urls), {"type": "text", "text": text}]
    return {"model": "fake", "messages": [{"role": "user", "content": parts if urls else text}], **fields}


def worker_body(prompt: str = "USER: hi ASSISTANT:", **fields: Any) -> dict[str, Any]:
    """A request of LLaVA's protocol, greedy."""
    return {"model": "fake", "prompt": prompt, "temperature": 0, **fields}
