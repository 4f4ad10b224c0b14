"""The bridge: the app of a worker that answers through another server, and finding out which model that server has."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from fastapi import FastAPI

from llava.serve.api.worker_app import create_worker_app
from llava.serve.backend.openai_engine import RemoteEngine
from llava.serve.backend.openai_server import Backend, list_models
from llava.serve.http.client import BoundedClient, BrokenResponse, Unreachable
from llava.serve.protocol import ErrorKind, Limits

logger = logging.getLogger(__name__)

WAIT_SECONDS = 1.0
"""Between two looks at a backend that is not there yet."""


def create_bridge_app(backend: Backend, limits: Limits | None = None, **options: Any) -> FastAPI:
    """The app of a worker that answers through a backend.

    Args:
        backend: where the answers come from. limits: of one request. options: further arguments of `create_worker_app`.
    """
    engine = RemoteEngine(backend)
    return create_worker_app(engine, limits, concurrency=backend.concurrency, not_ready=ErrorKind.BACKEND_UNREACHABLE, **options)


async def wait_for_model_name(backend: Backend) -> str:
    """The name of the one model that a backend serves, once it is there.

    Raises:
        ValueError: it serves several or none.
    """
    client = BoundedClient()
    level = logging.WARNING  # once; the waiting itself is no news
    try:
        while True:
            try:
                models = await list_models(client, backend)
                break
            except (Unreachable, BrokenResponse) as error:
                logger.log(level, "waiting for the backend %s: %s", backend.url, error)
                level = logging.DEBUG
                await asyncio.sleep(WAIT_SECONDS)
    finally:
        await client.close()
    if len(models) != 1:
        raise ValueError(
            f"The backend {backend.url} serves {[model.name for model in models][:8]}, expected one model; name it with --model."
        )
    return models[0].name
