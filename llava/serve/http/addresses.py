"""Which worker addresses a controller may call: rules as pure functions, nothing here opens a connection.

Whoever can make a controller call an address of their choice can read what only the controller can reach, such as the cloud's metadata
service (SSRF). So an address is called only if an operator allowed it:

- Without a token, a process on the controller's own machine may name an address of that machine, and a machine on the operator's list
  may name an address on the list.
- With a token (`--registration-token`), every caller has to present it, and may then name any address, or any on the list where there is
  one.
- A loopback address is the caller's own machine, so only a caller on the controller's machine may name it, unless it is listed.
- Link-local addresses and those of the clouds' metadata services have to be listed one by one; a wide network does not open them.
- Addresses that stand for many machines, for none, or for another address are never called.

A worker's address has one spelling, `http(s)://host:port`. A name is resolved once, when the worker registers; connections go to the
addresses that were checked.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

from llava.fetch import literal_address

Address: TypeAlias = "ipaddress.IPv4Address | ipaddress.IPv6Address"
Network: TypeAlias = "ipaddress.IPv4Network | ipaddress.IPv6Network"
Resolver: TypeAlias = "Callable[[str, int], list[str]]"
"""From (host, port) to its addresses."""

MAX_URL_CHARACTERS = 300
MAX_ADDRESSES = 8
"""Maximum number of addresses of one name."""

_URL = re.compile(r"(https?)://(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253}):([1-9][0-9]{0,4})/?")
_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0[xX][0-9a-fA-F]*")


def _networks(*texts: str) -> tuple[Network, ...]:
    return tuple(ipaddress.ip_network(text) for text in texts)


_LISTED_ONE_BY_ONE = _networks(
    "169.254.0.0/16",  # link-local; AWS, Google, Azure and others keep their metadata at 169.254.169.254
    "fe80::/10",
    "fd00:ec2::/32",  # AWS's metadata over IPv6
    "100.100.100.200/32",  # Alibaba
    "168.63.129.16/32",  # Azure
    "192.0.0.192/32",  # Oracle
)
_NEVER = _networks(
    "0.0.0.0/8",  # "this machine" to the C library
    "224.0.0.0/4",
    "240.0.0.0/4",
    "ff00::/8",
    # IPv6 that carries an IPv4 address: two spellings of one address cannot both be checked
    "::ffff:0:0/96",
    "::ffff:0:0:0/96",
    "64:ff9b::/96",
    "64:ff9b:1::/48",
    "2002::/16",
    "2001::/32",
)
_UNSPECIFIED_AND_COMPATIBLE = ipaddress.IPv6Network("::/96")  # without ::1


@dataclass(frozen=True)
class WorkerUrl:
    """A worker's address as it was given, in its one spelling. host: a name, or an address without brackets."""

    scheme: str
    host: str
    port: int

    @property
    def authority(self) -> str:
        """`host:port` as it is written in a URL and in a Host header."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def text(self) -> str:
        return f"{self.scheme}://{self.authority}"


@dataclass(frozen=True)
class Endpoint:
    """Where a worker is called: its URL, and the checked addresses that connections go to, in order of preference."""

    url: WorkerUrl
    addresses: tuple[str, ...]

    def base(self, address: str) -> str:
        """`scheme://address:port` of one of the addresses."""
        return WorkerUrl(self.url.scheme, address, self.url.port).text


@dataclass(frozen=True)
class Caller:
    """Who registers. peer: the address at the other end of the connection, or `None` where there is none to trust (behind a proxy, another
    kind of socket). has_token: it presented the operator's token."""

    peer: str | None
    has_token: bool = False


@dataclass(frozen=True)
class AddressRules:
    """What the operator allows. listed: networks from `--allow-worker`. token_required: whether a token was set."""

    listed: tuple[Network, ...] = ()
    token_required: bool = False


def parse_network(text: str) -> Network:
    """Parse an entry of the operator's list: an address, or a network in CIDR form.

    Raises:
        ValueError: it is neither, or one that is never called.
    """
    try:
        network = ipaddress.ip_network(text)
    except ValueError as error:
        raise ValueError(f"--allow-worker is {text!r}, expected an address or a network such as 10.0.0.7 or 10.1.0.0/16.") from error
    if network.num_addresses == 1 and _is_never_called(network.network_address):
        raise ValueError(f"--allow-worker is {text!r}, which is no address of one machine; name the machine's own.")
    return network


