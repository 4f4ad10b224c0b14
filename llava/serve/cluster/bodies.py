"""Bodies of requests to a controller, besides those of the APIs that it relays."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from llava.serve.api.body_models import LenientModel
from llava.serve.cluster.dispatch import WorkerStatus
from llava.serve.http.errors import FieldError

Name = Annotated[str, Field(min_length=1, max_length=512)]


class StatusFields(LenientModel):
    """A worker's status. speed: relative to other workers. queue_length: requests it has now."""

    model_names: Annotated[list[Name], Field(min_length=1, max_length=64)]
    speed: float = Field(1.0, ge=1e-6, le=1e6, allow_inf_nan=False)
    queue_length: int = Field(0, ge=0, le=1_000_000)


class RegisterRequest(LenientModel):
    """A worker announces itself. worker_name: its address, `http(s)://host:port`."""

    worker_name: Name
    check_heart_beat: bool = True
    worker_status: StatusFields | None = None
    token: Name | None = Field(None, description="The controller's worker token; may stand in the Authorization header instead.")


class HeartbeatRequest(LenientModel):
    """A worker is alive."""

    worker_name: Name
    queue_length: int = Field(0, ge=0, le=1_000_000)
    token: Name | None = None


class UnregisterRequest(LenientModel):
    """A worker takes no more requests."""

    worker_name: Name
    token: Name | None = None


class ModelRequest(LenientModel):
    """The part of a request that names its model."""

    model: Name


def read_status(fields: StatusFields) -> WorkerStatus:
    """A worker's status as the table keeps it.

    Raises:
        FieldError: a name that cannot be printed.
    """
    if not all(name.isprintable() for name in fields.model_names):
        raise FieldError("A name holds characters that cannot be printed.", "model_names")
    return WorkerStatus(tuple(dict.fromkeys(fields.model_names)), fields.speed, fields.queue_length)
