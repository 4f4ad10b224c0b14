"""Which web pages and host names a server answers: rules on the Origin and Host headers, against other sites and DNS rebinding."""

from __future__ import annotations

from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from llava.fetch import literal_address
from llava.serve.http.asgi import header_of

_UNKNOWN_HOST = "This server does not answer under the host name of this request; its operator adds names with --allow-host."


def is_own_page(scope: Scope, names: Collection[str]) -> bool:
    """Whether a request comes from no web page or from one of this server, by its Origin, which browsers send with every POST.

    A server's own pages are those under the request's own Host, under an address or localhost, and under one of `names`, in lower case.
    An opaque origin (`null`) is never the server's own.
    """
    origin = header_of(scope, b"origin")
    if origin is None:
        return True
    try:
        page, asked = urlsplit(origin).hostname or "", urlsplit(f"//{header_of(scope, b'host') or ''}").hostname or ""
    except ValueError:
        return False
    return page != "" and (page == asked or _is_fixed(page) or page.rstrip(".") in names)


def is_allowed_origin(origin: str | None, origins: Collection[str]) -> bool:
    """Whether a request comes from no web page, from one under an address or localhost, or from a site on the list.

    Opaque origins (`null`: a sandboxed frame, a file) and extensions are foreign sites.
    """
    if origin is None or origin in origins:
        return True
    try:
        parts = urlsplit(origin)
        return parts.scheme in ("http", "https") and _is_fixed(parts.hostname or "") and parts.port != 0  # `.port` also validates it
    except ValueError:
        return False


def _is_fixed(host: str) -> bool:
    """Whether this is an address or localhost, which nobody can point at another machine through DNS."""
    host = host.rstrip(".")
    return host == "localhost" or host.endswith(".localhost") or literal_address(host) is not None


class AllowedHosts:
    """Answers only requests whose Host header is an address, localhost or one of the names given.

    To a browser, a page whose name was pointed at this machine (DNS rebinding) has the same origin as this server; only that name tells
    them apart. starlette's `TrustedHostMiddleware` has no rule for addresses.

    Args:
        names: in lower case.
    """

    def __init__(self, app: ASGIApp, names: Collection[str]) -> None:
        self.app, self.names = app, frozenset(names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_known(header_of(scope, b"host") or ""):
            await self.app(scope, receive, send)
        else:
            await PlainTextResponse(_UNKNOWN_HOST, 403)(scope, receive, send)

    def _is_known(self, header: str) -> bool:
        try:
            host = urlsplit(f"//{header}").hostname or ""
        except ValueError:
            return False
        return _is_fixed(host) or host.rstrip(".") in self.names
