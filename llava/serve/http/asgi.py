"""Reading ASGI scopes: a header, who the client is, and the connection that it came over."""

from __future__ import annotations

import ipaddress
from typing import TypeAlias

from starlette.types import Scope

Client: TypeAlias = "tuple[str, int | None]"
"""Who is held to one share: an address, and the number of the API key that was shown, or `None` where none is asked for."""

_NETWORK_BITS = 64
"""Of an IPv6 address: what a provider gives to one customer, who has as many addresses in it as they like."""


def header_of(scope: Scope, name: bytes) -> str | None:
    """A header's value; where it comes more than once, the last."""
    values = [value for key, value in scope["headers"] if key == name]
    return values[-1].decode("latin-1") if values else None


def client_of(scope: Scope) -> Client:
    """Who sent a request, as far as the connection and the key tell; behind one proxy or NAT, everybody with the same key is one client."""
    peer = scope.get("client")
    return network_of(str(peer[0]) if peer else ""), scope.get("state", {}).get("api_key")


def network_of(host: str) -> str:
    """An address, or the network that stands for one client."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv4Address):
        return host
    return str(address.ipv4_mapped or ipaddress.ip_network((int(address) >> _NETWORK_BITS << _NETWORK_BITS, _NETWORK_BITS)))


def abort_connection(scope: Scope) -> None:
    """Drop the connection without flushing what waits to be sent; where the server offers no handle, do nothing."""
    transport = scope.get("state", {}).get("connection")
    if transport is not None:
        transport.abort()
