"""`LlavaLayoutProcessor`: prompts and images in, the arguments of `model.generate` out, under transformers' processor interface.

How an image is cut and how a conversation is written are properties of the model, so they are read from its config.json. A folder
without one (a processor saved alone) has them in processor_config.json.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from PIL import Image
from transformers import AutoProcessor, BatchFeature, CLIPImageProcessorPil, PreTrainedTokenizerBase, ProcessorMixin

from llava.checkpoint_files import hub_options, read_object, stored_file
from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_PATCH_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    IMAGE_TOKEN_INDEX,
)
from llava.conversation import Span
from llava.messages import Message, fill_template, prompt_spans, text_of_parts
from llava.mm_utils import process_images, text_of_ids, tokenize_spans, tokenizer_image_token
from llava.model.config import LlavaConfig, LlavaMistralConfig, check_processor_fields
from llava.model.image_inputs import image_of_part, images_of_rows
from llava.model.language_model.llava_native import LlavaNativeConfig
from llava.model.loading import read_stored_config, read_tower_config, resolve_tower
from llava.model.text_options import TextOptions, read_options, stack_rows
from llava.model.vision_tower import make_image_processor
from llava.rules import shown
from llava.tokenizer import load_tokenizer

_SETTINGS = ("image_aspect_ratio", "image_grid_pinpoints", "conv_version", "mm_use_im_start_end", "mm_use_im_patch_token")
_CONFIG_CLASSES: dict[str, Any] = {each.model_type: each for each in (LlavaConfig, LlavaMistralConfig, LlavaNativeConfig)}
_AUTO_OPTIONS = ("_from_auto", "trust_remote_code")
_IMAGE_PARTS = ("image", "image_url")
_OTHER_TEMPLATES = ("chat_template", "tools", "documents", "return_assistant_tokens_mask", "load_audio_from_video")
"""Of transformers' `apply_chat_template`: taken where they ask for nothing."""


