"""`AvgLlavaProcessor`: prompts and images in, the arguments of the native model out, as `LlavaNextProcessor` does it."""

import copy
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.processing_utils import MultiModalData, ProcessingKwargs

from llava.checkpoint_files import HUB_OPTIONS, read_object, stored_file
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import get_template
from llava.crops import get_anyres_image_grid_shape, view_size
from llava.model.chat_template import jinja_template, own_text_behind, text_begin
from llava.model.config import LlavaConfig, LlavaMistralConfig
from llava.model.granularity import granularity_levels
from llava.model.image_inputs import IMAGE_KEYS
from llava.model.merge import merged_layout
from llava.model.native.configuration_avg_llava import AvgLlavaConfig
from llava.model.native.image_processing_avg_llava import AvgLlavaImageProcessor, AvgLlavaImageProcessorKwargs
from llava.tokenizer import plain_tokenizer, prefix_like_transformers, special_texts

_LLAVA_LAYOUT = (LlavaConfig.model_type, LlavaMistralConfig.model_type)
_NO_TEXT = ("role", "type", "image_url", *IMAGE_KEYS)
"""Of a message and its parts, what is not said by anybody."""


class AvgLlavaImagesKwargs(AvgLlavaImageProcessorKwargs, total=False):
    """Of a call, for images; see `AvgLlavaProcessor`."""

    vis_token_granularity: int | None


class AvgLlavaProcessorKwargs(ProcessingKwargs, total=False):
    """Of a call."""

    _defaults = {}  # type: ignore[misc]  # which transformers reads up to 5.17
    images_kwargs: AvgLlavaImagesKwargs  # type: ignore[misc]


