"""The table of endpoints whose bodies name a model: schema, parser, and writer of the answer; for workers and controllers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from llava.serve.api.llava import WorkerRequest, WorkerWriter, read_worker_request
from llava.serve.api.openai_chat import ChatCompletion, ChatRequest, ChatWriter, TextCompletion, read_chat
from llava.serve.api.openai_completions import CompletionRequest, CompletionWriter, read_completion
from llava.serve.api.openai_responses import ResponseRequest, ResponseWriter, read_response
from llava.serve.api.parsed_request import ParsedRequest, StreamWriter
from llava.serve.api.paths import CHAT_PATH, COMPLETIONS_PATH, DETOKENIZE_PATH, RESPONSES_PATH, TOKENIZE_PATH, WORKER_PATH
from llava.serve.api.tokenize import DetokenizeRequest, TokenizeRequest, read_detokenize, read_tokenize
from llava.serve.protocol import Limits, ModelCard


@dataclass(frozen=True)
class GeneratingEndpoint:
    """An endpoint that generates.

    body, answer: schemas. read: parses the body's values. writer: makes a writer from a request id, a model's name and a parsed request.
    """

    body: type[BaseModel]
    answer: type[BaseModel] | None
    read: Callable[[Any, ModelCard, Limits], ParsedRequest]
    writer: Callable[[str, str, ParsedRequest], StreamWriter]


GENERATING_ENDPOINTS: Mapping[str, GeneratingEndpoint] = {
    CHAT_PATH: GeneratingEndpoint(ChatRequest, ChatCompletion, read_chat, ChatWriter),
    COMPLETIONS_PATH: GeneratingEndpoint(CompletionRequest, TextCompletion, read_completion, CompletionWriter),
    RESPONSES_PATH: GeneratingEndpoint(ResponseRequest, None, read_response, ResponseWriter),
    WORKER_PATH: GeneratingEndpoint(WorkerRequest, None, read_worker_request, WorkerWriter),
}
BODY_SCHEMAS: Mapping[str, type[BaseModel]] = {
    **{path: endpoint.body for path, endpoint in GENERATING_ENDPOINTS.items()},
    TOKENIZE_PATH: TokenizeRequest,
    DETOKENIZE_PATH: DetokenizeRequest,
}
"""Path to schema. A request to any of these counts as in flight."""
BODY_READERS: Mapping[str, Callable[[Any, ModelCard, Limits], object]] = {
    **{path: endpoint.read for path, endpoint in GENERATING_ENDPOINTS.items()},
    TOKENIZE_PATH: read_tokenize,
    DETOKENIZE_PATH: read_detokenize,
}
"""Path to the parser of its body, which raises what is wrong with it."""
