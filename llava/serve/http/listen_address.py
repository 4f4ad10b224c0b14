"""The address that a server listens on: checked before a model is loaded, and shown as a URL."""

from __future__ import annotations

import errno
import socket
from typing import Any


def check_address(host: str, port: int) -> None:
    """Check that a server could listen here, before a model is loaded for it: bind as it would, and close again.

    uvicorn's `bind_socket` ends the process instead of raising, and binds one address family only.

    Args:
        port: 0 picks a free one.

    Raises:
        ValueError: it could not.
    """
    if not 0 <= port < 65536:
        raise ValueError(f"--port is {port}, expected 0 to 65535.")
    foreign = f"--host is {host!r}, which is no address of this machine; use 127.0.0.1, or 0.0.0.0 for every interface."
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ValueError(foreign) from error
    problems = [_bind_problem(family, address) for family, _, _, _, address in found]
    if errno.EADDRINUSE in problems:
        raise ValueError(f"port {port} of {host} is taken; end what listens there, or choose another with --port.")
    if errno.EACCES in problems:
        raise ValueError(f"port {port} of {host} may not be used by this user; choose one above 1023 with --port.")
    if None not in problems:
        raise ValueError(foreign)


def _bind_problem(family: int, address: Any) -> int | None:
    """The errno of a failed bind, or `None` where the address is free."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as uvicorn does: a server that has just ended is no obstacle
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind(address)
    except OSError as error:
        return error.errno
    return None


def shown_url(host: str, port: int) -> str:
    """The URL of a server on this machine, for people and programs here.

    Args:
        host: what it listens on: an address, a name, or a wildcard, for which the loopback address stands.
    """
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # :: accepts no IPv4 here
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
