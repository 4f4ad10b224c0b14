"""Fields of other servers that this one does not implement: accepted with values that change nothing, otherwise refused by name.

Clients, routers and SDKs send such fields with their default values. The tables hold those values, collected from OpenAI's API (the types
of its SDK), vLLM's `ChatCompletionRequest`, older versions included, and SGLang's. `null` is always accepted; where it is the only value,
the table has none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, Field, WithJsonSchema, create_model
from pydantic_core import PydanticCustomError

M = TypeVar("M", bound=BaseModel)
CompatFields = Mapping[str, Sequence[Any]]

_NULL_ONLY: Sequence[Any] = ()
_OFF, _ON, _EITHER = (False,), (True,), (True, False)

COMMON_FIELDS: CompatFields = {
    # OpenAI
    "service_tier": ("auto", "default"),
    "store": _OFF,
    "parallel_tool_calls": _EITHER,  # there are no tools to call
    "prompt_cache_retention": ("in_memory",),
    "prompt_cache_options": _NULL_ONLY,
    "moderation": _NULL_ONLY,
    # vLLM
    "use_beam_search": _OFF,
    "best_of": (1,),
    "length_penalty": (1,),
    "watermarking": _OFF,
    "include_stop_str_in_output": _OFF,
    "skip_special_tokens": _ON,
    "spaces_between_special_tokens": _EITHER,  # there are none in an answer
    "truncate_prompt_tokens": _NULL_ONLY,
    "truncation_side": ("left", "right"),
    "prompt_logprobs": _NULL_ONLY,
    "logprob_token_ids": _NULL_ONLY,
    "allowed_token_ids": _NULL_ONLY,
    "bad_words": ([],),
    "repetition_detection": _NULL_ONLY,
    "thinking_token_budget": (-1,),
    "mm_processor_kwargs": ({},),
    "media_io_kwargs": ({},),
    "logits_processors": ([],),
    "priority": (0,),
    "request_id": _NULL_ONLY,
    "return_tokens_as_token_ids": _OFF,
    "return_token_ids": _OFF,
    "return_token_offsets": _OFF,
    "return_prompt_text": _OFF,
    "return_mm_kwargs": _EITHER,  # of another endpoint
    "routed_experts_prompt_start": (0,),
    "cache_salt": _NULL_ONLY,
    "kv_transfer_params": ({},),
    "ec_transfer_params": ({},),
    "vllm_xargs": ({},),
    "stream_interval": (1,),
    "guided_decoding_backend": ("auto",),
    "guided_whitespace_pattern": _NULL_ONLY,
    "structural_tag": _NULL_ONLY,
    # SGLang
    "no_stop_trim": _OFF,
    "stop_regex": ([],),
    "return_hidden_states": _OFF,
    "return_routed_experts": _OFF,
    "routed_experts_start_len": (0,),
    "return_cached_tokens_details": _OFF,
    "return_prompt_token_ids": _OFF,
    "return_meta_info": _OFF,
    "lora_path": _NULL_ONLY,
    "session_params": ({},),
    "custom_params": ({},),
    "custom_labels": ({},),
    "custom_logit_processor": _NULL_ONLY,
    "images_config": ({},),
    "sampling_seed": _NULL_ONLY,
    "rid": _NULL_ONLY,
    "extra_key": _NULL_ONLY,
    "ngram_corpus_id": _NULL_ONLY,
    "bootstrap_host": _NULL_ONLY,
    "bootstrap_port": _NULL_ONLY,
    "bootstrap_room": _NULL_ONLY,
    "routed_dp_rank": _NULL_ONLY,
    "disagg_prefill_dp_rank": _NULL_ONLY,
    "data_parallel_rank": _NULL_ONLY,
}
"""Of every endpoint."""

CHAT_FIELDS: CompatFields = {
    **COMMON_FIELDS,
    # OpenAI
    "tools": ([],),
    "tool_choice": ("none", "auto"),  # without tools there is nothing to choose
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": _NULL_ONLY,
    "prediction": _NULL_ONLY,
    "web_search_options": _NULL_ONLY,
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    # vLLM
    "echo": _OFF,
    "add_generation_prompt": _ON,
    "continue_final_message": _OFF,
    "add_special_tokens": _OFF,
    "include_reasoning": _EITHER,  # there is none to include
    "documents": ([],),
    "chat_template": _NULL_ONLY,
    "chat_template_kwargs": ({},),
    # SGLang
    "separate_reasoning": _EITHER,
    "stream_reasoning": _EITHER,
    "reasoning": _NULL_ONLY,
    "task": _NULL_ONLY,
    "max_dynamic_patch": _NULL_ONLY,
    "min_dynamic_patch": _NULL_ONLY,
    "use_audio_in_video": _OFF,
    "input_ids": _NULL_ONLY,
}
"""Of a chat request."""

COMPLETION_FIELDS: CompatFields = {
    **COMMON_FIELDS,
    "suffix": ("",),
    "echo": _OFF,
    "prompt_embeds": _NULL_ONLY,
    "add_special_tokens": _ON,
}
"""Of a completion request."""

TOKENIZE_FIELDS: CompatFields = {
    "tools": ([],),
    "add_generation_prompt": _ON,
    "continue_final_message": _OFF,
    "chat_template": _NULL_ONLY,
    "chat_template_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "media_io_kwargs": ({},),
}
"""Of a request for tokens."""

RESPONSE_FIELDS: CompatFields = {
    **COMMON_FIELDS,
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "max_tool_calls": _NULL_ONLY,
    "previous_response_id": _NULL_ONLY,
    "conversation": _NULL_ONLY,
    "background": _OFF,
    "background_options": _NULL_ONLY,
    "context_management": ([],),
    "prompt": _NULL_ONLY,
    "reasoning": ({}, {"effort": None}, {"effort": "none"}, {"effort": None, "summary": None}),  # the last as an answer repeats it
    "truncation": ("disabled",),
    "image": _NULL_ONLY,
    "access_programs": _NULL_ONLY,
}
"""Of a request to the Responses API. It is stateless: there is no earlier response to continue."""

MESSAGE_FIELDS: CompatFields = {
    "refusal": _NULL_ONLY,
    "tool_calls": ([],),
    "tool_call_id": _NULL_ONLY,
    "tools": ([],),
    "annotations": ([],),
    "function_call": _NULL_ONLY,
    "audio": _NULL_ONLY,
    "reasoning": ("",),
    "reasoning_content": ("",),
    "reasoning_details": ([],),
    "prefix": _OFF,
}
"""What answers hold beside their text, as long as it is empty: clients send answers back as they came."""

TEXT_FIELDS: CompatFields = {"cache_control": _NULL_ONLY, "prompt_cache_breakpoint": _NULL_ONLY}
INPUT_IMAGE_FIELDS: CompatFields = {**TEXT_FIELDS, "file_id": _NULL_ONLY}
IMAGE_FIELDS: CompatFields = {**TEXT_FIELDS, "uuid": _NULL_ONLY, "modalities": ("image",)}
IMAGE_URL_FIELDS: CompatFields = {"max_dynamic_patch": _NULL_ONLY, "min_dynamic_patch": _NULL_ONLY, "content_hash": _NULL_ONLY}
STRUCTURED_OUTPUTS_FIELDS: CompatFields = {
    "disable_any_whitespace": _EITHER,  # JSON is written in one line in any case
    "disable_additional_properties": _OFF,
    "whitespace_pattern": _NULL_ONLY,
    "structural_tag": _NULL_ONLY,
}
STREAM_OPTIONS_FIELDS: CompatFields = {"include_obfuscation": _OFF, "continuous_usage_stats": _OFF}


def with_compat_fields(fields: CompatFields) -> Callable[[type[M]], type[M]]:
    """A decorator: the schema also accepts these fields, with these values only, and ignores them."""

    def extended(schema: type[M]) -> type[M]:
        declared: dict[str, Any] = {name: (_only(values), Field(None)) for name, values in fields.items()}
        return create_model(schema.__name__, __base__=schema, __doc__=schema.__doc__, __module__=schema.__module__, **declared)

    return extended


def _only(values: Sequence[Any]) -> Any:
    """The type of a field that holds one of the values, or `null`."""
    wanted = " or ".join(json.dumps(value) for value in values or (None,))

    def check(value: Any) -> None:
        if value is not None and not any(_equal(value, accepted) for accepted in values):
            raise PydanticCustomError("unsupported_value", "this is not supported here; leave it out, or send {wanted}", {"wanted": wanted})

    schema = {"enum": [None, *values], "description": "Not supported; these values change nothing."}
    return Annotated[Any, AfterValidator(check), WithJsonSchema(schema)]


def _equal(value: Any, other: Any) -> bool:
    """Equality as in JSON, where `true` is not 1."""
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)
