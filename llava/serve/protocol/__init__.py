"""What the parts of the services exchange: requests, events, errors and limits.

Plain frozen values; nothing here computes, loads a model or opens a connection. It knows neither HTTP nor any engine: the API turns bodies
into a `GenerationRequest` and events into bodies, and an `Engine` turns the one into the others:

    body -> GenerationRequest -> engine.submit() -> Started, Piece, Piece ..., Finished -> body
"""

from llava.serve.protocol.engine import Engine, Generation
from llava.serve.protocol.errors import FAULTS, ErrorKind, Fault, ServeError
from llava.serve.protocol.limits import DEFAULT_CONCURRENCY, Limits
from llava.serve.protocol.values import (
    EngineImage,
    EngineStats,
    Event,
    Finished,
    GenerationRequest,
    Guide,
    GuideKind,
    ImageReport,
    ModelCard,
    Piece,
    PromptTokens,
    Sampling,
    Started,
    TokenScore,
    token_bytes,
)

__all__ = [
    "DEFAULT_CONCURRENCY",
    "FAULTS",
    "Engine",
    "EngineImage",
    "EngineStats",
    "ErrorKind",
    "Event",
    "Fault",
    "Finished",
    "Generation",
    "GenerationRequest",
    "Guide",
    "GuideKind",
    "ImageReport",
    "Limits",
    "ModelCard",
    "Piece",
    "PromptTokens",
    "Sampling",
    "ServeError",
    "Started",
    "TokenScore",
    "token_bytes",
]
