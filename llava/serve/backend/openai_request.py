"""A generation request as the body of OpenAI's chat completions, with what SGLang, vLLM and this project's workers add to it."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import Any

from PIL import Image

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.messages import Detail, Message, RoutingRequest, normalise_turns
from llava.serve.api.guide_fields import ANY_OBJECT
from llava.serve.api.read_prompt import read_prompt
from llava.serve.protocol import EngineImage, ErrorKind, GenerationRequest, Guide, GuideKind, Sampling, ServeError
from llava.serve.protocol.error_templates import BACKEND_LACKS_FIELD, UNKNOWN_TEMPLATE

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


def chat_body(request: GenerationRequest, model: str, owner: str = "") -> dict[str, Any]:
    """A request as the body of a chat completion; images become PNG data URLs.

    Raises:
        ServeError: the turns or their placeholders do not fit the images, or a finished prompt is of no known template.
    """
    sampling = request.sampling
    body: dict[str, Any] = {
        "model": model,
        "messages": chat_messages(request_turns(request), request.images, request.routing),
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_new_tokens,
    }
    for own, name in (_OPENAI_FIELDS | _EXTENSION_FIELDS).items():
        if _is_set(sampling, own):
            value = getattr(sampling, own)
            body[name] = list(value) if isinstance(value, tuple) else value
    if sampling.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias}
    if sampling.guide is not None:
        body |= guide_body(sampling.guide, owner)
    if sampling.logprobs is not None:
        body["logprobs"], body["top_logprobs"] = True, sampling.logprobs
    return body | routing_fields(request.routing)


def routing_fields(routing: RoutingRequest) -> dict[str, Any]:
    """A routing request as fields of a body; the detail of each image is in the image's own part."""
    fields: dict[str, Any] = {}
    if routing.granularity is not None:
        fields["granularity"] = routing.granularity if isinstance(routing.granularity, int) else list(routing.granularity)
    if routing.max_visual_tokens is not None:
        fields["max_visual_tokens"] = routing.max_visual_tokens
    if routing.bias:
        fields["granularity_bias"] = routing.bias
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
    marked = sum(turn.text.count(DEFAULT_IMAGE_TOKEN) for turn in turns)
    if marked != len(images):
        raise ServeError(
            ErrorKind.INVALID_REQUEST, f"The text holds {marked} <image> placeholders, but {len(images)} images came; make them agree."
        )
    waiting = iter([_image_part(image, routing.detail_of(place)) for place, image in enumerate(images)])
    return [{"role": turn.role, "content": _content(turn.text, waiting)} for turn in turns]


def _content(turn_text: str, images: Iterator[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """A turn's text, cut at its placeholders; the line break that a template puts after an image is dropped."""
    head, *rest = turn_text.split(DEFAULT_IMAGE_TOKEN)
    if not rest:
        return head
    parts: list[dict[str, Any]] = [{"type": "text", "text": head}] if head else []
    for piece in rest:
        parts.append(next(images))
        if text := piece.removeprefix("\n"):
            parts.append({"type": "text", "text": text})
    return parts


def _image_part(image: EngineImage, detail: Detail | None) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": image.content, **({"detail": detail} if detail else {})}}


def data_url(image: Image.Image) -> str:
    """An image as it is sent to a backend."""
    buffer = BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
