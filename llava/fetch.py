"""Fetching a small file from a web address that someone else wrote down, without being sent where it should not go.

The host is resolved once, every address it resolves to is checked, and the connection goes to an address that was
checked: a name cannot answer differently the second time. Each redirect is a new address and passes the same checks. One
time limit covers the whole fetch and one size limit the whole body. Proxies of the environment are not used, because then another
machine would do the resolving.
"""

from __future__ import annotations

import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias
from urllib.parse import SplitResult, quote, urljoin, urlsplit

Address: TypeAlias = "ipaddress.IPv4Address | ipaddress.IPv6Address"
Resolver: TypeAlias = "Callable[[str, int], list[str]]"
"""(host, port) to the addresses it stands for."""
Connector: TypeAlias = "Callable[[str, int, float], socket.socket]"
"""(address, port, timeout in seconds) to a connected socket."""

_DEFAULT_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_CHUNK = 64 * 1024
_NUMERIC_HOST = re.compile(r"(0[xX][0-9a-fA-F]*|[0-9]+)(\.(0[xX][0-9a-fA-F]*|[0-9]+)){0,3}")
# Where IPv6 carries an IPv4 address: the prefix, and how many bits lie to the right of the address.
_EMBEDDINGS = (
    (ipaddress.IPv6Network("::/96"), 0),  # IPv4-compatible
    (ipaddress.IPv6Network("::ffff:0:0/96"), 0),  # IPv4-mapped
    (ipaddress.IPv6Network("::ffff:0:0:0/96"), 0),  # IPv4-translated
    (ipaddress.IPv6Network("64:ff9b::/96"), 0),  # NAT64
    (ipaddress.IPv6Network("2002::/16"), 80),  # 6to4
)
# Not public either, whatever the Python version's own tables say.
_CLOSED = tuple(
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8",
        "100.64.0.0/10",
        "192.0.0.0/24",
        "192.88.99.0/24",
        "198.18.0.0/15",
        "240.0.0.0/4",
        "64:ff9b:1::/48",
        "100::/64",
        "2001::/23",
        "2001:db8::/32",
        "3fff::/20",
        "5f00::/16",
        "fc00::/7",
        "fec0::/10",
    )
)


class FetchError(ValueError):
    """A web address that may not be fetched, or could not be."""


class AddressError(FetchError):
    """A text that is no web address of the form that is fetched, whatever it holds."""


class TooLargeError(FetchError):
    """A file that is larger than wanted."""


def literal_address(host: str) -> Address | None:
    """Return the address that `host` spells out, or None when it is a name.

    Besides the usual forms this knows the ones the C library accepts: `2130706433`, `0177.0.0.1`, `0x7f.1`, `127.1`.
    """
    text = host.removeprefix("[").removesuffix("]").removesuffix(".")
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        pass
    if not _NUMERIC_HOST.fullmatch(text):
        return None
    try:
        return ipaddress.IPv4Address(socket.inet_aton(text))
    except OSError:
        return None


def is_public_address(text: str) -> bool:
    """Return whether an address belongs to the public internet.

    Loopback, private, link-local, shared, multicast, reserved and documentation ranges do not, nor does an IPv6 address
    that carries an IPv4 address of such a range, nor anything that is no address at all.
    """
    address = literal_address(text)
    if address is None:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id is not None:
            return False
        for network, shift in _EMBEDDINGS:
            if address in network:
                return is_public_address(str(ipaddress.IPv4Address((int(address) >> shift) & 0xFFFFFFFF)))
    if any(address.version == network.version and address in network for network in _CLOSED):
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def split_url(url: str) -> SplitResult:
    """Check the form of a web address before anything is done with it.

    Raises:
        AddressError: another scheme than http(s), no host, credentials, a bad port, or characters that two parsers may
            read differently (backslash, space, control characters).
    """
    if re.search(r"[\x00-\x20\x7f\\]", url):
        raise AddressError(f"the address {url!r} holds a space, a backslash or a control character: percent-encode it")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise AddressError(f"the address {url!r} cannot be read ({error}): expected http(s)://host/path") from error
    if parts.scheme not in _DEFAULT_PORTS or not parts.hostname:
        raise AddressError(f"the address {url!r} is not of the form http(s)://host/path")
    if parts.username is not None or parts.password is not None:
        raise AddressError(f"the address of host {parts.hostname!r} holds a user name or password: leave it out")
    if port == 0:
        raise AddressError(f"the address {url!r} names port 0: use a port from 1 to 65535")
    return parts


