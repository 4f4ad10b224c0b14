"""OpenAI's text completions as data: finished prompts in, their continuations out; images as in LLaVA's worker protocol."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.serve.api.answer_fields import LOWEST_LOG_PROBABILITY
from llava.serve.api.compat_fields import COMPLETION_FIELDS, with_compat_fields
from llava.serve.api.openai_chat import ChatWriter
from llava.serve.api.parsed_request import ImageSource, ParsedRequest
from llava.serve.api.request_fields import AnswerFields, check_model, read_count, read_include_usage
from llava.serve.api.routing_fields import read_routing
from llava.serve.api.sampling_fields import check_at_most, longest_answer, read_sampling
from llava.serve.api.turns import check_images, check_prompt_length
from llava.serve.api.validation import validate
from llava.serve.http.errors import FieldError, field_path
from llava.serve.protocol import Limits, ModelCard, TokenScore, token_bytes

NEW_TOKENS = 16
"""Default maximum of an answer; OpenAI's."""
Images = Annotated[list[str], Field(max_length=1024, fail_fast=True)]


@with_compat_fields(COMPLETION_FIELDS)
class CompletionRequest(AnswerFields):
    """Prompts to continue as they are, without a conversation template."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1024, fail_fast=True)] = Field(
        description="One text or several, not token ids; with one `<image>` for each of `images`."
    )
    images: Images | None = Field(
        None, description="Images of a single prompt: base64, data URLs, or web addresses where the server fetches those."
    )
    max_tokens: int | None = Field(None, ge=1, description="16 by default.")
    logprobs: int | None = Field(None, ge=0, description="How many of the likeliest tokens to report besides the chosen one.")


def read_completion(value: Any, card: ModelCard, limits: Limits) -> ParsedRequest:
    """Parse the JSON values of a completion request.

    Raises:
        FieldError: what cannot be done, and in which field.
    """
    request = validate(CompletionRequest, value)
    check_model(request.model, card)
    prompts = (request.prompt,) if isinstance(request.prompt, str) else tuple(request.prompt)
    sources = read_images(prompts, request.images, card, limits)
    n = read_count(request.n, limits)
    if n * len(prompts) > limits.max_n:
        raise FieldError(f"There are {len(prompts)} prompts with {n} answers each, expected at most {limits.max_n} answers.", "prompt")
    check_at_most(request.logprobs, limits.max_logprobs, "logprobs")
    longest = longest_answer(request.max_tokens, limits, "max_tokens", NEW_TOKENS)
    return ParsedRequest(
        prompts=prompts,
        sources=sources,
        sampling=read_sampling(request, limits, longest, request.logprobs),
        routing=read_routing(request, card, sources),
        n=n,
        stream=bool(request.stream),
        include_usage=read_include_usage(request),
        user=request.user,
    )


def read_images(prompts: Sequence[str], images: Sequence[str] | None, card: ModelCard, limits: Limits) -> tuple[ImageSource, ...]:
    """The images of finished prompts, checked against their placeholders; LLaVA's protocol has the same rules.

    Raises:
        FieldError: what cannot be done, and in which field.
    """
    sources = tuple(ImageSource(text, field_path(("images", index)), plain_base64=True) for index, text in enumerate(images or ()))
    check_images(len(sources), card, limits, "images")
    check_prompt_length(sum(map(len, prompts)), limits, "prompt")
    if sources and len(prompts) > 1:
        raise FieldError(f"There are images, but {len(prompts)} prompts; send each prompt that has images by itself.", "images")
    placeholders = sum(prompt.count(DEFAULT_IMAGE_TOKEN) for prompt in prompts)
    if placeholders != len(sources):
        wrong = f"The prompt has {placeholders} {DEFAULT_IMAGE_TOKEN}, but there are {len(sources)} images; make them agree."
        raise FieldError(wrong, "images")
    return sources


class CompletionWriter(ChatWriter):
    """Writes the answer to one request, whose choices are plain texts."""

    id_prefix, object_type, chunk_type, text_field = "cmpl", "text_completion", "text_completion", "text"

    def __init__(self, request_id: str, model: str, parsed: ParsedRequest) -> None:
        super().__init__(request_id, model, parsed)
        self._offsets = [_TextOffsets() for _ in range(parsed.count)]

    def whole_text(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def first_text(self) -> dict[str, Any]:
        return {"text": ""}

    def next_text(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def last_text(self) -> dict[str, Any]:
        return {"text": ""}

    def scores(self, index: int, text: str, scores: Sequence[TokenScore]) -> dict[str, Any] | None:
        """OpenAI's older form: one list per kind of value, with where each token's text begins in the answer."""
        if not self.scored:
            return None
        return {
            "tokens": [_shown(score.text) for score in scores],
            "token_logprobs": [_finite(score.log_probability) for score in scores],
            "top_logprobs": [{_shown(text): _finite(value) for text, value in score.alternatives} for score in scores],
            "text_offset": self._offsets[index].of(text, scores),
        }


class _TextOffsets:
    """Where the tokens of one answer begin in its text, in characters.

    A partial character counts once its last byte arrives. White space of the first tokens that the text lacks does not count: the embedded
    engine's answers begin with their first word.
    """

    def __init__(self) -> None:
        self.offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_stripped: bool | None = None  # not known before the first text

    def of(self, text: str, scores: Sequence[TokenScore]) -> list[int]:
        """The offsets of the next tokens. text: the next piece of the answer."""
        if self._is_stripped is None and text:
            self._is_stripped = not text[0].isspace()
        offsets = []
        for score in scores:
            offsets.append(self.offset)
            letters = self._decoder.decode(score.data)
            self.offset += len(letters.lstrip() if self.offset == 0 and self._is_stripped else letters)
        return offsets


def _shown(text: str) -> str:
    return token_bytes(text).decode("utf-8", "replace")


def _finite(log_probability: float) -> float:
    return max(log_probability, LOWEST_LOG_PROBABILITY)