class LlavaLayoutProcessor(ProcessorMixin):
    """A tokenizer and an image processor that prepare inputs as the model was trained.

    Args:
        image_processor: that of the vision tower.
        tokenizer: as `llava.tokenizer.load_tokenizer` gives it.
        image_aspect_ratio, image_grid_pinpoints, conv_version, mm_use_im_start_end, mm_use_im_patch_token: see `MultimodalFields`.
    """

    def __init__(
        self,
        image_processor: CLIPImageProcessorPil,
        tokenizer: PreTrainedTokenizerBase,
        image_aspect_ratio: str = "anyres",
        image_grid_pinpoints: list[list[int]] | None = None,
        conv_version: str = "v1",
        mm_use_im_start_end: bool = False,
        mm_use_im_patch_token: bool = False,
    ) -> None:
        super().__init__(image_processor, tokenizer)
        self.image_aspect_ratio = image_aspect_ratio
        self.image_grid_pinpoints = image_grid_pinpoints
        self.conv_version = conv_version
        self.mm_use_im_start_end = mm_use_im_start_end
        self.mm_use_im_patch_token = mm_use_im_patch_token
        tokenizer.add_tokens(self._extra_tokens(), special_tokens=True)

    def _extra_tokens(self) -> list[str]:
        """LLaVA's optional tokens, in the order in which loading a model gives them their ids."""
        patch = [DEFAULT_IMAGE_PATCH_TOKEN] if self.mm_use_im_patch_token else []
        return patch + ([DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN] if self.mm_use_im_start_end else [])

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> LlavaLayoutProcessor:  # type: ignore[override]
        """Load from a checkpoint, or from what `save_pretrained` wrote.

        Args:
            pretrained_model_name_or_path: a folder or hub id. Its config.json decides; without one, its processor_config.json.
            kwargs: transformers' hub options; any argument of the constructor, which then wins; the rest goes to the tokenizer.

        Raises:
            ValueError: the configuration is not one of this package's models, or the folder has neither file.
        """
        path = os.fspath(pretrained_model_name_or_path)
        options = {key: value for key, value in kwargs.items() if key not in _AUTO_OPTIONS}
        hub = hub_options(options)
        settings = {key: options.pop(key) for key in _SETTINGS if key in options}
        if stored_file(path, "config.json", hub) is not None:
            stored, processor = _from_model_config(path, hub)
        else:
            stored, processor = _from_processor_config(path, hub)
        return cls(processor, load_tokenizer(path, **options), **{**stored, **settings})

    def __call__(  # type: ignore[override]
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        return_tensors: str | None = None,
        padding: bool | str = False,
        padding_side: str | None = None,
        **options: Any,
    ) -> BatchFeature:
        """Prepare prompts and their images.

        Args:
            images: the images in reading order over the batch, or one list of them (or `None`) per prompt; see
                `llava.model.image_inputs.read_image` for what an image may be.
            text: a prompt, or B of them, with one `<image>` per image. A prompt is finished: special tokens that it spells are meant as
                such. Where it holds other people's words, use `apply_chat_template` with `tokenize`.
            return_tensors, padding, padding_side, options: see `TextOptions`. What transformers' processors take besides is taken where it
                asks for nothing (`videos=None`), also by group (`text_kwargs={...}`).

        Returns:
            input_ids and attention_mask (B, L), a placeholder where an image goes, and, with images, `images` as `process_images` gives
            them (a tensor where all have the same number of views, else a list) and `image_sizes`, (width, height) each.

        Raises:
            ValueError: no text, images unlike placeholders, rows that do not stack, or an unknown option.
        """
        if text is None:
            raise ValueError("The processor got no text; give a prompt with one <image> per image.")
        prompts = [text] if isinstance(text, str) else list(text)
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            kinds = sorted({type(prompt).__name__ for prompt in prompts})
            raise ValueError(f"The text holds {kinds}, expected one prompt or a list of them.")
        options |= {"return_tensors": return_tensors, "padding": padding, "padding_side": padding_side}
        rows = [tokenizer_image_token(prompt, self.tokenizer) for prompt in prompts]
        return self._prepare(rows, images, read_options(options))

    def _prepare(self, rows: list[list[int]], images: Any, options: TextOptions) -> BatchFeature:
        loaded = images_of_rows(images, [row.count(IMAGE_TOKEN_INDEX) for row in rows])
        data = stack_rows(rows, self.tokenizer, options)
        if loaded:
            data["images"] = process_images(loaded, self.image_processor, self)
            data["image_sizes"] = [image.size for image in loaded]
        return BatchFeature(data)

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Sequence[Any],
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        continue_final_message: bool = False,
        **options: Any,
    ) -> Any:
        """Write messages in the conversation template that the model was trained with (`conv_version`).

        Args:
            conversation: messages `{"role": ..., "content": text or parts}`, or a list of such conversations. Any conversation that
                `llava.messages.normalise_turns` takes; a system turn replaces the template's own text. A part is a text, `{"type": "text",
                "text": ...}`, `{"type": "image"}` or OpenAI's `{"type": "image_url"}`; parts are written one per line, ordered by
                `llava.messages.images_first`. With `tokenize`, an image part holds its image under one of `IMAGE_KEYS`.
            add_generation_prompt: open the next answer.
            tokenize: prepare the prompts and images as `__call__` does, which also takes `options`. What the messages say is then text,
                whatever it spells: special tokens come from the template alone.
            return_dict: with `tokenize`, all that `__call__` gives and not the ids alone.
            continue_final_message: end with the last message, which is the assistant's, as it stands.
            options: with `tokenize`; `images` in place of those in the parts.

        Returns:
            The prompt, a list of them for a list of conversations, or what `tokenize` and `return_dict` ask for.

        Raises:
            ValueError: nothing to answer, an unknown role or part, or options that have no effect.
        """
        options = {name: value for name, value in options.items() if name not in _OTHER_TEMPLATES or value}
        if refused := sorted(set(options) & set(_OTHER_TEMPLATES)):
            raise ValueError(f"{', '.join(refused)}: the template is the one that the model was trained with; leave them out.")
        if not tokenize and (wanted := sorted(name for name, value in options.items() if value is not None)):
            raise ValueError(f"{', '.join(wanted)} only count with tokenize=True; switch it on or leave them out.")
        is_batch = bool(conversation) and not isinstance(conversation[0], dict)
        conversations = conversation if is_batch else [conversation]
        ends = {"open": add_generation_prompt, "cut": continue_final_message}
        prompts = [self._write(messages, **ends) for messages in conversations]
        if not tokenize:
            texts = ["".join(span.text for span in spans) for spans in prompts]
            return texts if is_batch else texts[0]
        images = options.pop("images", None)
        if images is None:
            images = [images_of_messages(messages) for messages in conversations]
        rows = [tokenize_spans(spans, self.tokenizer) for spans in prompts]
        prepared = self._prepare(rows, images, read_options(options))
        return prepared if return_dict else prepared["input_ids"]

    def _write(self, messages: Sequence[dict[str, Any]], open: bool, cut: bool) -> list[Span]:
        turns = [Message(_role(message), _text(message)) for message in messages]
        num_images = sum(turn.text.count(DEFAULT_IMAGE_TOKEN) for turn in turns)
        how = num_images, self.conv_version, self.mm_use_im_start_end
        if cut:
            if open or not turns or turns[-1].role != "assistant":
                raise ValueError("continue_final_message needs a last message of the assistant's, and no add_generation_prompt.")
            return prompt_spans(turns[:-1], *how, answer=turns[-1].text)
        return prompt_spans(turns, *how) if open else fill_template(turns, *how).get_spans()

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **options: Any) -> Any:  # type: ignore[override]
        """The text of ids, or of each row of ids, with `<image>` where a placeholder stands; none if special tokens are left out."""
        ids = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
        ids = [ids] if isinstance(ids, int) else list(ids)
        if any(isinstance(each, (list, tuple)) or getattr(each, "ndim", 0) for each in ids):
            return [self.decode(row, skip_special_tokens, **options) for row in ids]
        image_text = "" if skip_special_tokens else DEFAULT_IMAGE_TOKEN
        return text_of_ids(list(map(int, ids)), self.tokenizer, image_text, skip_special_tokens=skip_special_tokens, **options)

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **options: Any) -> list[str]:  # type: ignore[override]
        """`decode` of each row."""
        return [self.decode(row, skip_special_tokens, **options) for row in sequences]

    def post_process_image_text_to_text(self, generated_outputs: Any, skip_special_tokens: bool = True, **options: Any) -> Any:  # type: ignore[override]
        """The texts that a model generated, or those of whole rows with their prompts; see `decode`."""
        return self.decode(generated_outputs, skip_special_tokens, **options)

    @property
    def model_input_names(self) -> list[str]:
        """What `__call__` gives."""
        return ["input_ids", "attention_mask", "images", "image_sizes"]


