"""A row of training data: what it is, how it is read into ids, labels and views, and why it may be refused.

A row is `{"conversations": [{"from", "value"}, ...]}` with `"image"`, one file name or a list of them; other keys are ignored, except
`UNREAD_KEYS`, which are refused. Where rows come from (`index.py`, `mixture.py`) and how they are batched (`data.py`) is not known here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from llava.conversation import Conversation
from llava.crops import cut_into_views
from llava.images import check_aspect_ratio, to_rgb
from llava.train.shards import ImageFolder, ImageSource
from llava.train.targets import Targets, build_targets, count_words, has_answer, place_images

Row = dict[str, Any]

_RENAME = "name images under 'image', one name or a list of them"
_DROP = "only images are supported, so drop such rows, or give single frames as images"
UNREAD_KEYS: dict[str, str] = {
    "images": _RENAME, "image_path": _RENAME, "image_paths": _RENAME, "image_file": _RENAME, "img": _RENAME,
    "video": _DROP, "videos": _DROP, "audio": _DROP, "audios": _DROP,
}  # fmt: skip
"""Keys under which other trainers' rows hold their image, video or audio, and what to do about each. They are not read, so the model would
be trained on the text without its image, video or audio."""


class BadSampleError(ValueError):
    """A row that cannot be trained on; the message names the row."""


class RowTooLongError(ValueError):
    """A row that is longer than the context.

    Attributes:
        length: its tokens, text and visual together.
    """

    def __init__(self, message: str, length: int) -> None:
        super().__init__(message)
        self.length = length

    def __reduce__(self) -> tuple[Any, ...]:
        return RowTooLongError, (self.args[0], self.length)


class UnreadKeyError(ValueError):
    """A row that names its image, video or audio under a key that is not read.

    Attributes:
        key: one of `UNREAD_KEYS`.
    """

    def __init__(self, message: str, key: str) -> None:
        super().__init__(message)
        self.key = key

    def __reduce__(self) -> tuple[Any, ...]:
        return UnreadKeyError, (self.args[0], self.key)


def image_names(row: Row) -> list[str]:
    """File names of a row's images, in the order of its placeholders.

    Raises:
        ValueError: `image` is neither a name nor a list of names.
    """
    image = row.get("image")
    names = image if isinstance(image, list) else [] if image is None else [image]
    wrong = [name for name in names if not isinstance(name, str) or not name]
    if wrong:
        raise ValueError(f"the row's image is {wrong[0]!r}, expected a file name or a list of file names.")
    return list(names)


def turns_of(row: Row) -> list[dict[str, str]]:
    """The turns of a row, each a mapping with a text.

    Raises:
        ValueError: the row is not a mapping, has no list of turns, or a turn is malformed.
    """
    if not isinstance(row, dict) or not isinstance(row.get("conversations"), list):
        raise ValueError("the row has no list 'conversations'; expected LLaVA's format.")
    for number, turn in enumerate(row["conversations"]):
        text = turn.get("value") if isinstance(turn, dict) else None
        if not isinstance(text, str):
            raise ValueError(f"turn {number} is {str(turn)[:60]!r}, expected {{'from': 'human' or 'gpt', 'value': text}}.")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"turn {number} contains a lone surrogate, half of a character; write the text again as valid UTF-8.")
    return row["conversations"]


def unread_key(row: Row) -> str | None:
    """The first of `UNREAD_KEYS` that has a value; one for images counts only where `image` is missing."""
    for key, advice in UNREAD_KEYS.items():
        if row.get(key) and not (advice is _RENAME and row.get("image")):
            return key
    return None


class RowMeasures(NamedTuple):
    """What is known of a row without opening its images.

    Attributes:
        image: its image names as a JSON list, empty without any.
        words: words of its turns.
        answered: whether it has an answer to train on.
        unread: position in `UNREAD_KEYS` of a key that is not read, -1 without one.
    """

    image: str
    words: int
    answered: bool
    unread: int


_UNREAD_PLACES = {key: place for place, key in enumerate(UNREAD_KEYS)}


def measure(row: Any) -> RowMeasures:
    """Measure a row. A broken one has no words and no answer; what is wrong with it is reported when it is read."""
    image = row.get("image") if isinstance(row, dict) else None
    names = image if isinstance(image, list) else [] if image is None else [image]
    try:
        words, answered = count_words(row["conversations"]), has_answer(row["conversations"])
    except (TypeError, KeyError, AttributeError):
        words, answered = 0, False
    key = unread_key(row) if isinstance(row, dict) else None
    return RowMeasures(json.dumps(names) if names else "", words, answered, -1 if key is None else _UNREAD_PLACES[key])


def num_views(config: Any, image_size: tuple[int, int]) -> int:
    """Views of an image of (width, height) `image_size`: one, or under anyres the whole view and its tiles."""
    return config.num_views_of(image_size) if config.image_aspect_ratio == "anyres" else 1


def visual_token_costs(model: Any, image_size: tuple[int, int]) -> list[int]:
    """Visual tokens of an image of (width, height) `image_size` at every granularity, coarse to fine, newlines included."""
    return [layout.num_tokens for layout in model.layouts(num_views(model.config, image_size), image_size)]


class KnownImages(Protocol):
    """Images that need not be opened."""

    def __contains__(self, key: str, /) -> bool: ...

    def image_size(self, key: str, /) -> tuple[int, int]:
        """(width, height) of one of them."""


@dataclass(frozen=True)
class RowReader:
    """Reads a row into what a batch holds.

    Attributes:
        tokenizer: as loaded by `llava.tokenizer.load_tokenizer`.
        template: conversation template.
        image_processor: of the vision tower.
        model_config: decides how an image is cut into views.
        max_length: longest row, text and visual tokens together.
        visual_tokens: (width, height) of an image -> most visual tokens it can cost in this run.
        images: where the images of rows without a source of their own are.
        is_multimodal: whether rows may have images.
        cache: images in it are not opened; their features are known, or stand in the same batch.
    """

    tokenizer: Any
    template: Conversation
    image_processor: Any
    model_config: Any
    max_length: int
    visual_tokens: Callable[[tuple[int, int]], int]
    images: ImageSource = field(default_factory=ImageFolder)
    is_multimodal: bool = True
    cache: KnownImages | None = None

    def targets(self, row: Row) -> Targets:
        """Ids and labels of a row.

        Raises:
            ValueError: turns, placeholders and images that do not fit.
        """
        turns = turns_of(row)
        names = image_names(row)
        key = unread_key(row)
        if key is not None:
            raise UnreadKeyError(
                f"the row's key {key!r} is not read, so the model would be trained on the text without it: {UNREAD_KEYS[key]}.", key
            )
        if names and not self.is_multimodal:
            raise ValueError(f"the row has image {names[0]!r}, but --is_multimodal is False.")
        placed = place_images(turns, len(names), self.template.version, self.model_config.mm_use_im_start_end)
        return build_targets(placed, self.template, self.tokenizer)

    def views(self, name: str, images: ImageSource | None = None) -> tuple[Tensor | None, tuple[int, int]]:
        """Views (C, 3, S, S) of an image in uint8, `None` where its features are cached, and its (width, height).

        A quarter of the bytes of the values that the tower reads travel from the data loader's workers to the device.

        Raises:
            ValueError, OSError: the image is missing or broken.
        """
        images = images or self.images
        key = images.key(name)
        if self.cache is not None and key in self.cache:
            return None, self.cache.image_size(key)
        image = images.load(name)
        check_aspect_ratio(image.size)
        config = self.model_config
        views = cut_into_views(to_rgb(image), self.image_processor, config.image_aspect_ratio, config.image_grid_pinpoints)
        return views if views.ndim == 4 else views[None], image.size

    def read(self, row: Row, targets: Targets | None = None, images: ImageSource | None = None) -> dict[str, Any]:
        """Everything that a batch needs of one row.

        Args:
            row: LLaVA's row.
            targets: its ids and labels where they were prepared before.
            images: where its images are; the reader's own source without it.

        Raises:
            ValueError, OSError: the row cannot be trained on, or is longer than the context; rows are never truncated.
        """
        targets = targets or self.targets(row)
        images = images or self.images
        names = image_names(row)
        viewed = [self.views(name, images) for name in names]
        sizes = [size for _, size in viewed]
        visual = sum(self.visual_tokens(size) for size in sizes)
        text = len(targets.input_ids) - targets.num_images
        if text + visual > self.max_length:
            raise RowTooLongError(
                f"the row is {text + visual} tokens long ({text} of text, {visual} visual), but the context is "
                f"{self.max_length}; split or drop the row, or raise --model_max_length.",
                text + visual,
            )
        return {
            "input_ids": torch.tensor(targets.input_ids, dtype=torch.long),
            "labels": torch.tensor(targets.labels, dtype=torch.long),
            "images": [views for views, _ in viewed],
            "image_sizes": sizes,
            "image_keys": [images.key(name) for name in names],
        }
