"""A response whose parts are sent one by one, to a client that may go away or stop reading."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llava.serve.http.disconnect import cancel_on_disconnect
from llava.serve.http.watchdog import with_send_timeout


class StreamedResponse(Response):
    """A response whose parts are sent one by one, each at once.

    Starlette's `StreamingResponse` neither closes its iterator nor limits how long a client may take to read.

    Args:
        parts: closed at the end, however it ends. send_seconds: that the client may take to read one part.
    """

    def __init__(self, parts: AsyncGenerator[bytes, None], media_type: str, send_seconds: float) -> None:
        super().__init__(media_type=media_type, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.parts, self.send_seconds = parts, send_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await cancel_on_disconnect(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self.parts):
            with with_send_timeout(send, self.send_seconds) as sending:
                await sending({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                async for part in self.parts:
                    await sending({"type": "http.response.body", "body": part, "more_body": True})
                await sending({"type": "http.response.body", "body": b"", "more_body": False})
