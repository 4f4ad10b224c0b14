"""Everything that can go wrong with a request, and how each kind of error looks to a client."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True)
class Fault:
    """How one kind of error looks from outside.

    status: HTTP status. type: OpenAI's error type. text: the message where nothing more specific may be said. code: LLaVA's
    `error_code`, never 0. retry_after: seconds after which to try again, or `None`.
    """

    status: int
    type: str
    text: str
    code: int
    retry_after: int | None = None


class ErrorKind(Enum):
    """Everything that can go wrong with a request, by OpenAI's error code."""

    INVALID_REQUEST = "invalid_request"
    INVALID_IMAGE = "invalid_image"
    CONTEXT_LENGTH = "context_length_exceeded"
    UNAUTHORIZED = "invalid_api_key"
    FORBIDDEN = "forbidden"
    MODEL_NOT_FOUND = "model_not_found"
    NOT_FOUND = "not_found"
    TOO_LARGE = "request_too_large"
    ENCODED = "unsupported_encoding"
    TIMEOUT = "timeout"
    OVERLOADED = "overloaded"
    DRAINING = "shutting_down"
    OUT_OF_MEMORY = "out_of_memory"
    NOT_FINITE = "non_finite_logits"
    BACKEND_UNREACHABLE = "backend_unreachable"
    BACKEND_FAILED = "backend_failed"
    CANCELLED = "cancelled"
    INTERNAL = "internal_error"

    @property
    def fault(self) -> Fault:
        return FAULTS[self]


_CLIENT, _SERVER = "invalid_request_error", "server_error"

FAULTS: dict[ErrorKind, Fault] = {
    ErrorKind.INVALID_REQUEST: Fault(400, _CLIENT, "The request is malformed or asks for something that this server does not have.", 10),
    ErrorKind.INVALID_IMAGE: Fault(
        400,
        _CLIENT,
        "An image cannot be used: send a whole PNG, JPEG, GIF, WebP, BMP, TIFF, PPM or AVIF file as a data URL, at most 20 MB and 64 "
        "megapixels, with an aspect ratio of at most 200:1.",
        11,
    ),
    ErrorKind.CONTEXT_LENGTH: Fault(400, _CLIENT, "The prompt is longer than the model's context.", 12),
    ErrorKind.UNAUTHORIZED: Fault(401, "authentication_error", "The API key is missing or wrong.", 13),
    ErrorKind.FORBIDDEN: Fault(403, "permission_error", "This client may not do that here.", 14),
    ErrorKind.MODEL_NOT_FOUND: Fault(404, _CLIENT, "There is no model of that name here.", 15),
    ErrorKind.NOT_FOUND: Fault(404, _CLIENT, "There is nothing at this address.", 16),
    ErrorKind.TOO_LARGE: Fault(413, _CLIENT, "The request is too large.", 17),
    ErrorKind.ENCODED: Fault(415, _CLIENT, "The body is compressed (Content-Encoding); send it uncompressed.", 19),
    ErrorKind.TIMEOUT: Fault(408, _CLIENT, "The request took too long to arrive.", 18),
    ErrorKind.OVERLOADED: Fault(503, _SERVER, "The server is at capacity; try again.", 20, retry_after=1),
    ErrorKind.DRAINING: Fault(503, _SERVER, "The server is shutting down; try again.", 21, retry_after=5),
    ErrorKind.OUT_OF_MEMORY: Fault(503, _SERVER, "The answer did not fit into memory; try again or choose a coarser granularity.", 22, 1),
    ErrorKind.NOT_FINITE: Fault(500, _SERVER, "The model computed numbers that are not finite on this request.", 23),
    ErrorKind.BACKEND_UNREACHABLE: Fault(503, _SERVER, "No server that has this model can be reached.", 24, retry_after=1),
    ErrorKind.BACKEND_FAILED: Fault(502, _SERVER, "The server that has this model failed or sent an invalid response.", 25),
    ErrorKind.CANCELLED: Fault(499, _CLIENT, "The request was cancelled.", 26),
    ErrorKind.INTERNAL: Fault(500, _SERVER, "Something failed in the server; its log has the details under this request id.", 27),
}


class ServeError(Exception):
    """A typed failure of one request.

    Args:
        kind: which.
        detail: a sentence that replaces the kind's own. It goes to clients: numbers, names of fields and names of models only, never
            the text of another library's exception.
        param: the field that is to blame, as a path such as `messages[0].content`.
        least: the smallest value of that field that would do, where there is one.
    """

    def __init__(self, kind: ErrorKind, detail: str | None = None, param: str | None = None, least: int | None = None) -> None:
        self.kind, self.param, self.least = kind, param, least
        self.detail = detail or kind.fault.text
        super().__init__(self.detail)
