"""vLLM's first step, from messages or a text to token ids, as our models were trained to read them."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any

from PIL import Image
from vllm.config import VllmConfig
from vllm.inputs import TokensPrompt
from vllm.renderers.base import BaseRenderer
from vllm.renderers.chat_utils import parse_chat_messages, parse_chat_messages_async
from vllm.renderers.params import ChatParams
from vllm.tokenizers.hf import get_cached_tokenizer
from vllm.utils.async_utils import make_async

from llava.checkpoint_files import HUB_OPTIONS
from llava.mm_utils import tokenizer_image_token
from llava.vllm_plugin.chat import chat_ids
from llava.vllm_plugin.deciding import RouterOptions
from llava.vllm_plugin.served import load_served_tokenizer
from llava.vllm_plugin.settings import MODE
from llava.vllm_plugin.wishes import check_wishes


class AvgLlavaTokenizer:
    """How vLLM loads the tokenizer: repaired as everywhere in this project, with `<image>`."""

    @classmethod
    def from_pretrained(cls, path: str, *args: Any, **options: Any) -> Any:
        known = (*HUB_OPTIONS, "truncation_side")
        return get_cached_tokenizer(load_served_tokenizer(str(path), **{name: options[name] for name in known if name in options}))


class AvgLlavaRenderer(BaseRenderer):
    """Chat by the checkpoint's conversation template, texts with `<image>` as LLaVA tokenises them; ids are taken as they are."""

    def __init__(self, config: VllmConfig, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        if self.mm_processor is not None:
            self.mm_processor.use_router(RouterOptions.from_values((config.additional_config or {}).get(MODE, {})))
        # Tokenizers of the Rust library are no place for two threads, and the server's other tasks have this one's twin.
        self._own_tokenizer, self._lock = copy.deepcopy(tokenizer), threading.Lock()
        self._chat_ids_async = make_async(self._chat_ids, executor=self._executor)

    @property
    def _served(self) -> Any:
        return self.get_mm_processor().info.served

    # ---- messages ------------------------------------------------------------------------------------------------------------

    def render_messages(self, messages: list[Any], params: ChatParams) -> tuple[list[Any], Any]:
        with _reading_files():
            parsed = parse_chat_messages(messages, self.model_config, **_parsing(params))
        return parsed[0], _prompt(self._chat_ids(parsed[0], params), *parsed[1:])

    async def render_messages_async(self, messages: list[Any], params: ChatParams) -> tuple[list[Any], Any]:
        with _reading_files():
            parsed = await parse_chat_messages_async(messages, self.model_config, **_parsing(params))
        return parsed[0], _prompt(await self._chat_ids_async(parsed[0], params), *parsed[1:])

    def _chat_ids(self, conversation: Sequence[Any], params: ChatParams) -> list[int]:
        settings = params.chat_template_kwargs
        if params.chat_template is not None:
            raise ValueError("There is a chat template, but this model's prompts are written by its conversation template; leave it out.")
        if given := [name for name in ("tools", "documents") if settings.get(name)]:
            raise ValueError(f"The request has {' and '.join(given)}, which this model was not trained with; leave them out.")
        goes_on = bool(settings.get("continue_final_message"))
        if not goes_on and not settings.get("add_generation_prompt", True):
            raise ValueError("add_generation_prompt is false, expected true, or continue_final_message to continue an answer.")
        served = self._served
        with self._lock:
            return chat_ids(
                conversation, served.config.conv_version, served.use_start_end, self._own_tokenizer, served.image_token_id, goes_on
            )

    # ---- texts and ids -------------------------------------------------------------------------------------------------------

    def _tokenize_prompt(self, prompt: Any, params: Any) -> TokensPrompt:
        """A text as a finished prompt, in which special tokens are meant as such."""
        with self._lock:
            ids = tokenizer_image_token(prompt["prompt"], self._own_tokenizer, self._served.image_token_id)
        return self._build_tokens_prompt(ids, prompt)

    def _process_tokens(self, prompt: TokensPrompt, *, skip_mm_cache: bool = False) -> Any:
        self._check(prompt)
        return super()._process_tokens(prompt, skip_mm_cache=skip_mm_cache)

    async def _process_tokens_async(self, prompt: TokensPrompt, *, skip_mm_cache: bool = False) -> Any:
        self._check(prompt)
        return await super()._process_tokens_async(prompt, skip_mm_cache=skip_mm_cache)

    def _check(self, prompt: TokensPrompt) -> None:
        """What the processor, which sees prompts with images only, would let through."""
        check_wishes(prompt.get("mm_processor_kwargs") or {})
        if not prompt.get("multi_modal_data") and self._served.image_token_id in prompt["prompt_token_ids"]:
            raise ValueError("The prompt has an image token but no image; send one, or leave the token out.")


@contextmanager
def _reading_files() -> Iterator[None]:
    """What torch and Pillow raise at files that are none, as vLLM expects bad input to be told."""
    try:
        yield
    except (EOFError, UnpicklingError, Image.DecompressionBombError) as error:
        raise ValueError("An image's file cannot be read, expected a whole image, or a tensor that torch.save wrote.") from error


def _parsing(params: ChatParams) -> dict[str, Any]:
    return {
        "content_format": "openai",
        "media_io_kwargs": params.media_io_kwargs,
        "mm_processor_kwargs": params.mm_processor_kwargs,
    }


def _prompt(ids: list[int], images: Any, uuids: Any) -> TokensPrompt:
    prompt = TokensPrompt(prompt_token_ids=ids)
    if images is not None:
        prompt["multi_modal_data"] = images
    if uuids is not None:
        prompt["multi_modal_uuids"] = uuids
    return prompt
