"""How a controller behaves, as its command line sets it."""

from __future__ import annotations

from dataclasses import dataclass, field

from llava.constants import CONTROLLER_HEART_BEAT_EXPIRATION
from llava.serve.cluster.dispatch import DispatchMethod
from llava.serve.http.addresses import AddressRules
from llava.serve.protocol import Limits


@dataclass(frozen=True)
class ControllerSettings:
    """The options of one controller.

    rules: which worker addresses may be called. worker_tokens: one of them has to come with a registration; none are asked for when empty.
    api_keys: one of them has to come with a client's request; none are asked for when empty. worker_key: sent to the workers.
    allowed_origins: web sites whose pages may call from a browser.
    method, expiry_seconds: see `WorkerTable`. worker_seconds: how long a worker may be silent while it answers.
    max_in_flight: requests relayed at once; the next gets 503. limits: of one request.
    """

    rules: AddressRules = field(default_factory=AddressRules)
    worker_tokens: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    worker_key: str | None = None
    allowed_origins: tuple[str, ...] = ()
    method: DispatchMethod = DispatchMethod.SHORTEST_QUEUE
    expiry_seconds: float = CONTROLLER_HEART_BEAT_EXPIRATION
    worker_seconds: float = 300.0
    max_in_flight: int = 256
    limits: Limits = field(default_factory=Limits)
