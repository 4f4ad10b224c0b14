"""Requests to a backend's `/tokenize` and its answers, in vLLM's form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llava.serve.backend.openai_request import chat_messages, granularity_fields, request_turns
from llava.serve.backend.openai_stream import is_count
from llava.serve.http.client import BrokenResponse
from llava.serve.protocol import GenerationRequest, PromptTokens


def tokenize_body(request: GenerationRequest, special: bool, model: str, levels: Sequence[int] = ()) -> dict[str, Any]:
    """The body that asks for the tokens of a request's prompt.

    Args:
        special: whether a finished prompt's tokens begin with the BOS token. levels: see `granularity_fields`.

    Raises:
        ServeError: the turns or their placeholders do not fit the images.
    """
    routing, fields = granularity_fields(request.routing, levels)
    body: dict[str, Any] = {"model": model, "return_token_strs": True, **fields}
    if request.prompt is None:
        return body | {"messages": chat_messages(request_turns(request), request.images, routing)}
    images = {"images": [image.content for image in request.images]} if request.images else {}
    return body | {"prompt": request.prompt, "add_special_tokens": special, **images}


def prompt_tokens(answer: dict[str, Any]) -> PromptTokens:
    """A backend's answer as tokens.

    Raises:
        BrokenResponse: it is malformed.
    """
    ids, texts = answer.get("tokens"), answer.get("token_strs")
    if not isinstance(ids, list) or not all(type(number) is int for number in ids):
        raise BrokenResponse("its answer holds no list of tokens")
    if not isinstance(texts, list) or len(texts) != len(ids) or not all(isinstance(text, str) for text in texts):
        texts = [""] * len(ids)  # some servers report none
    reported = answer.get("visual_tokens")
    visual = [_bounds(each) for each in reported if isinstance(each, dict)] if isinstance(reported, list) else []
    return PromptTokens(tuple(ids), tuple(texts), tuple(visual))


def _bounds(image: dict[str, Any]) -> tuple[int, int]:
    least, most = image.get("least"), image.get("most")
    if not is_count(least) or not is_count(most):
        raise BrokenResponse("its answer does not bound an image's visual tokens")
    return int(least or 0), int(most or 0)
