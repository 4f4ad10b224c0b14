"""The web page: `python -m llava.serve.gradio_web_server --controller http://localhost:30000 --model-list-mode reload`.

Talks to a controller, or to one worker, over its OpenAI API. See `llava/serve/page/`.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llava.flags import Parser, add_log_level, start_logging
from llava.interrupts import run_program
from llava.serve.http.flag_checks import check_at_least
from llava.serve.http.listen_address import check_address, shown_url
from llava.serve.page.flags import add_page_flags, check_port, read_names
from llava.serve.worker_flags import NOT_SERVING_YET, add_address_flags

if TYPE_CHECKING:
    from llava.serve.page.app import PageOptions

logger = logging.getLogger("llava.serve.gradio_web_server")  # also when run as a program

PROG = "python -m llava.serve.gradio_web_server"
KEY_VARIABLE = "AVG_LLAVA_API_KEY"
FIRST = (
    *("--controller", "--host", "--port", "--model-list-mode", "--allow-host", "--concurrency-count", "--controller-api-key", "--embed"),
    *("--log-dir", "--no-log"),
)


def build_parser(prog: str = PROG) -> Parser:
    """LLaVA's flags, and ours for keys and the log."""
    parser = Parser(prog, "Serve the chat page.", FIRST)
    add_address_flags(parser, "127.0.0.1", 7860)
    add_page_flags(parser)
    page = parser.add_argument_group("page")
    page.add_argument("--controller", "--controller-url", dest="controller_url", default="http://localhost:21001", metavar="URL",
                      help="address of the controller, or of one worker")  # fmt: skip
    page.add_argument("--controller-api-key", "--api-key", dest="api_key", default=os.environ.get(KEY_VARIABLE), metavar="KEY",
                      help=f"shown to a controller or worker that was started with --api-key (default: ${KEY_VARIABLE})")  # fmt: skip
    page.add_argument("--concurrency-count", type=int, default=16, metavar="N", help="answers written at the same time, for all visitors")
    page.add_argument("--model-list-mode", choices=("once", "reload"), default="once",
                      help="once: keep the first list of models that is not empty; reload: keep it up to date")  # fmt: skip
    page.add_argument("--embed", action="store_true", help="without a title, to be shown in a frame of another site")
    add_log_level(parser)
    return parser


def read_options(args: argparse.Namespace) -> PageOptions:
    """The page's options.

    Raises:
        ValueError: a number or a name that cannot work.
    """
    from llava.serve.page.app import PageOptions

    check_at_least(args, {"concurrency_count": 1})
    check_port(args)
    return PageOptions(
        url=args.controller_url,
        api_key=args.api_key,
        mode=args.model_list_mode,
        concurrency=args.concurrency_count,
        embed=args.embed,
        log_folder=None if args.no_log else args.log_dir,
        names=read_names(args),
    )


def serve(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT.

    Raises:
        ValueError: a flag cannot work.
    """
    from llava.serve.http.middleware import JsonNotFound
    from llava.serve.http.server import OPEN_PAGE_SECONDS, make_server, run_server
    from llava.serve.page.app import create_page_app

    start_logging(args, logger)
    options = read_options(args)
    check_address(args.host, args.port)
    app = create_page_app(options)
    app.add_middleware(JsonNotFound)
    greeting = f"The page is at {shown_url(args.host, args.port)}"
    server = make_server(
        app,
        args.host,
        args.port,
        log_level="warning",
        on_started=lambda: print(greeting, flush=True),
        timeout_graceful_shutdown=OPEN_PAGE_SECONDS,
    )
    return run_server(server)


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Run the command; 0, or 1 with one sentence on standard error."""
    args = build_parser(prog).parse_args(argv)
    return run_program(lambda: serve(args), nothing_kept=NOT_SERVING_YET)


if __name__ == "__main__":
    sys.exit(main())
