"""Fields that others' servers have and this one has not: taken where they ask for nothing, refused by name where they ask for something.

Clients, routers and SDKs send such fields along with the values that leave everything as it is. The tables hold those values, from walks
through OpenAI's own API (the types of its SDK), vLLM's `ChatCompletionRequest`, with the fields of its older versions, and SGLang's. `null`
is always among the values; where it is the only one, none stands here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, Field, WithJsonSchema, create_model
from pydantic_core import PydanticCustomError

M = TypeVar("M", bound=BaseModel)
Neutral = Mapping[str, Sequence[Any]]

_NOTHING: Sequence[Any] = ()
_OFF, _ON, _EITHER = (False,), (True,), (True, False)

OF_ANY: Neutral = {
    # OpenAI
    "service_tier": ("auto", "default"),
    "store": _OFF,
    "parallel_tool_calls": _EITHER,  # there are no tools to call
    "prompt_cache_retention": ("in_memory",),
    "prompt_cache_options": _NOTHING,
    "moderation": _NOTHING,
    # vLLM
    "use_beam_search": _OFF,
    "best_of": (1,),
    "length_penalty": (1,),
    "watermarking": _OFF,
    "include_stop_str_in_output": _OFF,
    "skip_special_tokens": _ON,
    "spaces_between_special_tokens": _EITHER,  # there are none in an answer
    "truncate_prompt_tokens": _NOTHING,
    "truncation_side": ("left", "right"),
    "prompt_logprobs": _NOTHING,
    "logprob_token_ids": _NOTHING,
    "allowed_token_ids": _NOTHING,
    "bad_words": ([],),
    "repetition_detection": _NOTHING,
    "thinking_token_budget": (-1,),
    "mm_processor_kwargs": ({},),
    "media_io_kwargs": ({},),
    "logits_processors": ([],),
    "priority": (0,),
    "request_id": _NOTHING,
    "return_tokens_as_token_ids": _OFF,
    "return_token_ids": _OFF,
    "return_token_offsets": _OFF,
    "return_prompt_text": _OFF,
    "return_mm_kwargs": _EITHER,  # of another endpoint
    "routed_experts_prompt_start": (0,),
    "cache_salt": _NOTHING,
    "kv_transfer_params": ({},),
    "ec_transfer_params": ({},),
    "vllm_xargs": ({},),
    "stream_interval": (1,),
    "guided_decoding_backend": ("auto",),
    "guided_whitespace_pattern": _NOTHING,
    "structural_tag": _NOTHING,
    # SGLang
    "no_stop_trim": _OFF,
    "stop_regex": ([],),
    "return_hidden_states": _OFF,
    "return_routed_experts": _OFF,
    "routed_experts_start_len": (0,),
    "return_cached_tokens_details": _OFF,
    "return_prompt_token_ids": _OFF,
    "return_meta_info": _OFF,
    "lora_path": _NOTHING,
    "session_params": ({},),
    "custom_params": ({},),
    "custom_labels": ({},),
    "custom_logit_processor": _NOTHING,
    "images_config": ({},),
    "sampling_seed": _NOTHING,
    "rid": _NOTHING,
    "extra_key": _NOTHING,
    "ngram_corpus_id": _NOTHING,
    "bootstrap_host": _NOTHING,
    "bootstrap_port": _NOTHING,
    "bootstrap_room": _NOTHING,
    "routed_dp_rank": _NOTHING,
    "disagg_prefill_dp_rank": _NOTHING,
    "data_parallel_rank": _NOTHING,
}
"""Whatever the endpoint."""

OF_CHAT: Neutral = {
    **OF_ANY,
    # OpenAI
    "tools": ([],),
    "tool_choice": ("none", "auto"),  # without tools there is nothing to choose
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": _NOTHING,
    "prediction": _NOTHING,
    "web_search_options": _NOTHING,
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    # vLLM
    "echo": _OFF,
    "add_generation_prompt": _ON,
    "continue_final_message": _OFF,
    "add_special_tokens": _OFF,
    "include_reasoning": _EITHER,  # there is none to include
    "documents": ([],),
    "chat_template": _NOTHING,
    "chat_template_kwargs": ({},),
    # SGLang
    "separate_reasoning": _EITHER,
    "stream_reasoning": _EITHER,
    "reasoning": _NOTHING,
    "task": _NOTHING,
    "max_dynamic_patch": _NOTHING,
    "min_dynamic_patch": _NOTHING,
    "use_audio_in_video": _OFF,
    "input_ids": _NOTHING,
}
"""Of a chat request."""

OF_COMPLETION: Neutral = {
    **OF_ANY,
    "suffix": ("",),
    "echo": _OFF,
    "prompt_embeds": _NOTHING,
    "add_special_tokens": _ON,
}
"""Of a completion request."""

OF_TOKENIZE: Neutral = {
    "tools": ([],),
    "add_generation_prompt": _ON,
    "continue_final_message": _OFF,
    "chat_template": _NOTHING,
    "chat_template_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "media_io_kwargs": ({},),
}
"""Of a request for tokens."""

OF_RESPONSE: Neutral = {
    **OF_ANY,
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "max_tool_calls": _NOTHING,
    "previous_response_id": _NOTHING,
    "conversation": _NOTHING,
    "background": _OFF,
    "background_options": _NOTHING,
    "context_management": ([],),
    "prompt": _NOTHING,
    "reasoning": ({}, {"effort": None}, {"effort": "none"}, {"effort": None, "summary": None}),  # the last as an answer repeats it
    "truncation": ("disabled",),
    "image": _NOTHING,
    "access_programs": _NOTHING,
}
"""Of a request to the Responses API. It keeps nothing, so that there is nothing before a request that it could go on from."""

OF_MESSAGE: Neutral = {
    "refusal": _NOTHING,
    "tool_calls": ([],),
    "tool_call_id": _NOTHING,
    "tools": ([],),
    "annotations": ([],),
    "function_call": _NOTHING,
    "audio": _NOTHING,
    "reasoning": ("",),
    "reasoning_content": ("",),
    "reasoning_details": ([],),
    "prefix": _OFF,
}
"""What answers hold beside their text, as long as it says nothing: clients send them back as they came."""

OF_TEXT: Neutral = {"cache_control": _NOTHING, "prompt_cache_breakpoint": _NOTHING}
OF_INPUT_IMAGE: Neutral = {**OF_TEXT, "file_id": _NOTHING}
OF_IMAGE: Neutral = {**OF_TEXT, "uuid": _NOTHING, "modalities": ("image",)}
OF_IMAGE_URL: Neutral = {"max_dynamic_patch": _NOTHING, "min_dynamic_patch": _NOTHING, "content_hash": _NOTHING}
OF_STRUCTURED_OUTPUTS: Neutral = {
    "disable_any_whitespace": _EITHER,  # JSON stands in one line in any case
    "disable_additional_properties": _OFF,
    "whitespace_pattern": _NOTHING,
    "structural_tag": _NOTHING,
}
OF_STREAM_OPTIONS: Neutral = {"include_obfuscation": _OFF, "continuous_usage_stats": _OFF}


def with_neutral(fields: Neutral) -> Callable[[type[M]], type[M]]:
    """A decorator: the schema also takes these fields, with these values alone, and nothing becomes of them."""

    def extended(schema: type[M]) -> type[M]:
        declared: dict[str, Any] = {name: (_only(values), Field(None)) for name, values in fields.items()}
        return create_model(schema.__name__, __base__=schema, __doc__=schema.__doc__, __module__=schema.__module__, **declared)

    return extended


def _only(values: Sequence[Any]) -> Any:
    """The type of what is one of the values, or `null`."""
    wanted = " or ".join(json.dumps(value) for value in values or (None,))

    def check(value: Any) -> None:
        if value is not None and not any(_same(value, neutral) for neutral in values):
            raise PydanticCustomError("neutral", "this is not supported here; leave it out, or send {wanted}", {"wanted": wanted})

    told = {"enum": [None, *values], "description": "Not supported; these values ask for nothing."}
    return Annotated[Any, AfterValidator(check), WithJsonSchema(told)]


def _same(value: Any, other: Any) -> bool:
    """As JSON has it, where `true` is not 1."""
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)
