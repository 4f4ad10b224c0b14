"""LLaVA's names for training data and models, over this package's rows, targets and embeddings; `llava.train.train` has them too.

What differs from LLaVA: rows are refused where LLaVA drops their labels, truncates them or reads them without their image; a row without an
image has no stand-in; labels are what the model would generate, whatever an answer holds (`targets.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from llava import conversation as conversation_lib
from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX
from llava.conversation import SeparatorStyle
from llava.crops import pixel_table, pixel_values
from llava.model.adapter import language_linears
from llava.model.vocabulary import embed_new_tokens
from llava.train.data import Collator, ConversationDataset
from llava.train.mixture import open_rows
from llava.train.rows import RowReader
from llava.train.shards import ImageFolder, open_images
from llava.train.targets import build_targets, place_images

Turns = list[dict[str, str]]


class LazySupervisedDataset(ConversationDataset):
    """Rows of a file as LLaVA's trainers read them, in the template that `llava.conversation.default_conversation` is at this moment.

    An item has `input_ids` and `labels` (L,), and with an image `image`: (3, S, S), or (C, 3, S, S) where images are cut into tiles; a list
    of them for several. Beside these it has what `llava.train.data.Collator` reads.

    Args:
        data_path: see `llava.train.mixture.open_rows`.
        tokenizer: as loaded by `llava.tokenizer.load_tokenizer`; rows with more text than its `model_max_length` are refused.
        data_args: any object with `image_processor` and `image_folder`; `image_aspect_ratio`, `image_grid_pinpoints`, `is_multimodal`,
            `mm_use_im_start_end` and our own `DataArguments` may be missing.
    """

    def __init__(self, data_path: str, tokenizer: PreTrainedTokenizerBase, data_args: Any) -> None:
        def given(name: str, default: Any = None) -> Any:
            return getattr(data_args, name, default)

        self.tokenizer = tokenizer
        self.data_args = data_args
        fields = ("image_aspect_ratio", "image_grid_pinpoints")
        settings = SimpleNamespace(**{name: given(name) for name in fields}, mm_use_im_start_end=given("mm_use_im_start_end", False))
        index_cache, folder = given("index_cache"), given("image_folder")
        reader = RowReader(
            tokenizer=tokenizer,
            template=conversation_lib.default_conversation,
            image_processor=given("image_processor"),
            model_config=settings,
            max_length=tokenizer.model_max_length,
            visual_tokens=_text_alone,
            images=open_images(folder, index_cache) if folder else ImageFolder(),
            is_multimodal=given("is_multimodal", True),
        )
        rows = open_rows(str(data_path), index_cache)
        super().__init__(rows, reader, given("on_bad_sample", "raise"), given("max_bad_share", 0.01))

    @property
    def list_data_dict(self) -> Sequence[dict[str, Any]]:
        """The rows."""
        return self.rows

    def read(self, index: int) -> dict[str, Any]:
        """A row, with `image` where it has one; views have the values that the vision tower reads."""
        item = super().read(index)
        table = pixel_table(self.reader.image_processor)
        views = [pixel_values(each, table) for each in item["images"]]
        has_tiles = self.reader.model_config.image_aspect_ratio == "anyres"
        image = [each if has_tiles else each[0] for each in views]
        return {**item, "images": views, **({"image": image[0] if len(image) == 1 else image} if image else {})}


def _text_alone(image_size: tuple[int, int]) -> int:
    """What an image costs is not known without the model."""
    return 0


@dataclass
class DataCollatorForSupervisedDataset:
    """Pads items on the right into a batch, which a model's forward and our trainer read.

    Attributes:
        tokenizer: its `pad_token_id` fills the ids; the mask comes from the rows' lengths.
    """

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, instances: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Batch items of `LazySupervisedDataset`, or a caller's own with `input_ids`, `labels` and perhaps `image`.

        Returns:
            What `llava.train.data.Collator` does; images are a list of (C, 3, S, S), rows without one add none.

        Raises:
            ValueError: tiles without the size of the image that they were cut from, under `image_sizes`.
        """
        return Collator(self.tokenizer.pad_token_id or 0)([_completed(item, number) for number, item in enumerate(instances)])


def _completed(item: dict[str, Any], number: int) -> dict[str, Any]:
    """An item of a caller's own data set with everything that the collator reads."""
    if "images" in item:
        return item
    given = item.get("image")
    images: list[Tensor] = [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]
    images = [views if views.ndim == 4 else views[None] for views in images]
    if "image_sizes" not in item and any(len(views) > 1 for views in images):
        raise ValueError(
            f"item {number} has an image of {max(map(len, images))} views and no image_sizes; give the (width, height) of each image, "
            "which decides what of its tiles is padding."
        )
    sizes = [(views.shape[-1], views.shape[-2]) for views in images]
    keys = [f"{number}.{place}" for place in range(len(images))]
    return {"images": images, "image_sizes": sizes, "image_keys": keys, "row": number, "id": str(number), **item}


