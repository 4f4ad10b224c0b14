"""The controller's own short calls to workers: their status, their models, and whether they are alive."""

from __future__ import annotations

from typing import Any

from llava.serve.api.paths import STATUS_PATH
from llava.serve.cluster.dispatch import RegisteredWorker
from llava.serve.http.addresses import Endpoint
from llava.serve.http.client import BoundedClient, BrokenResponse, Timeouts, Unreachable

_PATIENCE = Timeouts(connect=2.0, headers=5.0, read=5.0, total=10.0)
_MAX_BYTES = 1_000_000


def worker_headers(worker_key: str | None, request_id: str) -> dict[str, str]:
    """The headers of every call to a worker.

    Args:
        worker_key: sent to workers that ask for an API key; what a client showed the controller goes no further.
    """
    key = {"Authorization": f"Bearer {worker_key}"} if worker_key else {}
    return {"Content-Type": "application/json", "X-Request-Id": request_id, **key}


class WorkerClient:
    """Asks workers about themselves.

    Args:
        outbound: carries the calls. worker_key: see `worker_headers`.
    """

    def __init__(self, outbound: BoundedClient, worker_key: str | None = None) -> None:
        self._outbound, self._headers = outbound, worker_headers(worker_key, "controller")

    async def status(self, endpoint: Endpoint) -> Any:
        """A worker's answer at `/worker_get_status`, unchecked.

        Raises:
            Unreachable, BrokenResponse: see `llava.serve.http.client`.
        """
        return await self._json("POST", endpoint, STATUS_PATH)

    async def models(self, worker: RegisteredWorker) -> Any:
        """A worker's answer at `/v1/models`, unchecked; raises as `status`."""
        return await self._json("GET", worker.endpoint, "/v1/models")

    async def is_alive(self, worker: RegisteredWorker, seconds: float) -> bool:
        """Whether a worker answers `/health` within a number of seconds, even with an error."""
        timeouts = Timeouts(connect=seconds, headers=seconds, read=seconds, total=seconds)
        try:
            async with self._outbound.call("GET", worker.endpoint, "/health", timeouts=timeouts, max_bytes=_MAX_BYTES):
                return True
        except (Unreachable, BrokenResponse):
            return False

    async def _json(self, method: str, endpoint: Endpoint, path: str) -> Any:
        content = b"{}" if method == "POST" else None
        async with self._outbound.call(
            method, endpoint, path, timeouts=_PATIENCE, max_bytes=_MAX_BYTES, content=content, headers=self._headers
        ) as reply:
            if reply.status != 200:
                raise BrokenResponse(f"{path} answered with status {reply.status}")
            return await reply.json()
