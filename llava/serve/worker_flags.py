"""Flags that the serving programs share: where to listen and register, whom to let in, and what one request may take."""

from __future__ import annotations

import argparse
import logging
from typing import TYPE_CHECKING, Any

from llava.fetch import FetchError, split_url
from llava.flags import FlagGroup, add_log_level
from llava.flags import start_logging as start_common_logging
from llava.serve.http.flag_checks import add_body_flags, body_limits, check_at_least, check_body_flags
from llava.serve.http.keys import read_secrets
from llava.serve.http.listen_address import shown_url
from llava.serve.protocol import Limits

if TYPE_CHECKING:
    from llava.serve.cluster.registration import Registration

NOT_SERVING_YET = "nothing was served yet"
"""What Ctrl-C reports of a program that was still starting."""


def add_address_flags(parser: argparse.ArgumentParser, host: str, port: int) -> argparse._ArgumentGroup:
    """Where a program listens.

    Args:
        host, port: the default ones.

    Returns:
        The group, for whatever else is about the network.
    """
    group = parser.add_argument_group("network")
    group.add_argument("--host", default=host, help="address to listen on; 0.0.0.0 is every interface")
    group.add_argument("--port", type=int, default=port, help="port to listen on; workers and controllers take a free one for 0")
    return group


def add_network_flags(parser: argparse.ArgumentParser, port: int = 21002) -> None:
    """Where a worker listens, and the controller that it registers with.

    Args:
        port: the default one.
    """
    group = add_address_flags(parser, "localhost", port)
    group.add_argument("--controller", "--controller-address", dest="controller_address", metavar="URL",
                       help="controller to register with; without it the worker serves alone")  # fmt: skip
    group.add_argument("--worker", "--worker-address", dest="worker_address", metavar="URL",
                       help="this worker's address as the controller reaches it (default: host and port)")  # fmt: skip
    group.add_argument("--no-register", action="store_true", help="serve alone even if a controller is named")
    group.add_argument("--registration-token", metavar="TOKEN", help="what the controller asks of workers; the process list shows it")
    group.add_argument("--registration-token-file", metavar="FILE", help="the same, read from a file")


def add_guard_flags(parser: argparse.ArgumentParser) -> None:
    """Whom the worker lets in, what one request may take, and what is logged."""
    defaults = Limits()
    group = parser.add_argument_group("limits and access")
    group.add_argument("--api-key", action="append", default=[], metavar="KEY", help="asked of every client; may be given more than once")
    group.add_argument("--api-key-file", metavar="FILE", help="keys, one per line")
    group.add_argument("--max-queue", type=int, default=defaults.max_queue, metavar="N", help="requests that wait; the next gets 503")
    group.add_argument("--max-new-tokens", type=int, default=defaults.max_new_tokens, metavar="N", help="longest answer, in tokens")
    group.add_argument("--max-images", type=int, default=defaults.max_images, metavar="N", help="images of one request")
    add_body_flags(group)
    group.add_argument("--allow-remote-images", action="store_true", help="fetch http(s) images from public addresses")
    group.add_argument(
        "--allowed-host", action="append", default=[], metavar="HOST", help="fetch from this host only; may be given more than once"
    )
    group.add_argument(
        "--report-cache-hits", action="store_true", help="report in answers which images were seen before, whoever sent them"
    )
    log = parser.add_argument_group("log")
    add_log_level(log)
    log.add_argument("--log-file", metavar="FILE", help="also write the log to this file")


def add_stream_interval(group: FlagGroup, unit: str) -> None:
    """How often a stream is written; `unit` is what an engine makes at a time."""
    group.add_argument("--stream-interval", type=int, default=1, metavar="N", help=f"{unit} between two events of a stream")


def read_limits(args: argparse.Namespace) -> Limits:
    """The limits that the flags ask for.

    Raises:
        ValueError: numbers that cannot work, or hosts without fetching.
    """
    check_at_least(args, {"max_queue": 0, "max_new_tokens": 1, "max_images": 0})
    if args.allowed_host and not args.allow_remote_images:
        raise ValueError("--allowed-host is given, but fetching is off; add --allow-remote-images or leave it out.")
    check_body_flags(args)
    return Limits(
        max_images=args.max_images,
        max_new_tokens=args.max_new_tokens,
        max_queue=args.max_queue,
        allow_remote_images=args.allow_remote_images,
        allowed_hosts=tuple(args.allowed_host),
        **body_limits(args),
    )


def read_worker_options(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags say about a worker's app, as arguments of `create_worker_app`.

    Raises:
        ValueError: flags that cannot work.
    """
    return {
        "limits": read_limits(args),
        "api_keys": read_api_keys(args),
        "allowed_origins": args.allowed_origins,
        "stream_interval": args.stream_interval,
        "report_cache_hits": args.report_cache_hits,
    }


def read_api_keys(args: argparse.Namespace) -> tuple[str, ...]:
    """The keys of the command line and of the key file."""
    return read_secrets(args.api_key, args.api_key_file)


def read_registration(args: argparse.Namespace) -> Registration | None:
    """The controller to register with, or `None`.

    Raises:
        ValueError: addresses that are none, a free port that nobody could name, or two tokens.
    """
    from llava.serve.cluster.registration import Registration

    if args.controller_address is None or args.no_register:
        return None
    tokens = read_secrets([args.registration_token] if args.registration_token else [], args.registration_token_file)
    if len(tokens) > 1:
        raise ValueError("More than one registration token is given; give one, by flag or by file.")
    if args.worker_address is None and args.port == 0:
        raise ValueError("--port is 0, so the controller cannot be told where this worker is; give --port or --worker.")
    worker_url = args.worker_address or shown_url(args.host, args.port)
    return Registration(
        _checked_url("--controller", args.controller_address),
        _checked_url("--worker", worker_url),
        tokens[0] if tokens else None,
    )


def _checked_url(flag: str, url: str) -> str:
    try:
        split_url(url)
    except FetchError as error:
        raise ValueError(f"{flag} is {url!r}, expected http(s)://host:port.") from error
    return url.rstrip("/")


def start_logging(args: argparse.Namespace, logger: logging.Logger) -> None:
    """Log to standard error, and to the file that `--log-file` names.

    Raises:
        ValueError: the file cannot be written.
    """
    start_common_logging(args, logger)
    if args.log_file is None:
        return
    try:
        handler = logging.FileHandler(args.log_file, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--log-file {args.log_file!r} cannot be written; check its folder.") from error
    handler.setFormatter(logging.Formatter("%(asctime)s | %(levelname)s | %(name)s | %(message)s"))
    for name in ("llava", "uvicorn"):
        logging.getLogger(name).addHandler(handler)
