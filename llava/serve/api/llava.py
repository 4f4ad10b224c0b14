"""LLaVA's worker protocol as data: finished prompts and base64 images in, null-terminated JSON out.

Each part of a stream holds the whole text so far, prompt included, and an `error_code`, 0 unless something failed. Beyond LLaVA's fields
there are those about granularity; the first part reports what the images cost, the last one what the whole answer took.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from llava.serve.api.answer_fields import report_fields, usage_fields
from llava.serve.api.openai_completions import Images, read_images
from llava.serve.api.parsed_request import ParsedRequest
from llava.serve.api.paths import STATUS_PATH, WORKER_PATH
from llava.serve.api.request_fields import check_model
from llava.serve.api.routing_fields import Granularity, RoutingFields, read_routing
from llava.serve.api.sampling_fields import longest_answer, read_stop
from llava.serve.api.validation import validate
from llava.serve.http.errors import FieldError, error_body
from llava.serve.http.json_response import compact_json
from llava.serve.protocol import Finished, Limits, ModelCard, Sampling, ServeError, Started, TokenScore

GREEDY_BELOW = 0.001
"""LLaVA samples only above this temperature."""
NEW_TOKENS = 256
"""Default maximum of an answer."""


class WorkerRequest(RoutingFields):
    """A prompt to continue."""

    model: str | None = Field(None, max_length=512)
    prompt: str = Field(min_length=1, description="Written by a conversation template; one `<image>` per image.")
    images: Images | None = Field(None, description="Base64, or data URLs.")
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1, allow_inf_nan=False)
    max_new_tokens: int | None = Field(None, ge=1, description="256 by default.")
    stop: str | Annotated[list[str], Field(max_length=1024, fail_fast=True)] | None = None
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    echo: bool = Field(True, description="Whether the text of each part begins with the prompt.")
    vis_token_granularity: Granularity | None = Field(None, description="Another name of `granularity`.")


def read_worker_request(value: Any, card: ModelCard, limits: Limits) -> ParsedRequest:
    """Parse the JSON values of a worker request.

    Raises:
        FieldError: what cannot be done, and in which field.
    """
    request = validate(WorkerRequest, value)
    if request.model:
        check_model(request.model, card)
    sources = read_images((request.prompt,), request.images, card, limits)
    name = "granularity" if request.vis_token_granularity is None else "vis_token_granularity"
    longest = longest_answer(request.max_new_tokens, limits, "max_new_tokens", NEW_TOKENS)
    return ParsedRequest(
        prompts=(request.prompt,),
        sources=sources,
        sampling=Sampling(
            temperature=request.temperature if request.temperature > GREEDY_BELOW and request.top_p else 0.0,
            top_p=request.top_p or 1.0,
            max_new_tokens=longest,
            seed=request.seed,
            stop=read_stop(request.stop, limits),
        ),
        routing=read_routing(_one_granularity(request), card, sources, name),
        stream=True,
        field_names={"granularity": name},
        echo=request.echo,
    )


def _one_granularity(request: WorkerRequest) -> RoutingFields:
    """The routing fields, under whichever of its two names the granularity was sent."""
    old, new = request.vis_token_granularity, request.granularity
    if old is not None and new is not None and old != new:
        raise FieldError("vis_token_granularity and granularity differ, but mean the same; give one.", "granularity")
    return RoutingFields(
        granularity=new if old is None else old,
        max_visual_tokens=request.max_visual_tokens,
        granularity_bias=request.granularity_bias,
    )


class WorkerWriter:
    """Writes the parts of one stream.

    Args:
        parsed: has one prompt, and says whether the text of each part begins with it.
    """

    media_type = "application/octet-stream"

    def __init__(self, request_id: str, model: str, parsed: ParsedRequest) -> None:
        self.text = parsed.prompts[0] if parsed.echo else ""

    def on_started(self, index: int, event: Started) -> bytes:
        """The first part: no text yet, but what the images cost."""
        return null_ended({"text": self.text, "error_code": 0, "avg_llava": report_fields(event)})

    def on_text(self, index: int, text: str, scores: Sequence[TokenScore]) -> bytes:
        self.text += text
        return null_ended({"text": self.text, "error_code": 0})

    def on_finished(self, index: int, event: Finished) -> bytes:
        """The last part."""
        report = {"finish_reason": event.finish_reason, "usage": usage_fields([event]), "avg_llava": report_fields(event)}
        return null_ended({"text": self.text, "error_code": 0, **report})

    def on_all_finished(self, endings: Mapping[int, Finished]) -> bytes:
        return b""

    def on_error(self, error: ServeError, request_id: str) -> bytes:
        return null_ended(llava_error_body(error, request_id))


def null_ended(value: Any) -> bytes:
    """One part of a stream."""
    return compact_json(value) + b"\0"


def llava_error_body(error: ServeError, request_id: str) -> dict[str, Any]:
    """An error with LLaVA's `text` and `error_code` beside OpenAI's `error`."""
    return {"text": f"{error.detail} (request {request_id})", "error_code": error.kind.fault.code, **error_body(error, request_id)}


LLAVA_ERROR_BODIES = dict.fromkeys((WORKER_PATH, STATUS_PATH), llava_error_body)
"""By path, for `guard_app`."""