def resolve_host(host: str, port: int) -> list[str]:
    """Return the addresses of `host` in the order the system gives them."""
    literal = literal_address(host)
    if literal is not None:
        return [str(literal)]
    try:
        found = socket.getaddrinfo(host.encode("idna").decode(), port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise FetchError(f"the host {host!r} cannot be resolved: check the address") from error
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def connect_to(address: str, port: int, timeout: float) -> socket.socket:
    """Open a connection to an address (not a name)."""
    return socket.create_connection((address, port), timeout=timeout)


def fetch(
    url: str,
    *,
    max_bytes: int,
    timeout: float = 10.0,
    max_redirects: int = 3,
    allow_private: bool = False,
    resolve: Resolver = resolve_host,
    connect: Connector = connect_to,
) -> bytes:
    """Return the body behind a web address.

    Args:
        url: http or https address.
        max_bytes: largest body accepted, checked against the announced length and again while reading.
        timeout: seconds for everything after name resolution of one address: connecting, headers, body, redirects.
        max_redirects: how many redirects are followed; from https none leads to http.
        allow_private: also connect to addresses that are not public (for tests and closed networks).
        resolve: how a host becomes addresses.
        connect: how an address becomes a socket.

    Raises:
        FetchError: the address is refused, or what is there cannot be had within the limits.
    """
    deadline = time.monotonic() + timeout
    for _ in range(max_redirects + 1):
        parts = split_url(url)
        addresses = _checked_addresses(parts, allow_private, resolve)
        sock = _open_socket(parts, addresses, deadline, connect)
        body, location = _exchange(parts, sock, max_bytes, deadline)
        if location is None:
            return body
        url = urljoin(url, location)
        if parts.scheme == "https" and not url.lower().startswith("https:"):
            raise FetchError(f"the host {parts.hostname!r} redirects away from https: use the final address")
    raise FetchError(f"the address was redirected more than {max_redirects} times: use the final address")


def _port_of(parts: SplitResult) -> int:
    return parts.port or _DEFAULT_PORTS[parts.scheme]


def _checked_addresses(parts: SplitResult, allow_private: bool, resolve: Resolver) -> list[str]:
    host = str(parts.hostname)
    addresses = resolve(host, _port_of(parts))
    if not addresses:
        raise FetchError(f"the host {host!r} has no address: check the spelling")
    if not allow_private and not all(is_public_address(address) for address in addresses):
        raise FetchError(f"the host {host!r} is not on the public internet: only public addresses are fetched")
    return addresses


def _open_socket(parts: SplitResult, addresses: list[str], deadline: float, connect: Connector) -> socket.socket:
    """Connect to the first address that answers; for https also speak TLS under the host's own name."""
    host = str(parts.hostname)
    problem: Exception | None = None
    for address in addresses:
        try:
            sock = connect(address, _port_of(parts), _time_left(deadline, host))
        except OSError as error:
            problem = error
            continue
        if parts.scheme == "http":
            return sock
        return _secure(sock, host, deadline)
    raise FetchError(f"no connection to the host {host!r}: check the address and that the host is up") from problem


def _secure(sock: socket.socket, host: str, deadline: float) -> ssl.SSLSocket:
    """Speak TLS on a connected socket, checking the certificate against the host's name."""
    try:
        wrapped = ssl.create_default_context().wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
        with _ended_at(deadline, wrapped, host):
            wrapped.do_handshake()
        return wrapped
    except (OSError, ValueError) as error:
        sock.close()
        if isinstance(error, FetchError):
            raise
        _time_left(deadline, host)
        raise FetchError(f"no secure connection to the host {host!r}: its certificate or TLS is wrong") from error


@contextmanager
def _ended_at(deadline: float, sock: socket.socket, host: str) -> Iterator[None]:
    """Break a talk off at the deadline: a socket's own timeout starts again with every byte that drips in."""
    watchdog = threading.Timer(_time_left(deadline, host), _shut, [sock])
    watchdog.daemon = True
    watchdog.start()
    try:
        yield
    finally:
        watchdog.cancel()


def _time_left(deadline: float, host: str) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise FetchError(f"the host {host!r} took too long: raise the time limit or fetch the file yourself")
    return left


def _exchange(parts: SplitResult, sock: socket.socket, max_bytes: int, deadline: float) -> tuple[bytes, str | None]:
    """Send one GET; return the body, or the address that a redirect names."""
    host = str(parts.hostname)
    connection = http.client.HTTPConnection(host, _port_of(parts))
    connection.sock = sock
    try:
        with _ended_at(deadline, sock, host):
            connection.request("GET", _target(parts), headers=_headers(parts))
            response = connection.getresponse()
            if response.status in _REDIRECTS:
                return b"", _location_of(response, host)
            if response.status != 200:
                raise FetchError(f"the host {host!r} answered with status {response.status}, expected 200")
            return _read_body(response, max_bytes, deadline, host), None
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        _time_left(deadline, host)
        raise FetchError(f"the talk with the host {host!r} broke off: try again or fetch the file yourself") from error
    finally:
        connection.close()


def _location_of(response: http.client.HTTPResponse, host: str) -> str:
    location = response.getheader("Location")
    if not location:
        raise FetchError(f"the host {host!r} redirects without saying where to: use the final address")
    return location


def _shut(sock: socket.socket) -> None:
    try:
        # The base class's method: the TLS one would also take the object apart under the thread that reads from it.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
    except OSError:
        pass  # already closed by the other side or by us


def _target(parts: SplitResult) -> str:
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    return path + ("?" + quote(parts.query, safe="/%:@!$&'()*+,;=~-._?") if parts.query else "")


def _headers(parts: SplitResult) -> dict[str, str]:
    host = str(parts.hostname)
    name = f"[{host}]" if ":" in host else host.encode("idna").decode()
    port = "" if parts.port is None else f":{parts.port}"
    return {"Host": name + port, "Accept": "image/*", "Accept-Encoding": "identity", "Connection": "close"}


def _read_body(response: http.client.HTTPResponse, max_bytes: int, deadline: float, host: str) -> bytes:
    too_large = f"the file of the host {host!r} is larger than {max_bytes:,} bytes: use a smaller one"
    if response.length is not None and response.length > max_bytes:
        raise TooLargeError(too_large)
    body = bytearray()
    while chunk := response.read(_CHUNK):
        body += chunk
        if len(body) > max_bytes:
            raise TooLargeError(too_large)
        _time_left(deadline, host)
    _time_left(deadline, host)  # a talk that was broken off looks like a body that has ended
    if response.length:
        raise FetchError(f"the file of the host {host!r} ended {response.length:,} bytes early: try again")
    return bytes(body)
