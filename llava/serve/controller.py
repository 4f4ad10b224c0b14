"""`python -m llava.serve.controller`: knows the workers, and answers for all of them at one address.

    clients, page ──> controller ──> workers (`model_worker`, `sglang_worker`)
                          ^──────────── registration and heartbeats

    python -m llava.serve.controller --host 0.0.0.0 --port 30000
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from llava.constants import CONTROLLER_HEART_BEAT_EXPIRATION
from llava.log import setup_logging
from llava.serve.cluster.controller_app import create_controller_app
from llava.serve.cluster.dispatch import DispatchMethod
from llava.serve.cluster.settings import ControllerSettings
from llava.serve.http.addresses import AddressRules, parse_network
from llava.serve.http.flag_checks import add_body_flags, body_limits, check_at_least, check_body_flags
from llava.serve.http.keys import read_secrets
from llava.serve.http.listen_address import check_address
from llava.serve.http.server import make_server, run_program, run_server
from llava.serve.protocol import Limits


def build_parser() -> argparse.ArgumentParser:
    """The command line; LLaVA's flags keep their names."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.serve.controller", description="Know the workers, and answer for all of them at one address."
    )
    parser.add_argument("--host", default="localhost")
    parser.add_argument("--port", type=int, default=21001)
    parser.add_argument("--dispatch-method", choices=[method.value for method in DispatchMethod], default="shortest_queue")
    parser.add_argument("--heart-beat-expiration", type=float, default=CONTROLLER_HEART_BEAT_EXPIRATION, metavar="SECONDS")
    parser.add_argument("--worker-token", action="append", default=[], help="workers have to show it; repeatable")
    parser.add_argument("--worker-token-file", help="one token per line")
    parser.add_argument("--allow-worker", action="append", default=[], metavar="ADDRESS|NETWORK", help="addresses workers may have")
    parser.add_argument("--api-key", action="append", default=[], help="clients have to show one; repeatable")
    parser.add_argument("--api-key-file", help="one key per line")
    parser.add_argument("--worker-api-key", help="shown to workers that were started with --api-key")
    parser.add_argument("--worker-api-key-file", help="holds that key in its first line")
    parser.add_argument("--worker-timeout", type=float, default=300.0, metavar="SECONDS", help="how long a worker may be silent")
    parser.add_argument("--max-in-flight", type=int, default=256, help="requests passed on at once")
    parser.add_argument("--max-body-bytes", type=int, default=Limits.max_body_bytes)
    add_body_flags(parser)
    parser.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    return parser


def settings_from(args: argparse.Namespace) -> ControllerSettings:
    """The settings that a command line asks for.

    Raises:
        ValueError: a flag cannot work.
    """
    check_at_least(args, {"heart_beat_expiration": 0.001, "worker_timeout": 0.001, "max_in_flight": 1, "max_body_bytes": 1})
    check_body_flags(args)
    tokens = read_secrets(args.worker_token, args.worker_token_file)
    worker_keys = read_secrets([args.worker_api_key] if args.worker_api_key else [], args.worker_api_key_file)
    return ControllerSettings(
        rules=AddressRules(tuple(parse_network(text) for text in args.allow_worker), token_required=bool(tokens)),
        worker_tokens=tokens,
        api_keys=read_secrets(args.api_key, args.api_key_file),
        worker_key=worker_keys[0] if worker_keys else None,
        allowed_origins=tuple(args.allowed_origins),
        method=DispatchMethod(args.dispatch_method),
        expiry_seconds=args.heart_beat_expiration,
        worker_seconds=args.worker_timeout,
        max_in_flight=args.max_in_flight,
        limits=Limits(max_body_bytes=args.max_body_bytes, **body_limits(args)),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a controller until SIGTERM or SIGINT; 0, or 1 with one sentence on standard error."""
    args = build_parser().parse_args(argv)
    setup_logging(args.log_level.upper())
    try:
        settings = settings_from(args)
        check_address(args.host, args.port)
        app = create_controller_app(settings)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return run_server(make_server(app, args.host, args.port, log_level=args.log_level))


if __name__ == "__main__":
    sys.exit(run_program(main))
