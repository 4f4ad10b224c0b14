"""`python -m llava.serve.sglang_worker`, or `openai_worker`: register a running SGLang, vLLM or other OpenAI-compatible server with our
controller.

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
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from llava.flags import Parser, add_ignored
from llava.interrupts import run_program
from llava.serve.http.flag_checks import check_at_least
from llava.serve.http.keys import read_secrets
from llava.serve.http.listen_address import check_address
from llava.serve.worker_flags import (
    NOT_SERVING_YET,
    add_guard_flags,
    add_network_flags,
    add_stream_interval,
    read_registration,
    read_worker_options,
    start_logging,
)

if TYPE_CHECKING:
    from fastapi import FastAPI

    from llava.serve.backend.openai_server import Backend
    from llava.serve.protocol import Limits

logger = logging.getLogger("llava.serve.sglang_worker")  # also when run as a program

PROG = "python -m llava.serve.sglang_worker"
FIRST = (
    *("--backend", "--model", "--model-name", "--backend-api-key-file", "--host", "--port", "--controller", "--worker"),
    *("--limit-model-concurrency", "--api-key-file"),
)
IGNORED = {"--multi-modal": "images are passed on to the backend"}
"""A flag of LLaVA's worker, and why it changes nothing."""


def granularity_list(text: str) -> tuple[int, ...]:
    """Read numbers separated by commas, in ascending order."""
    try:
        levels = tuple(int(part) for part in text.split(","))
    except ValueError:
        levels = ()
    if not levels or list(levels) != sorted(set(levels)) or levels[0] < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no ascending list of tokens per view, such as 36,72,144,288,576")
    return levels


def build_parser(prog: str = PROG) -> Parser:
    """The command line's flags."""
    parser = Parser(prog, "Serve the model of another server.", FIRST)
    add_network_flags(parser)
    group = parser.add_argument_group("backend")
    group.add_argument("--backend", "--sgl-endpoint", required=True, metavar="URL",
                       help="http(s)://host:port of OpenAI-compatible server")  # fmt: skip
    group.add_argument("--model", metavar="NAME", help="what the backend calls the model; its only one when missing")
    group.add_argument("--model-name", metavar="NAME", help="what our clients call it (default: the same)")
    group.add_argument("--backend-api-key", metavar="KEY", help="shown to the backend; the process list shows it too")
    group.add_argument("--backend-api-key-file", metavar="FILE", help="the same, read from a file")
    group.add_argument("--granularities", type=granularity_list, metavar="N,N", default=(),
                       help="tokens per view of its model, where the backend is a vLLM with this project's plug-in")  # fmt: skip
    group.add_argument("--without-router", action="store_true", help="the plug-in's model has no router")
    group.add_argument("--backend-timeout", type=float, default=120.0, metavar="SECONDS", help="how long the backend may be silent")
    group.add_argument("--context-length", type=int, default=4096, metavar="N", help="reported to clients where the backend reports none")
    group.add_argument("--limit-model-concurrency", type=int, default=32, metavar="N", help="requests that the backend gets at once")
    add_stream_interval(group, "chunks")
    add_ignored(group, IGNORED)
    add_guard_flags(parser)
    return parser


def backend_from(args: argparse.Namespace, limits: Limits) -> Backend:
    """The backend that a command line names; its model's name may still be missing.

    Raises:
        ValueError: a flag cannot work.
    """
    from llava.serve.backend.openai_server import Backend
    from llava.serve.http.client import Timeouts

    check_at_least(args, {"backend_timeout": 0.001, "context_length": 1, "limit_model_concurrency": 1, "stream_interval": 1})
    keys = read_secrets([args.backend_api_key] if args.backend_api_key else [], args.backend_api_key_file)
    if len(keys) > 1:
        raise ValueError("More than one key for the backend is given; give one, by flag or by file.")
    if args.without_router and not args.granularities:
        raise ValueError("--without-router says something of a backend with --granularities; give both or neither.")
    seconds = args.backend_timeout
    backend = Backend(
        url=args.backend,
        model=args.model or "",
        name=args.model_name,
        api_key=keys[0] if keys else None,
        granularities=args.granularities,
        has_router=not args.without_router,
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
    """The bridge's app; waits for the backend only where the model's name has to come from there.

    Raises:
        ValueError: a flag cannot work.
    """
    from llava.serve.backend.bridge_app import create_bridge_app, wait_for_model_name

    options, registration = read_worker_options(args), read_registration(args)
    backend = backend_from(args, options["limits"])
    check_address(args.host, args.port)
    if not backend.model:
        backend = replace(backend, model=asyncio.run(wait_for_model_name(backend)))
    return create_bridge_app(backend, registration=registration, **options)


def serve(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT.

    Raises:
        ValueError: a flag cannot work.
    """
    from llava.serve.api.worker_app import run_worker

    start_logging(args, logger)
    return run_worker(build_app(args), args.host, args.port, log_level=args.log_level)


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Run the command; 0, or 1 with one sentence on standard error."""
    args = build_parser(prog).parse_args(argv)
    return run_program(lambda: serve(args), nothing_kept=NOT_SERVING_YET)


if __name__ == "__main__":
    sys.exit(main())