def parse_worker_url(text: str) -> WorkerUrl:
    """Parse a worker's address.

    Raises:
        ValueError: anything but `http(s)://host:port` (no user names, paths, queries or fragments), or an IPv4 host written as one number,
            with octal or hexadecimal parts, or with fewer than four parts.
    """
    match = _URL.fullmatch(text) if len(text) <= MAX_URL_CHARACTERS else None
    if match is None or int(match[3]) > 65535:
        raise ValueError("The worker's address is not of the form http(s)://host:port; leave out everything else.")
    scheme, host, port = match[1], match[2], int(match[3])
    return WorkerUrl(scheme, _canonical_host(host), port)


def _canonical_host(host: str) -> str:
    if host.startswith("["):
        try:
            return str(ipaddress.IPv6Address(host[1:-1]))
        except ValueError as error:
            raise ValueError("The worker's address holds brackets, but no IPv6 address between them.") from error
    labels = host.lower().split(".")
    if _NUMBER.fullmatch(labels[-1]):
        try:
            return str(ipaddress.IPv4Address(host))
        except ValueError as error:
            raise ValueError("The worker's host is a number, but not four decimal ones without leading zeros; write it so.") from error
    if not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError("The worker's host is neither an address nor a name of letters, digits, hyphens and dots.")
    return host.lower()


def peer_may_register(rules: AddressRules, caller: Caller) -> bool:
    """Whether a caller may register workers at all; checked first, so that names are not resolved for strangers."""
    if rules.token_required:
        return caller.has_token
    peer = _peer_address(caller)
    return peer is not None and (peer.is_loopback or _is_listed(rules, peer))


def may_call(rules: AddressRules, caller: Caller, address_text: str) -> bool:
    """Whether an address that `caller` named may be called; the caller itself has passed `peer_may_register`."""
    address = literal_address(address_text)
    if address is None or str(address) != address_text or _is_never_called(address):
        return False
    if any(address in network for network in _LISTED_ONE_BY_ONE if address.version == network.version):
        return _is_listed_exactly(rules, address)
    if _is_listed(rules, address):
        return True
    if address.is_loopback:
        peer = _peer_address(caller)
        return peer is not None and peer.is_loopback
    return rules.token_required and caller.has_token and not rules.listed


def checked_endpoint(rules: AddressRules, caller: Caller, url: WorkerUrl, resolve: Resolver) -> Endpoint:
    """Resolve a worker's host, once, and check each of its addresses.

    Args:
        resolve: called with the host and port, unless the host is an address.

    Raises:
        ValueError: the host has no address or too many. PermissionError: the caller may not register, or one of the addresses may not be
            called.
    """
    if not peer_may_register(rules, caller):
        raise PermissionError("This caller may not register workers.")
    literal = literal_address(url.host)
    addresses = [str(literal)] if literal is not None else list(dict.fromkeys(resolve(url.host, url.port)))
    if not 1 <= len(addresses) <= MAX_ADDRESSES:
        raise ValueError(f"The worker's host has {len(addresses)} addresses, expected 1 to {MAX_ADDRESSES}.")
    if not all(may_call(rules, caller, address) for address in addresses):
        raise PermissionError("The worker's address is not one that the operator allowed.")
    return Endpoint(url, tuple(addresses))


def _peer_address(caller: Caller) -> Address | None:
    """The peer as an address; a dual-stack socket reports IPv4 peers as mapped IPv6."""
    try:
        address = ipaddress.ip_address(caller.peer or "")
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def _is_never_called(address: Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id is not None:
            return True
        if address in _UNSPECIFIED_AND_COMPATIBLE and not address.is_loopback:
            return True
    return any(address in network for network in _NEVER if address.version == network.version)


def _is_listed(rules: AddressRules, address: Address) -> bool:
    return _in_any(address, rules.listed)


def _is_listed_exactly(rules: AddressRules, address: Address) -> bool:
    return _in_any(address, (network for network in rules.listed if network.num_addresses == 1))


def _in_any(address: Address, networks: Iterable[Network]) -> bool:
    return any(address in network for network in networks if address.version == network.version)
