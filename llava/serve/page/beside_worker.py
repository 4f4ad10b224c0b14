"""A worker's API and the page at one address."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from llava.serve.http.middleware import JsonNotFound

API_PATHS = (
    *("/v1", "/health", "/ready", "/metrics", "/openapi.json", "/worker_generate_stream", "/worker_get_status"),
    *("/tokenize", "/detokenize", "/server_info", "/model_info", "/get_server_info", "/get_model_info"),
)


class Split:
    """Sends the API's paths to the worker and all others to the page."""

    def __init__(self, worker: ASGIApp, page: ASGIApp | None) -> None:
        self.worker, self.page = worker, page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        is_api = self.page is None or any(path == prefix or path.startswith(prefix + "/") for prefix in API_PATHS)
        app = self.worker if is_api or self.page is None else self.page
        await app(scope, receive, send)


def join_apps(worker: FastAPI, page: FastAPI | None) -> FastAPI:
    """A worker and a page as one application; both start and end with it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for part in (worker, page):
                if part is not None:
                    await stack.enter_async_context(part.router.lifespan_context(part))
            yield

    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    app.state.failed = worker.state.failed
    app.state.handler, app.state.drain = worker.state.handler, worker.state.drain  # the page's questions are requests to the worker
    app.mount("/", Split(worker, page and JsonNotFound(page)))
    return app
