"""The web page: `python -m llava.serve.gradio_web_server --controller http://localhost:30000 --model-list-mode reload`.

Talks to a controller, or to one worker, over its OpenAI API. See `llava/serve/page/`.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from llava.serve.http_guard import MAX_HEADER_BYTES
from llava.serve.http_server import GuardedProtocol, check_address
from llava.serve.page.app import PageOptions, create_page_app
from llava.serve.page.chat import Chat

KEY_VARIABLE = "AVG_LLAVA_API_KEY"
DRAIN_SECONDS = 120.0
"""That running answers get to finish after SIGTERM."""
FLUSH_SECONDS = 3
"""That open pages get afterwards; their connections last as long as they are looked at."""


def build_parser() -> argparse.ArgumentParser:
    """LLaVA's flags, and ours for keys and the log."""
    parser = argparse.ArgumentParser(prog="python -m llava.serve.gradio_web_server", description="Serve the chat page.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is every interface (default: this machine only)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on")
    parser.add_argument("--controller-url", "--controller", dest="controller_url", default="http://localhost:21001",
                        help="address of the controller, or of one worker")  # fmt: skip
    parser.add_argument("--concurrency-count", type=int, default=16, help="answers written at the same time, for all visitors")
    parser.add_argument("--model-list-mode", choices=("once", "reload"), default="once",
                        help="once: keep the first list of models that is not empty; reload: keep it up to date")  # fmt: skip
    parser.add_argument("--embed", action="store_true", help="without a title, to be shown in a frame of another site")
    parser.add_argument("--api-key", default=os.environ.get(KEY_VARIABLE), help=f"key for the controller's API (default: ${KEY_VARIABLE})")
    parser.add_argument("--log-dir", type=Path, default=Path("logs"), help="where conversations and votes are written, as lines of JSON")
    parser.add_argument("--no-log", action="store_true", help="write no conversations and votes")
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
    if args.concurrency_count < 1:
        raise ValueError(f"--concurrency-count is {args.concurrency_count}, expected 1 or more.")
    if not 0 < args.port < 65536:
        raise ValueError(f"--port is {args.port}, expected 1 to 65535.")
    return PageOptions(
        url=args.controller_url,
        api_key=args.api_key,
        mode=args.model_list_mode,
        concurrency=args.concurrency_count,
        embed=args.embed,
        log_folder=None if args.no_log else args.log_dir,
    )


class PageServer(uvicorn.Server):
    """Ends well on SIGTERM and SIGINT: takes no new questions, lets running answers finish, returns. A second signal ends it at once."""

    def __init__(self, config: uvicorn.Config, chat: Chat) -> None:
        super().__init__(config)
        self.chat = chat
        self._finishing: asyncio.Task[None] | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals on the loop; uvicorn's own way raises them again at the end, and the exit status would be theirs."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.stop)
        yield

    def stop(self) -> None:
        """Begin to end; called again, end at once."""
        if self._finishing is not None:
            self.should_exit = self.force_exit = True
            return
        self._finishing = asyncio.get_running_loop().create_task(self._finish())

    async def _finish(self) -> None:
        await self.chat.drain(DRAIN_SECONDS)
        self.should_exit = True


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0, or 1 with one sentence on standard error."""
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # one line per look at the list of models is too many
    try:
        options = read_options(args)
        check_address(args.host, args.port)
        app = create_page_app(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"The page is at http://{'localhost' if args.host == '0.0.0.0' else args.host}:{args.port}", flush=True)
    config = uvicorn.Config(
        app,
        host=args.host,
        port=args.port,
        http=GuardedProtocol,
        ws="none",
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        log_level="warning",
        timeout_graceful_shutdown=FLUSH_SECONDS,
        server_header=False,
    )
    server = PageServer(config, app.state.chat)
    try:
        server.run()
    except SystemExit:  # uvicorn's word for a port that is taken; it logged which
        return 1
    return 0 if server.started else 1


if __name__ == "__main__":
    sys.exit(main())
