"""`AvgLlavaProcessor`: prompts and pictures in, the arguments of `model.generate` out, under transformers' processor interface.

How a picture is cut and how a conversation is written are properties of the model, so they are read from its config.json. A folder
without one (a processor saved alone) has them in processor_config.json.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoProcessor, BatchFeature, CLIPImageProcessorPil, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import cached_file

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN, DEFAULT_IMAGE_TOKEN
from llava.conversation import get_template
from llava.images import load_image
from llava.messages import put_images_first, text_of_parts
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.config import LlavaConfig, LlavaMistralConfig, MultimodalFields
from llava.model.loading import read_tower_config, resolve_tower
from llava.tokenizer import load_tokenizer

Pictures = Image.Image | Sequence[Image.Image] | Sequence[Sequence[Image.Image]]

_SETTINGS = ("image_aspect_ratio", "image_grid_pinpoints", "conv_version", "mm_use_im_start_end", "mm_use_im_patch_token")
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_AUTO_OPTIONS = ("_from_auto", "trust_remote_code")


class AvgLlavaProcessor(ProcessorMixin):
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
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> AvgLlavaProcessor:  # type: ignore[override]
        """Load from a checkpoint, or from what `save_pretrained` wrote.

        Args:
            pretrained_model_name_or_path: a folder or hub id. Its config.json decides; without one, its processor_config.json.
            kwargs: transformers' hub options; any argument of the constructor, which then wins; the rest goes to the tokenizer.

        Raises:
            ValueError: the configuration is not one of this package's models, or the folder has neither file.
        """
        path = os.fspath(pretrained_model_name_or_path)
        options = {key: value for key, value in kwargs.items() if key not in _AUTO_OPTIONS}
        hub = {key: options[key] for key in _HUB_OPTIONS if key in options}
        settings = {key: options.pop(key) for key in _SETTINGS if key in options}
        if cached_file(path, "config.json", _raise_exceptions_for_missing_entries=False, **hub) is not None:
            stored, processor = _from_model_config(path, hub)
        else:
            stored, processor = _from_processor_config(path, hub)
        return cls(CLIPImageProcessorPil(**processor), load_tokenizer(path, **options), **{**stored, **settings})

    def __call__(  # type: ignore[override]
        self,
        images: Pictures | None = None,
        text: str | Sequence[str] | None = None,
        return_tensors: str | None = None,
        padding: bool | str = False,
        padding_side: str | None = None,
    ) -> BatchFeature:
        """Prepare prompts and their pictures.

        Args:
            images: the pictures in reading order over the batch, or one list of them per prompt.
            text: a prompt, or B of them, with one `<image>` per picture.
            return_tensors: "pt", or `None` for lists of ids.
            padding: `True` or "longest" pads the rows to one length; generation takes either side.
            padding_side: "left" or "right"; by default the tokenizer's.

        Returns:
            input_ids and attention_mask (B, L), a placeholder where a picture goes, and, with pictures, `images` as `process_images`
            gives them (a tensor where all have the same number of views, else a list) and `image_sizes`, (width, height) each.

        Raises:
            ValueError: no text, pictures unlike placeholders, rows that do not stack, or an unknown option.
        """
        if text is None:
            raise ValueError("The processor got no text; give a prompt with one <image> per picture.")
        if padding not in (True, False, "longest"):
            raise ValueError(f"padding is {padding!r}, expected True, False or 'longest'.")
        if return_tensors not in (None, "pt"):
            raise ValueError(f"return_tensors is {return_tensors!r}, expected None or 'pt'.")
        prompts = [text] if isinstance(text, str) else list(text)
        pictures = _pictures_of_rows(images, [prompt.count(DEFAULT_IMAGE_TOKEN) for prompt in prompts])
        rows = [tokenizer_image_token(prompt, self.tokenizer) for prompt in prompts]
        data = self._stack(rows, bool(padding), padding_side or self.tokenizer.padding_side, return_tensors)
        if pictures:
            data["images"] = process_images(pictures, self.image_processor, self)
            data["image_sizes"] = [picture.size for picture in pictures]
        return BatchFeature(data)

    def _stack(self, rows: list[list[int]], padding: bool, side: str, return_tensors: str | None) -> dict[str, Any]:
        """Ids and mask of the rows, padded if asked, as lists or tensors."""
        if side not in ("left", "right"):
            raise ValueError(f"padding_side is {side!r}, expected 'left' or 'right'.")
        longest = max(len(row) for row in rows)
        mask = [[1] * len(row) for row in rows]
        if padding:
            fill = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id or 0
            mask = [_pad(row, longest, 0, side) for row in mask]
            rows = [_pad(row, longest, fill, side) for row in rows]
        if return_tensors is None:
            return {"input_ids": rows, "attention_mask": mask}
        lengths = [len(row) for row in rows]
        if len(set(lengths)) > 1:
            raise ValueError(f"The prompts have {lengths} tokens, which do not stack; pass padding=True.")
        return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Sequence[Any],
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Write messages in the conversation template that the model was trained with (`conv_version`).

        Args:
            conversation: messages `{"role": "user" | "assistant", "content": text or parts}`, or a list of such conversations. A part is
                `{"type": "text", "text": ...}` or `{"type": "image"}`; parts are written one per line, ordered by
                `llava.messages.images_first`. With `tokenize`, an image part holds a picture under `image`, a file under `path` or a web
                address under `url`.
            add_generation_prompt: open the next answer.
            tokenize: prepare the prompts and pictures, see `__call__`, which also takes `kwargs`.
            return_dict: with `tokenize`, all that `__call__` gives and not the ids alone.

        Returns:
            The prompt, a list of them for a list of conversations, or what `tokenize` and `return_dict` ask for.

        Raises:
            ValueError: roles out of order, an unknown part, or options that have no effect.
        """
        if kwargs and not tokenize:
            raise ValueError(f"{', '.join(sorted(kwargs))} only count with tokenize=True; switch it on or leave them out.")
        is_batch = bool(conversation) and not isinstance(conversation[0], dict)
        conversations = conversation if is_batch else [conversation]
        prompts = [self._write(messages, add_generation_prompt) for messages in conversations]
        if not tokenize:
            return prompts if is_batch else prompts[0]
        pictures = [_pictures_of_messages(messages) for messages in conversations]
        prepared = self(images=pictures if any(pictures) else None, text=prompts, **kwargs)
        return prepared if return_dict else prepared["input_ids"]

    def _write(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool) -> str:
        roles = [message["role"] for message in messages]
        if not roles or roles != [("user", "assistant")[index % 2] for index in range(len(roles))]:
            raise ValueError(f"The roles are {roles}, expected user and assistant in alternation; the system text is the template's own.")
        template = get_template(self.conv_version)
        picture = DEFAULT_IMAGE_TOKEN
        if self.mm_use_im_start_end:
            picture = DEFAULT_IM_START_TOKEN + DEFAULT_IMAGE_TOKEN + DEFAULT_IM_END_TOKEN
        for index, message in enumerate(messages):
            parts = [part["text"] if part["type"] == "text" else DEFAULT_IMAGE_TOKEN for part in _parts(message)]
            text = put_images_first(text_of_parts(parts))  # a text may hold placeholders of its own
            template.append_message(template.roles[index % 2], text.replace(DEFAULT_IMAGE_TOKEN, picture))
        if add_generation_prompt:
            template.append_message(template.roles[1], None)
        return template.get_prompt()

    @property
    def model_input_names(self) -> list[str]:
        """What `__call__` gives."""
        return ["input_ids", "attention_mask", "images", "image_sizes"]


