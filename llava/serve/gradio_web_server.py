"""The web page: `python -m llava.serve.gradio_web_server --controller http://localhost:30000 --model-list-mode reload`.

Talks to a controller, or to one worker, over its OpenAI API. See `llava/serve/page/`.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys

from llava.serve.http.flag_checks import check_at_least
from llava.serve.http.listen_address import check_address, shown_url
from llava.serve.http.middleware import JsonNotFound
from llava.serve.http.server import OPEN_PAGE_SECONDS, make_server, run_program, run_server
from llava.serve.page.app import PageOptions, create_page_app
from llava.serve.page.flags import add_page_flags, check_port, read_names

KEY_VARIABLE = "AVG_LLAVA_API_KEY"


def build_parser() -> argparse.ArgumentParser:
    """LLaVA's flags, and ours for keys and the log."""
    parser = argparse.ArgumentParser(prog="python -m llava.serve.gradio_web_server", description="Serve the chat page.")
    add_page_flags(parser, port=7860)
    parser.add_argument("--controller-url", "--controller", dest="controller_url", default="http://localhost:21001",
                        help="address of the controller, or of one worker")  # fmt: skip
    parser.add_argument("--concurrency-count", type=int, default=16, help="answers written at the same time, for all visitors")
    parser.add_argument("--model-list-mode", choices=("once", "reload"), default="once",
                        help="once: keep the first list of models that is not empty; reload: keep it up to date")  # fmt: skip
    parser.add_argument("--embed", action="store_true", help="without a title, to be shown in a frame of another site")
    parser.add_argument("--api-key", default=os.environ.get(KEY_VARIABLE), help=f"key for the controller's API (default: ${KEY_VARIABLE})")
    parser.add_argument("--share", action="store_true", help="refused: it would pass every picture through somebody else's servers")
    parser.add_argument("--moderate", action="store_true", help="refused: it would send every question to somebody else's service")
    return parser


def read_options(args: argparse.Namespace) -> PageOptions:
    """The page's options.

    Raises:
        ValueError: a flag that is not served here, or a number that cannot work.
    """
    if args.share:
        raise ValueError("--share is not served: it passes every picture through a third party; put a reverse proxy in front instead.")
    if args.moderate:
        raise ValueError("--moderate is not served: it sends every question to a third party; moderate in a proxy in front instead.")
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


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0, or 1 with one sentence on standard error."""
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # one line per look at the list of models is too many
    try:
        options = read_options(args)
        check_address(args.host, args.port)
        app = create_page_app(options)
        app.add_middleware(JsonNotFound)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
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


if __name__ == "__main__":
    sys.exit(run_program(main))
