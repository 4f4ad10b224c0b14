"""Rows of LLaVA's JSON or JSONL, read one by one into ids, labels and views, and batched.

A row is `{"conversations": [{"from", "value"}, ...]}` with `"image"`: one file name or a list of them; other keys are kept
out of the way. Nothing here knows the model: what a picture costs in visual tokens is asked of a function.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from llava.constants import IGNORE_INDEX
from llava.conversation import Conversation
from llava.images import load_image
from llava.mm_utils import process_images
from llava.train.features import FeatureCache
from llava.train.targets import Targets, build_targets, count_words, place_images

logger = logging.getLogger(__name__)

Row = dict[str, Any]
IMAGE_WORDS = 128
"""How many words a picture counts for when rows are grouped by length, as in LLaVA."""


class BadSampleError(ValueError):
    """A row that cannot be learnt from; the sentence names the row."""


def read_rows(path: str | Path) -> list[Row]:
    """Read LLaVA's JSON (a list) or JSONL (a row per line, files ending in `.jsonl`).

    Raises:
        ValueError: not a list of rows with conversations, or no row at all.
    """
    path = Path(path)
    with path.open(encoding="utf-8") as file:
        try:
            rows = [json.loads(line) for line in file if line.strip()] if path.suffix == ".jsonl" else json.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not valid JSON: {error}; one row per line needs the ending .jsonl.") from error
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path} holds {type(rows).__name__} without rows; expected a list of conversations.")
    for index, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("conversations"), list):
            raise ValueError(f"row {index} of {path} has no list 'conversations'; expected LLaVA's format.")
    return rows


def image_names(row: Row) -> list[str]:
    """File names of a row's pictures, in the order of its placeholders."""
    image = row.get("image")
    if image is None:
        return []
    return list(image) if isinstance(image, list) else [image]


@dataclass(frozen=True)
class RowReader:
    """Turns a row into what a batch holds.

    Attributes:
        tokenizer: as loaded by `llava.tokenizer.load_tokenizer`.
        template: conversation template.
        image_processor: of the vision tower.
        model_config: says how a picture is cut into views.
        image_folder: what names of pictures are relative to.
        max_length: longest row, text and visual tokens together.
        visual_tokens: (width, height) of a picture -> most visual tokens it can cost in this run.
        is_multimodal: whether rows may have pictures.
        cache: pictures in it are not opened.
    """

    tokenizer: Any
    template: Conversation
    image_processor: Any
    model_config: Any
    image_folder: Path | None
    max_length: int
    visual_tokens: Callable[[tuple[int, int]], int]
    is_multimodal: bool = True
    cache: FeatureCache | None = None

    def targets(self, row: Row) -> Targets:
        """Ids and labels of a row.

        Raises:
            ValueError: turns, placeholders and pictures that do not fit.
        """
        names = image_names(row)
        if names and not self.is_multimodal:
            raise ValueError(f"the row has picture {names[0]!r}, but --is_multimodal is False.")
        turns = place_images(
            row["conversations"], len(names), self.template.version, self.model_config.mm_use_im_start_end
        )
        return build_targets(turns, self.template, self.tokenizer)

    def views(self, name: str) -> tuple[Tensor | None, tuple[int, int]]:
        """Views (C, 3, S, S) of a picture, `None` where its features are at hand, and its (width, height).

        Raises:
            ValueError, OSError: the picture is missing or broken.
        """
        if self.cache is not None and name in self.cache:
            return None, self.cache.image_size(name)
        image = load_image((self.image_folder or Path()) / name)
        views = process_images([image], self.image_processor, self.model_config)[0]
        return views if views.ndim == 4 else views[None], image.size

    def read(self, row: Row, targets: Targets | None = None) -> dict[str, Any]:
        """Everything that a batch needs of one row.

        Raises:
            ValueError, OSError: the row cannot be learnt from, or is longer than the context; it is never cut.
        """
        targets = targets or self.targets(row)
        names = image_names(row)
        pictures = [self.views(name) for name in names]
        sizes = [size for _, size in pictures]
        visual = sum(self.visual_tokens(size) for size in sizes)
        text = len(targets.input_ids) - targets.num_images
        if text + visual > self.max_length:
            raise ValueError(
                f"the row is {text + visual} tokens long ({text} of text, {visual} visual), but the context is "
                f"{self.max_length}; split or drop the row, or raise --model_max_length."
            )
        return {
            "input_ids": torch.tensor(targets.input_ids, dtype=torch.long),
            "labels": torch.tensor(targets.labels, dtype=torch.long),
            "images": [views for views, _ in pictures],
            "image_sizes": sizes,
            "image_keys": names,
        }


