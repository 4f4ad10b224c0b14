"""Ports for servers that have to know their port before they start."""

from __future__ import annotations

import random
import socket

_DRAWS = random.SystemRandom()


def free_port() -> int:
    """A port of 127.0.0.1 that nobody holds.

    It lies below those that systems hand out by themselves (from 32768 or 49152 on), so that no other program is given it meanwhile.
    """
    while True:
        port = _DRAWS.randrange(12_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
