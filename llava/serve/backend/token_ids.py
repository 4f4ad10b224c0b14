"""What a backend's `/tokenize` is asked and says, in vLLM's form, for `llava.serve.backend.openai_engine`."""

from __future__ import annotations

from typing import Any

from llava.serve.backend.openai_stream import chat_messages, is_count, request_turns, routing_fields
from llava.serve.http.client import BrokenResponse
from llava.serve.protocol import GenerationRequest, PromptTokens


def tokenize_body(request: GenerationRequest, special: bool, model: str) -> dict[str, Any]:
    """A request whose prompt's tokens are wanted, as a body.

    Args:
        special: whether a finished prompt's tokens begin with the one that begins every text.

    Raises:
        ServeError: the turns or their placeholders do not fit the images.
    """
    body: dict[str, Any] = {"model": model, "return_token_strs": True, **routing_fields(request.routing)}
    if request.prompt is None:
        return body | {"messages": chat_messages(request_turns(request), request.images, request.routing)}
    images = {"images": [image.content for image in request.images]} if request.images else {}
    return body | {"prompt": request.prompt, "add_special_tokens": special, **images}


def prompt_tokens(answer: dict[str, Any]) -> PromptTokens:
    """A backend's answer.

    Raises:
        BrokenResponse: it is none.
    """
    ids, texts = answer.get("tokens"), answer.get("token_strs")
    if not isinstance(ids, list) or not all(type(number) is int for number in ids):
        raise BrokenResponse("its answer holds no list of tokens")
    if not isinstance(texts, list) or len(texts) != len(ids) or not all(isinstance(text, str) for text in texts):
        texts = [""] * len(ids)  # a server that tells none
    told = answer.get("visual_tokens")
    visual = [_bounds(each) for each in told if isinstance(each, dict)] if isinstance(told, list) else []
    return PromptTokens(tuple(ids), tuple(texts), tuple(visual))


def _bounds(told: dict[str, Any]) -> tuple[int, int]:
    least, most = told.get("least"), told.get("most")
    if not is_count(least) or not is_count(most):
        raise BrokenResponse("its answer does not say what an image may take")
    return int(least or 0), int(most or 0)