def make_supervised_data_module(tokenizer: PreTrainedTokenizerBase, data_args: Any) -> dict[str, Any]:
    """What LLaVA's trainer takes: `train_dataset` of `data_args.data_path`, no `eval_dataset`, and `data_collator`."""
    dataset = LazySupervisedDataset(data_args.data_path, tokenizer, data_args)
    return {"train_dataset": dataset, "eval_dataset": None, "data_collator": DataCollatorForSupervisedDataset(tokenizer)}


# ---- one conversation


def preprocess_multimodal(sources: Sequence[Turns], data_args: Any) -> list[Turns]:
    """Put each conversation's placeholders where training expects them, see `llava.train.targets.place_images`.

    Args:
        sources: conversations, lists of `{"from", "value"}`; they are left as they are.
        data_args: any object with `is_multimodal`; `mm_use_im_start_end` may be missing.
    """
    if not data_args.is_multimodal:
        return list(sources)
    version, surround = conversation_lib.default_conversation.version, getattr(data_args, "mm_use_im_start_end", False)
    return [place_images(turns, sum(turn["value"].count(DEFAULT_IMAGE_TOKEN) for turn in turns), version, surround) for turns in sources]


def preprocess(sources: Sequence[Turns], tokenizer: PreTrainedTokenizerBase, has_image: bool = False) -> dict[str, Any]:
    """Ids and labels of conversations in the template `llava.conversation.default_conversation`.

    Args:
        sources: conversations, lists of `{"from", "value"}`, after `preprocess_multimodal`.
        tokenizer: as loaded by `llava.tokenizer.load_tokenizer`.
        has_image: whether `<image>` may stand in them.

    Returns:
        `input_ids` and `labels`: (B, L), padded on the right; under templates of styles SINGLE and PLAIN lists of B tensors (L,).

    Raises:
        ValueError: turns that no labels can be made of, or a placeholder without `has_image`.
    """
    template = conversation_lib.default_conversation
    if not has_image and any(DEFAULT_IMAGE_TOKEN in turn["value"] for turns in sources for turn in turns):
        raise ValueError(f"has_image is False, but a turn has {DEFAULT_IMAGE_TOKEN} in it; pass has_image=True, or drop it.")
    targets = [build_targets(turns, template, tokenizer) for turns in sources]
    ids = [torch.tensor(each.input_ids) for each in targets]
    labels = [torch.tensor(each.labels) for each in targets]
    if template.sep_style in (SeparatorStyle.SINGLE, SeparatorStyle.PLAIN):
        return {"input_ids": ids, "labels": labels}
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=float(tokenizer.pad_token_id or 0)),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
    }


def _of_style(style: SeparatorStyle, sources: Sequence[Turns], tokenizer: PreTrainedTokenizerBase, has_image: bool) -> dict[str, Any]:
    found = conversation_lib.default_conversation.sep_style
    if found is not style:
        raise ValueError(
            f"llava.conversation.default_conversation is of style {found.name}, expected {style.name}; set it to one of conv_templates, or "
            "call preprocess, which reads any."
        )
    return preprocess(sources, tokenizer, has_image)


def preprocess_v1(sources: Sequence[Turns], tokenizer: PreTrainedTokenizerBase, has_image: bool = False) -> dict[str, Any]:
    """`preprocess` under a template of style TWO."""
    return _of_style(SeparatorStyle.TWO, sources, tokenizer, has_image)


def preprocess_llama_2(sources: Sequence[Turns], tokenizer: PreTrainedTokenizerBase, has_image: bool = False) -> dict[str, Any]:
    """`preprocess` under a template of style LLAMA_2."""
    return _of_style(SeparatorStyle.LLAMA_2, sources, tokenizer, has_image)


def preprocess_mpt(sources: Sequence[Turns], tokenizer: PreTrainedTokenizerBase, has_image: bool = False) -> dict[str, Any]:
    """`preprocess` under a template of style MPT."""
    return _of_style(SeparatorStyle.MPT, sources, tokenizer, has_image)


def preprocess_plain(sources: Sequence[Turns], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """`preprocess` under a template of style PLAIN: a caption after its image."""
    return _of_style(SeparatorStyle.PLAIN, sources, tokenizer, True)


# ---- the model


def smart_tokenizer_and_embedding_resize(special_tokens_dict: dict[str, Any], tokenizer: PreTrainedTokenizerBase, model: Any) -> None:
    """Add special tokens to a tokenizer, with the mean of the old embeddings for each; see `embed_new_tokens`.

    Args:
        special_tokens_dict: for transformers' `add_special_tokens`, as in `{"pad_token": "[PAD]"}`.
    """
    if added := tokenizer.add_special_tokens(special_tokens_dict):
        embed_new_tokens(model, len(tokenizer), added)


def find_all_linear_names(model: Any) -> list[str]:
    """Last words of the linear layers that LoRA adapts: the language model's, without the head."""
    return language_linears(model)


def safe_save_model_for_hf_trainer(trainer: Any, output_dir: str) -> None:
    """Save a trainer's model, its tokenizer and, after stage align, its projector alone beside it."""
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    trainer.save_model(output_dir)