AvgLlavaProcessor = LlavaLayoutProcessor
"""What this module called it before the native layout had a processor; scripts import it by that name."""


def _from_model_config(path: str, hub: dict[str, Any]) -> tuple[dict[str, Any], CLIPImageProcessorPil]:
    """Settings and image processor of a checkpoint."""
    stored = read_stored_config(path, hub)
    kind = stored.get("model_type")
    if kind not in _CONFIG_CLASSES:
        raise ValueError(f"{path} is of model type {shown(kind)}, expected {' or '.join(_CONFIG_CLASSES)}.")
    config = _CONFIG_CLASSES[kind].from_dict(stored)
    if isinstance(config, LlavaNativeConfig):
        config.read_image_processor(path, hub)
    if config.vision_config is None:
        if config.mm_vision_tower is None:
            raise ValueError(f"{path} is a plain language model without a vision tower; use its tokenizer.")
        config.vision_config, config.image_processor = read_tower_config(
            resolve_tower(config.mm_vision_tower, path), hub_options(hub, elsewhere=True)
        )
        config.check_multimodal_fields()
    settings = {name: getattr(config, name) for name in _SETTINGS}
    return settings, make_image_processor(config.image_processor, config.view_side)


def _from_processor_config(path: str, hub: dict[str, Any]) -> tuple[dict[str, Any], CLIPImageProcessorPil]:
    """The same from a processor saved alone."""
    file = stored_file(path, "processor_config.json", hub)
    stored = {} if file is None else read_object(file)
    if file is None or "image_processor" not in stored:
        raise ValueError(f"{path} has neither config.json nor a processor_config.json with an image_processor; give a checkpoint.")
    side = check_processor_fields(stored, file)
    return {name: stored[name] for name in _SETTINGS if name in stored}, make_image_processor(stored["image_processor"], side)


def _role(message: dict[str, Any]) -> str:
    role = str(message.get("role"))
    return "system" if role == "developer" else role


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    """A message's content as parts, each of a known type."""
    content = message.get("content") or []
    given = [content] if isinstance(content, (str, dict)) else content
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in given]
    if unknown := [part.get("type") for part in parts if part.get("type") not in ("text", *_IMAGE_PARTS)]:
        raise ValueError(f"A message has parts of type {unknown}, expected text, image or image_url.")
    if any(part["type"] == "text" and not isinstance(part.get("text"), str) for part in parts):
        raise ValueError("A message has a part of type text without a text; put one under 'text'.")
    return parts


def _text(message: dict[str, Any]) -> str:
    return text_of_parts([DEFAULT_IMAGE_TOKEN if part["type"] in _IMAGE_PARTS else part["text"] for part in _parts(message)])


def images_of_messages(messages: Sequence[dict[str, Any]]) -> list[Image.Image]:
    """The images of a conversation's parts, in order."""
    return [image_of_part(part) for message in messages for part in _parts(message) if part["type"] in _IMAGE_PARTS]


for _config_class in (LlavaConfig, LlavaMistralConfig):  # over a native folder, AutoProcessor gives the native one
    # transformers compares class names only and has a LlavaConfig of its own; the entry itself is kept by class.
    AutoProcessor.register(_config_class, LlavaLayoutProcessor, exist_ok=True)