def _from_model_config(path: str, hub: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and image processor arguments of a checkpoint."""
    config = AutoConfig.from_pretrained(path, **hub)
    if not isinstance(config, MultimodalFields):
        raise ValueError(
            f"{path} is of model type {config.model_type!r}, expected {LlavaConfig.model_type} or {LlavaMistralConfig.model_type}."
        )
    processor, vision = config.image_processor, config.vision_config
    if vision is None:
        if config.mm_vision_tower is None:
            raise ValueError(f"{path} is a plain language model without a vision tower; use its tokenizer.")
        vision, processor = read_tower_config(resolve_tower(config.mm_vision_tower, path))
    side = vision["image_size"]
    settings = {name: getattr(config, name) for name in _SETTINGS}
    return settings, processor or {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}


def _from_processor_config(path: str, hub: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same from a processor saved alone."""
    stored, _ = AvgLlavaProcessor.get_processor_dict(path, **hub)
    if "image_processor" not in stored:
        raise ValueError(f"{path} has neither config.json nor a processor_config.json with an image_processor; give a checkpoint.")
    return {name: stored[name] for name in _SETTINGS if name in stored}, stored["image_processor"]


def _pictures_of_rows(images: Pictures | None, placeholders: list[int]) -> list[Image.Image]:
    """The pictures as one list in reading order, checked against the placeholders of each prompt."""
    given: Sequence[Any] = [] if images is None else [images] if isinstance(images, Image.Image) else images
    nested = any(not isinstance(item, Image.Image) for item in given)
    pictures = [picture for row in given for picture in row] if nested else list(given)
    counts = [len(row) for row in given] if nested else [len(pictures)]
    if counts != (placeholders if nested else [sum(placeholders)]):
        raise ValueError(
            f"The prompts hold {placeholders} <image> placeholders, but {counts} pictures were given; write one <image> per picture."
        )
    return pictures


def _pad(row: list[int], length: int, fill: int, side: str) -> list[int]:
    padding = [fill] * (length - len(row))
    return padding + row if side == "left" else row + padding


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    """A message's content as parts, each of a known type."""
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    unknown = [part["type"] for part in parts if part["type"] not in ("text", "image")]
    if unknown:
        raise ValueError(f"A message has parts of type {unknown}, expected text or image.")
    return parts


def _pictures_of_messages(messages: Sequence[dict[str, Any]]) -> list[Image.Image]:
    return [_picture(part) for message in messages for part in _parts(message) if part["type"] == "image"]


def _picture(part: dict[str, Any]) -> Image.Image:
    if isinstance(part.get("image"), Image.Image):
        return part["image"]
    if "path" in part:
        return load_image(part["path"])
    if "url" in part:
        return load_image(part["url"], allow_local=False, allow_remote=True)
    raise ValueError(f"An image part has {sorted(part)}; put a PIL image under 'image', a file under 'path' or a web address under 'url'.")


for _config_class in (LlavaConfig, LlavaMistralConfig):
    # transformers compares class names only and has a LlavaConfig of its own; the entry itself is kept by class.
    AutoProcessor.register(_config_class, AvgLlavaProcessor, exist_ok=True)