class AvgLlavaProcessor(ProcessorMixin):
    """A tokenizer and an image processor that prepare inputs as the model was trained; called as transformers' `LlavaNextProcessor`.

    A prompt has one `<image>` per image. It stays one token, and the model decides the granularity, unless a call says
    `vis_token_granularity`: then it becomes the image's tokens at that level, and the model runs as a LlavaNext. Truncation never cuts into
    an image: where one would lose tokens, the call is refused.

    `text` is a finished prompt: special tokens that it spells are meant as such. Where it holds other people's words, use
    `apply_chat_template` with `tokenize=True`.

    Args:
        image_processor: for the views of the vision tower. tokenizer: one that knows `image_token`.
        patch_size: of the vision tower, in pixels.
        vision_feature_select_strategy, num_additional_image_tokens: `LlavaNextProcessor`'s, for code that reads them: the model takes a
            tower's patches alone, however many tokens it has besides, which by LlavaNext's formula are `default` and 1.
        image_token: stands for an image. chat_template: see `llava.model.chat_template`.
        granularity_tokens, granularity_grids, patch_merge_type, unpad_rule: the config's `vis_token_granularity`, `vis_token_grids`,
            `mm_patch_merge_type` and `unpad_rule`, from which an image's number of tokens follows.

    Raises:
        ValueError: a tokenizer without the image token, or another strategy.
    """

    valid_processor_kwargs = AvgLlavaProcessorKwargs  # type: ignore[assignment]

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int | None = None,
        vision_feature_select_strategy: str = "default",
        chat_template: Any = None,
        image_token: str = DEFAULT_IMAGE_TOKEN,
        num_additional_image_tokens: int = 1,
        granularity_tokens: list[int] | None = None,
        granularity_grids: list[list[int]] | None = None,
        patch_merge_type: str = "spatial_unpad",
        unpad_rule: str = "picture",
    ) -> None:
        if vision_feature_select_strategy != "default":
            raise ValueError(
                f"vision_feature_select_strategy is {vision_feature_select_strategy!r}, expected 'default': visual tokens are patches."
            )
        if image_token not in tokenizer.get_vocab():
            raise ValueError(f"The tokenizer has no token {image_token!r}; add it, or use the tokenizer saved with the model.")
        self.patch_size = patch_size
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.num_additional_image_tokens = num_additional_image_tokens
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self.granularity_tokens, self.granularity_grids = granularity_tokens, granularity_grids
        self.patch_merge_type, self.unpad_rule = patch_merge_type, unpad_rule
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self._begin, self._behind_image = text_begin(tokenizer), own_text_behind(tokenizer, image_token)

    @classmethod
    def for_model(
        cls,
        config: AvgLlavaConfig,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: dict[str, Any] | None = None,
        image_aspect_ratio: str = "pad",
    ) -> "AvgLlavaProcessor":
        """The processor of a model.

        Args:
            tokenizer: its tokenizer, with `<image>`; it is set to pad on the left, as prompts in a batch need it, and to read a text that
                begins with a space as transformers' tokenizers do, for code that tokenises an answer alone.
            image_processor, image_aspect_ratio: see `AvgLlavaImageProcessor.for_model`.
        """
        tokenizer.padding_side = "left"
        prefix_like_transformers(tokenizer)
        return cls(
            AvgLlavaImageProcessor.for_model(config, image_processor, image_aspect_ratio),
            tokenizer,
            patch_size=config.vision.patch_size,
            chat_template=jinja_template(get_template(config.conv_version), text_begin(tokenizer)),
            granularity_tokens=config.vis_token_granularity,
            granularity_grids=config.vis_token_grids,
            patch_merge_type=config.mm_patch_merge_type,
            unpad_rule=config.unpad_rule,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:  # type: ignore[override]
        """Load what `save_pretrained` wrote; arguments as transformers' own.

        A folder in LLaVA's layout gives its `LlavaLayoutProcessor`, which had this class's name when older folders were saved.
        """
        if _is_llava_layout(os.fspath(pretrained_model_name_or_path), kwargs):
            from llava.model.processing import LlavaLayoutProcessor

            return LlavaLayoutProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    # ---- messages ------------------------------------------------------------------------------------------------------------

    def apply_chat_template(  # type: ignore[override]
        self, conversation: Any, chat_template: str | None = None, *, tokenize: bool = False, **kwargs: Any
    ) -> Any:
        """transformers' own. With `tokenize`, what the messages say is text, whatever it spells: special tokens, `<image>` among them, come
        from the template alone. The prompt that it writes without `tokenize` is finished, and `</s>` in it is a token, whoever said it.

        Raises:
            ValueError: as `__call__`, or a text that spells a special token which the tokenizer cannot read as text.
        """
        if not tokenize:
            return super().apply_chat_template(conversation, chat_template, tokenize=False, **kwargs)
        kwargs.pop("sanitize_control_tokens", None)  # which transformers does from 5.23 on, for other templates than LLaVA's
        reader = self
        if any(map(special_texts(self.tokenizer).search, _texts(conversation))):
            plain = plain_tokenizer(self.tokenizer)
            reader, conversation = copy.copy(self), _with_texts(conversation, plain.escape)
            reader.tokenizer = plain.tokenizer
        return super(AvgLlavaProcessor, reader).apply_chat_template(conversation, chat_template, tokenize=True, **kwargs)

    # ---- a call --------------------------------------------------------------------------------------------------------------

    def prepare_inputs_layout(self, images: Any = None, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        """transformers' own. Lists without an image in them count as no images; a bos that the chat template wrote is not written again."""
        images, text, *rest = super().prepare_inputs_layout(images, text, *args, **kwargs)
        if text is not None and {**kwargs, **(kwargs.get("text_kwargs") or {})}.get("add_special_tokens", True):
            text = [prompt.removeprefix(self._begin) if isinstance(prompt, str) else prompt for prompt in text]
        return images if _num_images(images) else None, text, *rest

    def validate_inputs(self, images: Any = None, text: Any = None, *args: Any, **kwargs: Any) -> None:
        """Whether every prompt has its images, where they are listed by prompt, and all prompts together have theirs where not.

        Raises:
            ValueError: images unlike image tokens, or no text and no image.
        """
        if text is not None:
            prompts = [text] if isinstance(text, str) else list(text)
            if not all(isinstance(prompt, str) for prompt in prompts):
                kinds = sorted({type(prompt).__name__ for prompt in prompts})
                raise ValueError(f"The text holds {kinds}, expected one prompt or a list of them.")
            expected = [prompt.count(self.image_token) for prompt in prompts]
            counts = [_num_images(images)]
            if isinstance(images, list) and isinstance(images[0], list) and len(images) == len(prompts):
                counts = [_num_images(row) for row in images]
            if counts != (expected if len(counts) == len(prompts) else [sum(expected)]):
                raise ValueError(
                    f"The prompts hold {expected} {self.image_token} tokens, but {counts} images were given; write one per image "
                    "(in messages, a part of type image)."
                )
        super().validate_inputs(images, text, *args, **kwargs)

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[Any, list[str]]:
        granularity = kwargs.pop("vis_token_granularity", None)
        processed = self.image_processor(images, **kwargs)
        return processed, [self.image_token * self._num_tokens(size, granularity) for size in processed["image_sizes"]]

    def get_text_with_replacements(
        self, text: list[str], images_replacements: Sequence[str] = (), *args: Any, **kwargs: Any
    ) -> tuple[list[str], list[dict[str, Any]]]:
        """transformers' own; text behind an image begins as a text of its own, as LLaVA tokenises it."""
        followed_by_text = [
            found.end() < len(prompt) and not prompt.startswith(self.image_token, found.end())
            for prompt in text
            for found in re.finditer(re.escape(self.image_token), prompt)
        ]
        replaced = [
            tokens + (self._behind_image if is_followed else "")
            for tokens, is_followed in zip(images_replacements, followed_by_text, strict=bool(images_replacements))
        ]
        return super().get_text_with_replacements(text, replaced, *args, **kwargs)

    # ---- how many tokens -----------------------------------------------------------------------------------------------------

    def _num_tokens(self, size: Sequence[int], granularity: int | None) -> int:
        """Image tokens of an image of (height, width) pixels: one, or its visual tokens at a granularity."""
        if granularity is None:
            return 1
        if self.patch_size is None:
            raise ValueError("The processor does not know the vision tower's patch_size, from which the number of tokens follows; set it.")
        side = view_size(self.image_processor)
        levels = granularity_levels((side // self.patch_size,) * 2, self.granularity_tokens, self.granularity_grids)
        level = next((level for level in levels if level.tokens == granularity), None)
        if level is None:
            raise ValueError(f"vis_token_granularity is {granularity}, expected one of {[level.tokens for level in levels]}.")
        height, width = map(int, size)
        tiles, num_views = None, 1
        if self.image_processor.image_aspect_ratio == "anyres":
            canvases = [(across, down) for down, across in self.image_processor.image_grid_pinpoints]
            across, down = get_anyres_image_grid_shape((width, height), canvases, side)
            tiles, num_views = (down, across), 1 + across * down
        return merged_layout(level, num_views, tiles, (width, height), self.patch_merge_type, self.unpad_rule).num_tokens

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[Sequence[int]] | None = None, vis_token_granularity: int | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Image tokens that a call writes for images of (height, width) pixels; transformers' interface for inference servers."""
        if image_sizes is None:
            return MultiModalData()
        tokens = [self._num_tokens(size, vis_token_granularity) for size in image_sizes]
        return MultiModalData(num_image_tokens=tokens, num_image_patches=[1] * len(tokens))


def _texts(said: Any) -> Iterator[str]:
    """What messages, or anything in them, say."""
    if isinstance(said, str):
        yield said
    for name, value in said.items() if isinstance(said, dict) else enumerate(said if isinstance(said, (list, tuple)) else ()):
        if name not in _NO_TEXT:
            yield from _texts(value)


def _with_texts(said: Any, change: Callable[[str], str]) -> Any:
    """Messages with each of `_texts` changed."""
    if isinstance(said, str):
        return change(said)
    if isinstance(said, (list, tuple)):
        return [_with_texts(value, change) for value in said]
    if isinstance(said, dict):
        return {name: value if name in _NO_TEXT else _with_texts(value, change) for name, value in said.items()}
    return said


def _num_images(images: Any) -> int:
    """How many images nested lists hold."""
    if images is None:
        return 0
    return sum(map(_num_images, images)) if isinstance(images, (list, tuple)) else 1


def _is_llava_layout(path: str, options: dict[str, Any]) -> bool:
    """Whether a folder's files are those of LLaVA's layout: by config.json, and for a processor saved alone by its own file."""
    hub = {key: options[key] for key in HUB_OPTIONS if key in options}
    config = stored_file(path, "config.json", hub)
    if config is not None:
        return read_object(config).get("model_type") in _LLAVA_LAYOUT
    processor = stored_file(path, "processor_config.json", hub)
    return processor is not None and "conv_version" in read_object(processor)
