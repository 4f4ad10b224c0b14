"""`python -m llava.serve.controller`: knows the workers, and answers for all of them at one address.

    clients, page ──> controller ──> workers (`model_worker`, `sglang_worker`)
                          ^──────────── registration and heartbeats

    python -m llava.serve.controller --host 0.0.0.0 --port 30000
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from llava.constants import CONTROLLER_HEART_BEAT_EXPIRATION
from llava.flags import Parser, add_log_level, start_logging
from llava.interrupts import run_program
from llava.serve.cluster.dispatch import DispatchMethod
from llava.serve.cluster.settings import ControllerSettings
from llava.serve.http.addresses import AddressRules, parse_network
from llava.serve.http.flag_checks import add_body_flags, body_limits, check_at_least, check_body_flags
from llava.serve.http.keys import read_secrets
from llava.serve.http.listen_address import check_address
from llava.serve.protocol import Limits
from llava.serve.worker_flags import NOT_SERVING_YET, add_address_flags

logger = logging.getLogger("llava.serve.controller")  # also when run as a program

PROG = "python -m llava.serve.controller"
FIRST = (
    *("--host", "--port", "--dispatch-method", "--registration-token-file", "--allow-worker", "--api-key-file", "--worker-api-key-file"),
    *("--worker-timeout", "--max-in-flight", "--log-level"),
)


def build_parser(prog: str = PROG) -> Parser:
    """The command line's flags; LLaVA's keep their names."""
    parser = Parser(prog, "Know the workers, and answer for all of them at one address.", FIRST)
    add_address_flags(parser, host="localhost", port=21001)
    workers = parser.add_argument_group("workers")
    methods = [method.value for method in DispatchMethod]
    workers.add_argument("--dispatch-method", choices=methods, default="shortest_queue", help="how one of a model's workers is chosen")
    workers.add_argument("--heart-beat-expiration", type=float, default=CONTROLLER_HEART_BEAT_EXPIRATION, metavar="SECONDS",
                         help="a worker whose last heartbeat is older is forgotten")  # fmt: skip
    workers.add_argument("--worker-timeout", type=float, default=300.0, metavar="SECONDS", help="how long a worker may be silent")
    workers.add_argument("--max-in-flight", type=int, default=256, metavar="N", help="requests passed on at once; the next gets 503")
    workers.add_argument("--allow-worker", action="append", default=[], metavar="ADDRESS|NETWORK",
                         help="addresses that workers may have; may be given more than once")  # fmt: skip
    workers.add_argument("--registration-token", "--worker-token", dest="worker_token", action="append", default=[], metavar="TOKEN",
                         help="workers have to show it to register; may be given more than once")  # fmt: skip
    workers.add_argument("--registration-token-file", "--worker-token-file", dest="worker_token_file", metavar="FILE",
                         help="tokens, one per line")  # fmt: skip
    workers.add_argument("--worker-api-key", metavar="KEY", help="shown to workers that were started with --api-key")
    workers.add_argument("--worker-api-key-file", metavar="FILE", help="holds that key in its first line")
    clients = parser.add_argument_group("clients")
    clients.add_argument("--api-key", action="append", default=[], metavar="KEY", help="asked of every client; may be given more than once")
    clients.add_argument("--api-key-file", metavar="FILE", help="keys, one per line")
    add_body_flags(clients)
    clients.add_argument("--max-body-bytes", type=_megabytes, dest="max_body_mb", help=argparse.SUPPRESS)
    add_log_level(parser)
    return parser


def _megabytes(text: str) -> float:
    return int(text) / 1e6


def settings_from(args: argparse.Namespace) -> ControllerSettings:
    """The settings that a command line asks for.

    Raises:
        ValueError: a flag cannot work.
    """
    check_at_least(args, {"heart_beat_expiration": 0.001, "worker_timeout": 0.001, "max_in_flight": 1})
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
        limits=Limits(**body_limits(args)),
    )


def serve(args: argparse.Namespace) -> int:
    """Run a controller until SIGTERM or SIGINT.

    Raises:
        ValueError: a flag cannot work.
    """
    from llava.serve.cluster.controller_app import create_controller_app
    from llava.serve.http.server import make_server, run_server

    start_logging(args, logger)
    settings = settings_from(args)
    check_address(args.host, args.port)
    return run_server(make_server(create_controller_app(settings), args.host, args.port, log_level=args.log_level))


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Run the command; 0, or 1 with one sentence on standard error."""
    args = build_parser(prog).parse_args(argv)
    return run_program(lambda: serve(args), nothing_kept=NOT_SERVING_YET)


if __name__ == "__main__":
    sys.exit(main())
