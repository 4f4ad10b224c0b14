"""All in one process, for a laptop: `python -m llava.serve [--model-path PATH] [--port 8000]`.

A worker with its OpenAI API under /v1, and the page at /. With several machines or models, start a controller, workers and
`llava.serve.gradio_web_server` instead.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llava.flags import Parser
from llava.interrupts import run_program
from llava.serve.http.listen_address import check_address, shown_url
from llava.serve.model_worker import add_engine_flags, check_arguments, engine_options, load_engine
from llava.serve.page.flags import add_page_flags, check_port, read_names
from llava.serve.worker_flags import NOT_SERVING_YET, add_address_flags, add_guard_flags, read_worker_options, start_logging

if TYPE_CHECKING:
    from fastapi import FastAPI

logger = logging.getLogger("llava.serve")

PROG = "python -m llava.serve"
FIRST = (
    *("--model-path", "--model-base", "--host", "--port", "--device", "--load-4bit", "--no-page", "--api-key-file", "--allow-host"),
    "--no-log",
)


def build_parser(prog: str = PROG) -> Parser:
    """The worker's flags, without those of a controller, and the page's."""
    parser = Parser(prog, "Serve a model, its OpenAI API and the page in one process.", FIRST)
    add_address_flags(parser, "127.0.0.1", 8000)
    add_page_flags(parser)
    parser.add_argument("--no-page", action="store_true", help="the API alone")
    add_engine_flags(parser)
    add_guard_flags(parser)
    return parser


def build_app(args: argparse.Namespace) -> FastAPI:
    """The whole application, its model loaded.

    Raises:
        ValueError: flags or a checkpoint that cannot work. OSError: files that cannot be read.
    """
    from llava.serve.api.worker_app import create_worker_app
    from llava.serve.http.origins import AllowedHosts
    from llava.serve.page.beside_worker import join_apps

    check_arguments(args)
    check_port(args)
    options, names = read_worker_options(args), read_names(args)
    check_address(args.host, args.port)
    worker = create_worker_app(load_engine(args), **engine_options(args), **options)
    app = join_apps(worker, None if args.no_page else _page(args, options["api_keys"]))
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
    state = {"embedded": "is ready", "vllm": f"is ready when {url}/ready says so: its vLLM may take a minute"}[args.engine]
    lines = [f"Model {model} {state}.", f"  API   {url}/v1  (OpenAI's; metrics at {url}/metrics)"]
    return "\n".join([*lines, *([f"  Page  {url}/"] if not args.no_page else []), "Ctrl-C ends it."])


def serve(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT.

    Raises:
        ValueError: flags or a checkpoint that cannot work. OSError: files that cannot be read.
    """
    from llava.serve.api.worker_app import run_worker
    from llava.serve.http.server import OPEN_PAGE_SECONDS

    start_logging(args, logger)
    app = build_app(args)
    greeting = _greeting(args, app.state.handler.engine.card.name)
    return run_worker(
        app,
        args.host,
        args.port,
        log_level=args.log_level,
        on_started=lambda: print(greeting, flush=True),
        timeout_graceful_shutdown=OPEN_PAGE_SECONDS,
    )


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Run the command; 0, or 1 with one sentence on standard error."""
    args = build_parser(prog).parse_args(argv)
    return run_program(lambda: serve(args), nothing_kept=NOT_SERVING_YET)


if __name__ == "__main__":
    sys.exit(main())
