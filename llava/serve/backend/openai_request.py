"""A generation request as the body of OpenAI's chat completions, with what SGLang, vLLM and this project's workers add to it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from llava import openai_chat
from llava.messages import Message, RoutingRequest, normalise_turns
from llava.openai_chat import data_url as data_url
from llava.openai_chat import processor_kwargs, routing_fields
from llava.serve.api.guide_fields import ANY_OBJECT
from llava.serve.api.read_prompt import read_prompt
from llava.serve.protocol import EngineImage, ErrorKind, GenerationRequest, Guide, GuideKind, Sampling, ServeError
from llava.serve.protocol.error_templates import BACKEND_LACKS_DETAIL, BACKEND_LACKS_FIELD, UNKNOWN_TEMPLATE

_OPENAI_FIELDS = {"seed": "seed", "stop": "stop", "presence_penalty": "presence_penalty", "frequency_penalty": "frequency_penalty"}
_EXTENSION_FIELDS = {
    "min_new_tokens": "min_tokens",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "stop_token_ids": "stop_token_ids",
    "ignore_eos": "ignore_eos",
}
"""Fields of `Sampling` that are sent where they differ from their default: by their names in OpenAI's API, and in vLLM's and SGLang's
extensions of it."""
_EXTENSION_OWNERS = frozenset(("vllm", "sglang", "avg-llava"))
"""Servers that know the extensions, by `owned_by` of their models; others may ignore fields that they do not know."""


def check_sampling(sampling: Sampling, owner: str) -> None:
    """Refuse options that the backend might ignore.

    Args:
        owner: of the model, as the backend reports it.

    Raises:
        ServeError: the backend may not know a field that is set.
    """
    unknown = [] if owner in _EXTENSION_OWNERS else [name for own, name in _EXTENSION_FIELDS.items() if _is_set(sampling, own)]
    if sampling.guide is not None and owner not in _EXTENSION_OWNERS and sampling.guide.kind is not GuideKind.JSON:
        unknown.append(sampling.guide.param)
    if unknown:
        raise ServeError(ErrorKind.INVALID_REQUEST, BACKEND_LACKS_FIELD.format(param=unknown[0]), unknown[0])


def guide_body(guide: Guide, owner: str) -> dict[str, Any]:
    """The fields that constrain the answer: OpenAI's for JSON, the backend's own for anything else."""
    if guide.kind is GuideKind.JSON:
        schema = json.loads(guide.text)
        if schema == ANY_OBJECT:
            return {"response_format": {"type": "json_object"}}
        return {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}}
    value = json.loads(guide.text) if guide.kind is GuideKind.CHOICE else guide.text
    if owner != "sglang":
        return {"structured_outputs": {guide.kind.value: value}}
    if guide.kind is GuideKind.GRAMMAR:
        return {"ebnf": value}
    return {"regex": value if guide.kind is GuideKind.REGEX else "|".join(re.escape(choice) for choice in value)}


def _is_set(sampling: Sampling, name: str) -> bool:
    return bool(getattr(sampling, name) != getattr(Sampling, name))


def chat_body(request: GenerationRequest, model: str, owner: str = "", levels: Sequence[int] = ()) -> dict[str, Any]:
    """A request as the body of a chat completion; images become PNG data URLs.

    Args:
        owner: of the model, as the backend reports it. levels: see `granularity_fields`.

    Raises:
        ServeError: the turns or their placeholders do not fit the images, or a finished prompt is of no known template.
    """
    routing, fields = granularity_fields(request.routing, levels)
    messages = chat_messages(request_turns(request), request.images, routing)
    return {"model": model, "messages": messages, **sampling_fields(request.sampling, owner), **fields}


def granularity_fields(routing: RoutingRequest, levels: Sequence[int]) -> tuple[RoutingRequest, dict[str, Any]]:
    """What a backend is told of the granularity.

    Args:
        levels: of a vLLM with our plug-in, tokens per view, coarse to fine; it takes `mm_processor_kwargs`, the same for all images.

    Returns:
        What is left to say of each image by itself, and fields of the body.

    Raises:
        ServeError: details of images that cannot be said that way.
    """
    if not levels:
        return routing, routing_fields(routing)
    details, granularity = set(routing.details), routing.granularity
    if any(details) and not isinstance(granularity, int):
        if len(details) > 1 or routing.max_visual_tokens is not None:
            raise ServeError(ErrorKind.INVALID_REQUEST, BACKEND_LACKS_DETAIL, "images")
        granularity = (min if "low" in details else max)(levels if granularity is None else granularity)
    decided = replace(routing, granularity=granularity, details=())
    kwargs = processor_kwargs(decided)
    return decided, {"mm_processor_kwargs": kwargs} if kwargs else {}


def sampling_fields(sampling: Sampling, owner: str) -> dict[str, Any]:
    """How an answer is sampled and streamed, as fields of a body.

    Args:
        owner: of the model, as the backend reports it.
    """
    fields: dict[str, Any] = {
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_new_tokens,
    }
    for own, name in (_OPENAI_FIELDS | _EXTENSION_FIELDS).items():
        if _is_set(sampling, own):
            value = getattr(sampling, own)
            fields[name] = list(value) if isinstance(value, tuple) else value
    if sampling.logit_bias:
        fields["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias}
    if sampling.guide is not None:
        fields |= guide_body(sampling.guide, owner)
    if sampling.logprobs is not None:
        fields["logprobs"], fields["top_logprobs"] = True, sampling.logprobs
    return fields


def request_turns(request: GenerationRequest) -> Sequence[Message]:
    """The turns to send: a request's own as every template can write them, or those of its finished prompt as they stand there."""
    if request.prompt is None:
        try:
            return normalise_turns(request.messages, len(request.images))
        except ValueError as error:  # the sentence is this package's own and holds counts and roles only
            raise ServeError(ErrorKind.INVALID_REQUEST, str(error)) from error
    turns = read_prompt(request.prompt)
    if turns is None:
        raise ServeError(ErrorKind.INVALID_REQUEST, UNKNOWN_TEMPLATE, "prompt")
    return turns


def chat_messages(turns: Sequence[Message], images: Sequence[EngineImage], routing: RoutingRequest) -> list[dict[str, Any]]:
    """Turns as OpenAI's messages, each image where its placeholder stands.

    Raises:
        ServeError: as many placeholders as images were expected.
    """
    try:
        return openai_chat.chat_messages(turns, [image.content for image in images], routing.details)
    except ValueError as error:  # the sentence holds counts only
        raise ServeError(ErrorKind.INVALID_REQUEST, str(error)) from error