class ConversationDataset(Dataset[dict[str, Any]]):
    """Rows to learn from.

    Args:
        rows: LLaVA's rows.
        reader: turns a row into tensors.
        on_bad_sample: `raise`, or `skip`: log a broken row and read the next one in its place, so that batches keep
            their size.
        max_bad_share: with `skip`, more than this share of broken rows stops the run.
        lazy: write ids and labels when a row is read; otherwise all of them at once.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        reader: RowReader,
        on_bad_sample: str = "raise",
        max_bad_share: float = 0.01,
        lazy: bool = True,
    ) -> None:
        self.rows = rows
        self.reader = reader
        self.on_bad_sample = on_bad_sample
        self.max_bad_share = max_bad_share
        self.bad_rows: set[int] = set()
        self._targets: list[Targets] | None = None
        if not lazy:
            self._targets = [self._guarded(index, partial(reader.targets, rows[index])) for index in range(len(rows))]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> list[int]:
        """Length of every row in words; a picture counts as many."""
        return [count_words(row["conversations"]) + IMAGE_WORDS * bool(image_names(row)) for row in self.rows]

    @property
    def modality_lengths(self) -> list[int]:
        """Words of every row, negative for rows without a picture."""
        words = [max(count_words(row["conversations"]), 1) for row in self.rows]
        return [count if image_names(row) else -count for count, row in zip(words, self.rows, strict=True)]

    def row_id(self, index: int) -> str:
        """The row's own id, or its number."""
        return str(self.rows[index].get("id", index))

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.on_bad_sample == "raise":
            return self._read(index)
        for candidate in range(index, index + len(self.rows)):
            try:
                return self._read(candidate % len(self.rows))
            except BadSampleError as error:
                self._count_bad(candidate % len(self.rows), error)
        raise BadSampleError("no row of the data can be read; check --data_path and --image_folder.")

    def _read(self, index: int) -> dict[str, Any]:
        targets = self._targets[index] if self._targets else None
        item = self._guarded(index, lambda: self.reader.read(self.rows[index], targets))
        return {**item, "row": index, "id": self.row_id(index)}

    def _guarded(self, index: int, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except (ValueError, OSError) as error:
            raise BadSampleError(f"row {index} (id {self.row_id(index)}): {error}") from error

    def _count_bad(self, index: int, error: BadSampleError) -> None:
        if index not in self.bad_rows:
            self.bad_rows.add(index)
            logger.warning("skipped %s (%d skipped so far)", error, len(self.bad_rows))
        if len(self.bad_rows) > self.max_bad_share * len(self.rows):
            raise ValueError(
                f"{len(self.bad_rows)} of {len(self.rows)} rows are broken, more than the share {self.max_bad_share} that "
                "--max_bad_share allows; repair the data or raise the share."
            )


@dataclass(frozen=True)
class Collator:
    """Pads rows on the right into a batch; the mask comes from their lengths, so a literal `<unk>` stays visible.

    Attributes:
        pad_token_id: id on padding; never read.
    """

    pad_token_id: int

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Batch rows.

        Returns:
            `input_ids`, `labels`, `attention_mask` (B, L); `images`: one (C, 3, S, S) or `None` per picture in reading
            order, rows without a picture add none; `image_sizes`, `image_keys` likewise; `images_per_row`, `rows`, `ids`.
        """
        ids = [item["input_ids"] for item in items]
        masks = [torch.ones_like(row, dtype=torch.bool) for row in ids]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "labels": pad_sequence([item["labels"] for item in items], batch_first=True, padding_value=IGNORE_INDEX),
            "attention_mask": pad_sequence(masks, batch_first=True, padding_value=False),
            "images": [views for item in items for views in item["images"]],
            "image_sizes": [size for item in items for size in item["image_sizes"]],
            "image_keys": [key for item in items for key in item["image_keys"]],
            "images_per_row": [len(item["images"]) for item in items],
            "rows": [item["row"] for item in items],
            "ids": [item["id"] for item in items],
        }
