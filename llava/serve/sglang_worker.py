"""`python -m llava.serve.sglang_worker`: register a running SGLang, vLLM or other OpenAI-compatible server with our controller.

    controller <──registers── this worker ──/v1/chat/completions──> backend

To the controller and its clients it is a worker like any other: LLaVA's protocol and the OpenAI API. The backend may start before or after
it, go away and come back.

    python -m llava.serve.sglang_worker --controller http://localhost:10000 --port 40002 --worker http://localhost:40002 \
        --backend http://127.0.0.1:30000 --model llava-v1.5-7b
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

from fastapi import FastAPI

from llava.serve.api.worker_app import create_worker_app, run_worker
from llava.serve.backend.openai_engine import RemoteEngine
from llava.serve.backend.openai_server import Backend, list_models
from llava.serve.cluster.registration import Registration
from llava.serve.http.client import BoundedClient, BrokenResponse, Timeouts, Unreachable
from llava.serve.http.flag_checks import check_at_least
from llava.serve.http.keys import read_secrets
from llava.serve.http.listen_address import check_address
from llava.serve.http.server import run_program
from llava.serve.protocol import ErrorKind, Limits
from llava.serve.worker_flags import add_guard_flags, add_network_flags, read_api_keys, read_limits, read_registration, start_logging

logger = logging.getLogger("llava.serve.sglang_worker")  # also when run as a program

WAIT_SECONDS = 1.0
"""Between two looks at a backend that is not there yet."""


def create_bridge_app(
    backend: Backend,
    limits: Limits | None = None,
    *,
    api_keys: Sequence[str] = (),
    allowed_origins: Sequence[str] = (),
    registration: Registration | None = None,
    stream_interval: int = 1,
    report_cache_hits: bool = False,
) -> FastAPI:
    """The app of a worker that answers through a backend; see `create_worker_app`."""
    engine = RemoteEngine(backend)
    app = create_worker_app(
        engine,
        limits,
        api_keys=api_keys,
        allowed_origins=allowed_origins,
        registration=registration,
        concurrency=backend.concurrency,
        stream_interval=stream_interval,
        not_ready=ErrorKind.BACKEND_UNREACHABLE,
        report_cache_hits=report_cache_hits,
    )
    worker_lifespan = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        async with worker_lifespan(app):
            yield

    app.router.lifespan_context = lifespan
    return app


async def wait_for_model_name(backend: Backend) -> str:
    """The name of the one model that a backend serves, once it is there.

    Raises:
        ValueError: it serves several or none.
    """
    outbound = BoundedClient()
    level = logging.WARNING  # once; the waiting itself is no news
    try:
        while True:
            try:
                models = await list_models(outbound, backend)
                break
            except (Unreachable, BrokenResponse) as error:
                logger.log(level, "waiting for the backend %s: %s", backend.url, error)
                level = logging.DEBUG
                await asyncio.sleep(WAIT_SECONDS)
    finally:
        await outbound.close()
    if len(models) != 1:
        raise ValueError(
            f"The backend {backend.url} serves {[model.name for model in models][:8]}, expected one model; name it with --model."
        )
    return models[0].name


def build_parser() -> argparse.ArgumentParser:
    """The command line's flags."""
    parser = argparse.ArgumentParser(prog="python -m llava.serve.sglang_worker", description="Serve the model of another server.")
    add_network_flags(parser)
    group = parser.add_argument_group("backend")
    group.add_argument(
        "--backend", "--sgl-endpoint", required=True, metavar="URL", help="http(s)://host:port of an OpenAI-compatible server"
    )
    group.add_argument("--model", metavar="NAME", help="what the backend calls the model; its only one when missing")
    group.add_argument("--model-name", metavar="NAME", help="what our clients call it (default: the same)")
    group.add_argument("--backend-api-key", metavar="KEY", help="shown to the backend; the process list shows it too")
    group.add_argument("--backend-api-key-file", metavar="FILE", help="the same, read from a file")
    group.add_argument("--backend-timeout", type=float, default=120.0, metavar="SECONDS", help="of its silence (default: %(default)g)")
    group.add_argument(
        "--context-length", type=int, default=4096, help="told to clients where the backend tells none (default: %(default)s)"
    )
    group.add_argument(
        "--limit-model-concurrency", type=int, default=32, metavar="N", help="requests it gets at once (default: %(default)s)"
    )
    group.add_argument("--stream-interval", type=int, default=1, help="chunks between two parts of a stream (default: %(default)s)")
    group.add_argument("--multi-modal", action="store_true", help="LLaVA's old flag: says that it changes nothing, pictures are passed on")
    add_guard_flags(parser)
    return parser


def backend_from(args: argparse.Namespace, limits: Limits) -> Backend:
    """The backend that a command line names; its model's name may still be missing.

    Raises:
        ValueError: a flag cannot work.
    """
    check_at_least(args, {"backend_timeout": 0.001, "context_length": 1, "limit_model_concurrency": 1, "stream_interval": 1})
    keys = read_secrets([args.backend_api_key] if args.backend_api_key else [], args.backend_api_key_file)
    if len(keys) > 1:
        raise ValueError("More than one key for the backend is given; give one, by flag or by file.")
    seconds = args.backend_timeout
    backend = Backend(
        url=args.backend,
        model=args.model or "",
        name=args.model_name,
        api_key=keys[0] if keys else None,
        context_length=args.context_length,
        max_images=limits.max_images,
        concurrency=args.limit_model_concurrency,
        max_queue=limits.max_queue,
        timeouts=Timeouts(connect=3.0, headers=seconds, read=seconds, total=30 * seconds),
    )
    try:
        _ = backend.endpoint
    except ValueError as error:
        raise ValueError(f"--backend is {args.backend!r}, expected http(s)://host:port, with or without /v1.") from error
    return backend


def build_app(args: argparse.Namespace) -> FastAPI:
    """The bridge's app; waits for the backend only where the model's name has to come from there."""
    limits, keys, registration = read_limits(args), read_api_keys(args), read_registration(args)
    backend = backend_from(args, limits)
    check_address(args.host, args.port)
    if args.multi_modal:
        logger.warning("--multi-modal changes nothing: pictures are passed on to the backend")
    if not backend.model:
        backend = replace(backend, model=asyncio.run(wait_for_model_name(backend)))
    return create_bridge_app(
        backend,
        limits,
        api_keys=keys,
        allowed_origins=args.allowed_origins,
        registration=registration,
        stream_interval=args.stream_interval,
        report_cache_hits=args.report_cache_hits,
    )


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; 0, or 1 with one sentence on standard error."""
    args = build_parser().parse_args(argv)
    try:
        start_logging(args)
        app = build_app(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return run_worker(app, args.host, args.port, log_level=args.log_level)


if __name__ == "__main__":
    sys.exit(run_program(main))
