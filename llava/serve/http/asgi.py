"""Reading ASGI scopes: a header, the client, and its connection."""

from __future__ import annotations

import ipaddress
from typing import TypeAlias

from starlette.types import Scope

Client: TypeAlias = "tuple[str, int | None]"
"""Who counts as one client: an address, and the index of the API key presented, or `None` where no key is required."""

_NETWORK_BITS = 64
"""The IPv6 prefix that a provider assigns to one customer, who may use any address in it."""


def header_of(scope: Scope, name: bytes) -> str | None:
    """A header's value; the last one where it is repeated, unlike starlette's `Headers`, which gives the first."""
    values = [value for key, value in scope["headers"] if key == name]
    return values[-1].decode("latin-1") if values else None


def client_of(scope: Scope) -> Client:
    """Who sent a request, by connection and key: behind one proxy or NAT, everybody with the same key is one client."""
    peer = scope.get("client")
    return network_of(str(peer[0]) if peer else ""), scope.get("state", {}).get("api_key")


def network_of(host: str) -> str:
    """An IPv4 address, or the IPv6 network that counts as one client."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv4Address):
        return host
    return str(address.ipv4_mapped or ipaddress.ip_network((int(address) >> _NETWORK_BITS << _NETWORK_BITS, _NETWORK_BITS)))


def abort_connection(scope: Scope) -> None:
    """Abort the connection without flushing its send buffer; does nothing where the server provides no handle."""
    transport = scope.get("state", {}).get("connection")
    if transport is not None:
        transport.abort()
