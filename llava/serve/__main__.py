"""All in one process, for a laptop: `python -m llava.serve [--model-path PATH] [--port 8000]`.

A worker with its OpenAI API under /v1, and the page at /. With several machines or models, start a controller, workers and
`llava.serve.gradio_web_server` instead.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from llava.serve.api.worker_app import create_worker_app, run_worker
from llava.serve.http.listen_address import check_address, shown_url
from llava.serve.http.middleware import JsonNotFound
from llava.serve.http.origins import AllowedHosts
from llava.serve.http.server import OPEN_PAGE_SECONDS, run_program
from llava.serve.model_worker import add_batch_flags, add_model_flags, batch_rows, check_arguments, load_engine
from llava.serve.page.flags import add_page_flags, check_port, read_names
from llava.serve.worker_flags import add_guard_flags, read_api_keys, read_limits, start_logging

logger = logging.getLogger("llava.serve")

API_PATHS = (
    *("/v1", "/health", "/ready", "/metrics", "/openapi.json", "/worker_generate_stream", "/worker_get_status"),
    *("/tokenize", "/detokenize", "/server_info", "/model_info", "/get_server_info", "/get_model_info"),
)


def build_parser() -> argparse.ArgumentParser:
    """The worker's flags, without those of a controller."""
    parser = argparse.ArgumentParser(prog="python -m llava.serve", description="Serve a model, its OpenAI API and the page in one process.")
    add_page_flags(parser, port=8000)
    parser.add_argument("--no-page", action="store_true", help="the API alone")
    add_model_flags(parser)
    add_batch_flags(parser)
    add_guard_flags(parser)
    return parser


def build_app(args: argparse.Namespace) -> FastAPI:
    """The whole application, its model loaded.

    Raises:
        ValueError: flags or a checkpoint that cannot work. OSError: files that cannot be read.
    """
    check_arguments(args)
    check_port(args)
    limits, keys, names = read_limits(args), read_api_keys(args), read_names(args)
    check_address(args.host, args.port)
    engine = load_engine(args)
    worker = create_worker_app(
        engine,
        limits,
        api_keys=keys,
        allowed_origins=args.allowed_origins,
        concurrency=batch_rows(args),
        stream_interval=args.stream_interval,
        report_cache_hits=args.report_cache_hits,
    )
    page = None if args.no_page else _page(args, keys)
    app = join_apps(worker, page)
    if names is not None:
        app.add_middleware(AllowedHosts, names=names)
    return app


def _page(args: argparse.Namespace, keys: tuple[str, ...]) -> FastAPI:
    from llava.serve.page.app import PageOptions, create_page_app  # Gradio takes seconds to import, and --no-page needs none

    return create_page_app(
        PageOptions(
            url=shown_url(args.host, args.port),
            api_key=keys[0] if keys else None,
            mode="reload",
            log_folder=None if args.no_log else args.log_dir,
        )
    )


def _greeting(args: argparse.Namespace, model: str) -> str:
    url = shown_url(args.host, args.port)
    lines = [f"Model {model} is ready.", f"  API   {url}/v1  (OpenAI's; metrics at {url}/metrics)"]
    return "\n".join([*lines, *([f"  Page  {url}/"] if not args.no_page else []), "Ctrl-C ends it."])


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


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; 0, or 1 with one sentence on standard error."""
    args = build_parser().parse_args(argv)
    try:
        start_logging(args)
        app = build_app(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    greeting = _greeting(args, app.state.handler.engine.card.name)
    return run_worker(
        app,
        args.host,
        args.port,
        log_level=args.log_level,
        on_started=lambda: print(greeting, flush=True),
        timeout_graceful_shutdown=OPEN_PAGE_SECONDS,
    )


if __name__ == "__main__":
    sys.exit(run_program(main))
