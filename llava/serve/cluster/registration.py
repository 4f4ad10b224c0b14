"""A worker's side of its registration: it registers, sends heartbeats, registers again with a restarted controller, and unregisters."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 5.0
"""Between two heartbeats, a third of LLaVA's: a restarted controller knows its workers again after that long."""
CALL_SECONDS = 5.0
"""For one call to the controller."""
RETRY_SECONDS = 1.0
"""After the first failed call; doubled with each further one, up to the heartbeat interval."""


@dataclass(frozen=True)
class Registration:
    """Where to register and as what.

    controller_url, worker_url: as in `http://localhost:10000`; the controller calls the worker at the second. token: the controller's
    worker token, or `None`. interval: seconds between two heartbeats.
    """

    controller_url: str
    worker_url: str
    token: str | None = None
    interval: float = HEARTBEAT_SECONDS

    async def run(self, status: Callable[[], dict[str, Any]], leaving: Awaitable[None]) -> None:
        """Register, send heartbeats, and register again whenever the controller does not know this worker; raises nothing.

        Args:
            status: `model_names`, `speed` and `queue_length` as of now.
            leaving: done when this worker takes no more requests; then it unregisters, and this ends.
        """
        known, failures = False, 0
        end = asyncio.ensure_future(leaving)
        # in the head, where a controller checks it before it reads the body
        headers = {} if self.token is None else {"Authorization": f"Bearer {self.token}"}
        async with httpx.AsyncClient(base_url=self.controller_url, timeout=CALL_SECONDS, trust_env=False, headers=headers) as client:
            while not end.done():
                try:
                    known = await self._heartbeat(client, status()) if known else await self._register(client, status())
                    failures, pause = 0, self.interval if known else 0.0
                except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
                    pause = min(RETRY_SECONDS * 2 ** min(failures, 10), self.interval)
                    failures += 1
                    level = logging.WARNING if failures == 1 else logging.DEBUG
                    logger.log(level, "the controller at %s cannot be used (%s); trying again", self.controller_url, _reason(error))
                await asyncio.wait({end}, timeout=pause)
            if known:
                await self._unregister(client)

    async def _unregister(self, client: httpx.AsyncClient) -> None:
        with suppress(httpx.HTTPError):  # a controller that is gone, or too old to know this call, notices missing heartbeats
            (await client.post("/unregister_worker", json=self._named({}))).raise_for_status()
            logger.info("unregistered from the controller %s", self.controller_url)

    async def _register(self, client: httpx.AsyncClient, status: dict[str, Any]) -> bool:
        body = self._named({"check_heart_beat": True, "worker_status": status})
        (await client.post("/register_worker", json=body)).raise_for_status()
        logger.info("registered at the controller %s as %s", self.controller_url, self.worker_url)
        return True

    def _named(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"worker_name": self.worker_url, **body}

    async def _heartbeat(self, client: httpx.AsyncClient, status: dict[str, Any]) -> bool:
        body = self._named({"queue_length": status["queue_length"]})
        response = (await client.post("/receive_heart_beat", json=body)).raise_for_status()
        if bool(response.json()["exist"]):
            return True
        logger.info("the controller %s does not know this worker any more; registering again", self.controller_url)
        return False


_HINTS = {
    401: ": it asks for a token, give its own with --registration-token or --registration-token-file",
    403: ": it does not allow this worker's address, start it with --registration-token or --allow-worker",
}
"""By status of a refused registration: what to do."""


def _reason(error: Exception) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        status = error.response.status_code
        return f"it answered with status {status}{_HINTS.get(status, '')}"
    return type(error).__name__
