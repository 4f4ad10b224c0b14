"""`/tokenize` and `/detokenize` as data, in vLLM's format: the tokens of a prompt, and the text of tokens."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, Field

from llava.serve.api.body_models import StrictModel
from llava.serve.api.compat_fields import TOKENIZE_FIELDS, with_compat_fields
from llava.serve.api.openai_chat import ChatMessage, read_messages
from llava.serve.api.openai_completions import Images, read_images
from llava.serve.api.parsed_request import ParsedRequest
from llava.serve.api.request_fields import check_model
from llava.serve.api.routing_fields import RoutingFields, read_routing
from llava.serve.api.validation import validate
from llava.serve.http.errors import FieldError
from llava.serve.protocol import Limits, ModelCard, PromptTokens


@with_compat_fields(TOKENIZE_FIELDS)
class TokenizeRequest(RoutingFields):
    """A finished prompt, or a conversation for the model's template."""

    model: str | None = Field(None, max_length=512)
    prompt: str | None = Field(None, description="A finished prompt, with one `<image>` for each of `images`.")
    images: Images | None = Field(
        None, description="Images of the prompt: base64, data URLs, or web addresses where the server fetches those."
    )
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096, fail_fast=True)] | None = None
    add_special_tokens: bool | None = Field(None, description="Whether a prompt's tokens begin with the token that begins every text.")
    return_token_strs: bool | None = Field(None, description="Also return each token's text.")


class DetokenizeRequest(StrictModel):
    """Tokens to be decoded."""

    model: str | None = Field(None, max_length=512)
    tokens: list[int]


class VisualTokens(BaseModel):
    """How many tokens may replace an image's id; both numbers are equal where the router has no choice."""

    least: int
    most: int


class Tokens(BaseModel):
    """A prompt's tokens, one id of -200 for each image. `count` counts each image at its maximum."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None
    visual_tokens: list[VisualTokens] | None = None


def read_tokenize(value: Any, card: ModelCard, limits: Limits) -> tuple[ParsedRequest, TokenizeRequest]:
    """Parse the JSON values of a request for tokens.

    Returns:
        The parsed request whose prompt is to be tokenized, and the body itself.

    Raises:
        FieldError: what cannot be done, and in which field.
    """
    request = validate(TokenizeRequest, value)
    if request.model is not None:
        check_model(request.model, card)
    if (request.prompt is None) == (request.messages is None):
        raise FieldError("Give either a prompt or messages.", "prompt")
    if request.messages is None:
        prompts = (request.prompt or "",)
        sources = read_images(prompts, request.images, card, limits)
        return ParsedRequest(prompts=prompts, sources=sources, routing=read_routing(request, card, sources)), request
    if request.images:
        raise FieldError("images belong to a prompt; in messages, send each as a part.", "images")
    if request.add_special_tokens:
        raise FieldError("add_special_tokens is true, but the template has them already; leave it out.", "add_special_tokens")
    turns, sources = read_messages(request.messages, card, limits)
    return ParsedRequest(turns=turns, sources=sources, routing=read_routing(request, card, sources)), request


def token_fields(found: PromptTokens, card: ModelCard, with_texts: bool) -> dict[str, Any]:
    """The values of `Tokens`."""
    fields: dict[str, Any] = {
        "count": found.most_positions,
        "max_model_len": card.context_length,
        "tokens": list(found.ids),
        "token_strs": list(found.texts) if with_texts else None,
    }
    if found.visual_tokens:
        fields["visual_tokens"] = [{"least": least, "most": most} for least, most in found.visual_tokens]
    return fields


def read_detokenize(value: Any, card: ModelCard, limits: Limits) -> list[int]:
    """Parse the JSON values of a request for text: the ids.

    Raises:
        FieldError: what cannot be done, and in which field.
    """
    request = validate(DetokenizeRequest, value)
    if request.model is not None:
        check_model(request.model, card)
    if len(request.tokens) > limits.max_prompt_characters:
        raise FieldError(f"There are {len(request.tokens)} tokens, expected at most {limits.max_prompt_characters}.", "tokens")
    return request.tokens
