"""The limits of one request, of one client and of the server as a whole."""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_CONCURRENCY = 16
"""Requests that a worker answers at once."""


@dataclass(frozen=True)
class Limits:
    """What one request, one client and all together may use. Anything beyond is refused before it costs anything.

    max_body_bytes: of a request. max_images, max_messages, max_prompt_characters, max_new_tokens, max_stop, max_n: of one request.
    max_stop_characters: of one stop text. max_logprobs: alternatives reported per token. max_guide_characters: of a schema, a regular
    expression, a grammar, or choices.
    max_queue: requests that wait beside those that run; the next gets 503.
    body_seconds: that a body may stall; body_rate: bytes per second that it has to sustain, see `body_limits.ArrivalDeadline`.
    client_uploads: bodies that one client may be uploading at once; client_bodies: their total size, in bodies of the maximum size.
    send_seconds: that a client may take to read one part of a stream before it counts as gone.
    allow_remote_images: fetch images at http(s) addresses; off by default. allowed_hosts: only from these, when given.
    """

    max_body_bytes: int = 64_000_000
    max_images: int = 8
    max_messages: int = 256
    max_prompt_characters: int = 200_000
    max_new_tokens: int = 4096
    max_stop: int = 8
    max_stop_characters: int = 256
    max_n: int = 8
    max_logprobs: int = 20
    max_guide_characters: int = 32_768
    max_queue: int = 64
    body_seconds: float = 20.0
    body_rate: float = 20_000.0
    client_uploads: int = 64
    client_bodies: int = 3
    send_seconds: float = 60.0
    allow_remote_images: bool = False
    allowed_hosts: tuple[str, ...] = ()
