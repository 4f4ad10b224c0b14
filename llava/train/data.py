"""Rows as a data set and as batches.

`ConversationDataset` reads rows one by one with a `RowReader`, `Collator` pads them into batches, `check_rows` looks at all of them before
the first step. As a program, `python -m llava.train.dataset` indexes and counts rows or, with `--check`, reads every one of them; see
`llava.train.check`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from llava.constants import IGNORE_INDEX
from llava.conversation import conv_templates
from llava.train.arguments import DataArguments
from llava.train.features import FeatureCache
from llava.train.index import image_groups
from llava.train.mixture import Mixture, open_rows
from llava.train.rows import UNREAD_KEYS, BadSampleError, Row, RowReader, measure, visual_token_costs
from llava.train.shards import ImageFolder, open_images
from llava.train.targets import Targets

logger = logging.getLogger(__name__)

MOST_UNANSWERED = 0.5
"""Largest share of rows without an answer; above it the answers are probably stored under another key."""
IMAGE_WORDS = 128
"""How many words an image counts for when rows are grouped by length, as in LLaVA."""


class ConversationDataset(Dataset[dict[str, Any]]):
    """Rows to train on.

    Args:
        rows: LLaVA's rows: those of `open_rows`, or a list.
        reader: turns a row into tensors.
        on_bad_sample: `raise`, or `skip`: log a broken row and read the next one in its place, so that batches keep
            their size.
        max_bad_share: with `skip`, more than this share of broken rows stops the run. Every process counts the rows that
            it and its data loader's workers have read.
        lazy: tokenize a row when it is read; otherwise all rows at once.

    Raises:
        BadSampleError: a broken row, where all are tokenized at once and none is skipped.
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
        self._bad = torch.zeros(len(rows), dtype=torch.uint8).share_memory_()  # a mark is set once, by whichever worker
        self._targets: list[Targets | None] = []
        if not lazy:
            self._targets = [self._prepared(index) for index in range(len(rows))]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def bad_rows(self) -> set[int]:
        """Numbers of the rows that were skipped."""
        return set(self._bad.nonzero().flatten().tolist())

    @property
    def lengths(self) -> list[int]:
        """Length of every row in words; a row's images count for `IMAGE_WORDS`."""
        columns = row_columns(self.rows)
        return (columns.words + IMAGE_WORDS * columns.has_image).tolist()

    @property
    def modality_lengths(self) -> list[int]:
        """Words of every row, negative for rows without an image."""
        columns = row_columns(self.rows)
        words = np.maximum(columns.words, 1)
        return np.where(columns.has_image, words, -words).tolist()

    def row_id(self, index: int) -> str:
        """The row's own id, or its number in its file."""
        try:
            row: Any = self.rows[index]
        except ValueError:
            row = None
        return self._id_of(row, index)

    def _id_of(self, row: Any, index: int) -> str:
        number = self.rows.locate(index)[1] if isinstance(self.rows, Mixture) else index
        return str(row.get("id", number)) if isinstance(row, dict) else str(number)

    def describe(self, index: int) -> str:
        """A row's number, its file where it comes from one, and its id."""
        place = f"row {index}"
        if isinstance(self.rows, Mixture):
            source, number = self.rows.locate(index)
            place = f"row {number} of {source.rows.source}"
        return f"{place} (id {self.row_id(index)})"

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.on_bad_sample == "raise":
            return self.read(index)
        for candidate in range(index, index + len(self.rows)):
            try:
                return self.read(candidate % len(self.rows))
            except BadSampleError as error:
                self._count_bad(candidate % len(self.rows), error)
        raise BadSampleError("no row of the data can be read; check --data_path and --image_folder.")

    def read(self, index: int) -> dict[str, Any]:
        """A row for the collator, whatever `on_bad_sample` says.

        Raises:
            BadSampleError: the row is broken; the reason is its cause.
        """

        def work() -> dict[str, Any]:
            row = self.rows[index]
            images = self.rows.locate(index)[0].images if isinstance(self.rows, Mixture) else None
            targets = self._targets[index] if self._targets else None
            return {**self.reader.read(row, targets, images), "row": index, "id": self._id_of(row, index)}

        return self._guarded(index, work)

    def targets(self, index: int) -> Targets:
        """Ids and labels of a row.

        Raises:
            BadSampleError: the row is broken; the reason is its cause.
        """
        return self._guarded(index, lambda: self.reader.targets(self.rows[index]))

    def _prepared(self, index: int) -> Targets | None:
        """Ids and labels of a row; `None` for a broken one, which is skipped when it is read."""
        try:
            return self.targets(index)
        except BadSampleError as error:
            if self.on_bad_sample == "raise":
                raise
            self._count_bad(index, error)
            return None

    def _guarded(self, index: int, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except (ValueError, OSError) as error:
            raise BadSampleError(f"{self.describe(index)}: {error}") from error

    def _count_bad(self, index: int, error: BadSampleError) -> None:
        if not self._bad[index]:
            self._bad[index] = 1
            logger.warning("skipped %s (%d skipped so far)", error, int(self._bad.sum()))
        count = int(self._bad.sum())
        if count > self.max_bad_share * len(self.rows):
            raise ValueError(
                f"{count} of {len(self.rows)} rows are broken, more than the share {self.max_bad_share} that "
                f"--max_bad_share allows; repair the data or raise the share. The last one: {error}"
            )


@dataclass(frozen=True)
class RowColumns:
    """What is known of rows without reading them.

    Attributes:
        words: (R,) words of the turns.
        has_image: (R,) whether there are images.
        image_groups: (R,) the same number for rows about the same images, -1 without one.
        answered: (R,) whether there is an answer to train on.
        unread: (R,) position in `UNREAD_KEYS` of a key that is not read, -1 without one.
    """

    words: np.ndarray
    has_image: np.ndarray
    image_groups: np.ndarray
    answered: np.ndarray
    unread: np.ndarray


def row_columns(rows: Sequence[Row]) -> Mixture | RowColumns:
    """The columns of rows: from their index, or measured where they are a list."""
    if isinstance(rows, Mixture):
        return rows
    measured = [measure(row) for row in rows]
    groups = image_groups(pa.array([each.image for each in measured], pa.string()))
    words, answered, unread = (np.array([getattr(each, name) for each in measured]) for name in ("words", "answered", "unread"))
    return RowColumns(words, groups >= 0, groups, answered, unread)


def check_rows(dataset: ConversationDataset, what: str, needs_images: bool = False) -> None:
    """Look at the columns of all rows before the first step: rows without any supervised token are counted and reported once.

    Args:
        what: what messages call the rows.
        needs_images: whether a row without an image contributes nothing to the loss either.

    Raises:
        ValueError: no row contributes to the loss, more than `MOST_UNANSWERED` of them have no answer, or, where broken rows are not
            skipped, rows have a key that is not read.
    """
    columns = row_columns(dataset.rows)
    count = len(dataset.rows)
    for key, (unread, first) in _unread_keys(columns.unread).items():
        finding = (
            f"{unread:,} of {count:,} {what} have the key {key!r}, which is not read: {UNREAD_KEYS[key]}; the first is "
            f"{dataset.describe(first)}."
        )
        if dataset.on_bad_sample == "raise":
            raise ValueError(f"{finding} --on_bad_sample skip leaves them out.")
        logger.warning(finding)
    silent = np.flatnonzero(~columns.answered)
    if len(silent) > MOST_UNANSWERED * count:
        dataset.targets(int(silent[0]))  # raises a more specific error where the row is malformed
        raise ValueError(
            f"{len(silent):,} of {count:,} {what} have no answer, so there is nothing to train on: give each a non-empty turn from "
            f"'gpt'; the first is {dataset.describe(int(silent[0]))}."
        )
    if needs_images and not (columns.answered & columns.has_image).any():
        raise ValueError(f"none of the {count:,} {what} has both an image and an answer, so there is nothing to train the router on.")
    if len(silent):
        logger.warning(
            "%d of %d %s have no answer and add nothing to the loss; the first is %s",
            len(silent), count, what, dataset.describe(int(silent[0])),
        )


def _unread_keys(unread: np.ndarray) -> dict[str, tuple[int, int]]:
    """How many rows have each key that is not read, and the number of the first."""
    places, firsts, counts = np.unique(unread, return_index=True, return_counts=True)
    keys = list(UNREAD_KEYS)
    return {keys[place]: (int(count), int(first)) for place, first, count in zip(places, firsts, counts, strict=True) if place >= 0}


@dataclass(frozen=True)
class Collator:
    """Pads rows on the right into a batch. The mask comes from their lengths, so a literal `<unk>`, whose id may be the padding's, is kept.

    Attributes:
        pad_token_id: id at padding; the mask hides it.
    """

    pad_token_id: int

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Batch rows.

        Returns:
            `input_ids`, `labels`, `attention_mask` (B, L); `images`: one (C, 3, S, S) or `None` per image in reading
            order, rows without an image add none; `image_sizes`, `image_keys` likewise; `images_per_row`, `rows`, `ids`.
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


def make_dataset(
    path: str,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    version: str,
    data_args: DataArguments,
    cache: FeatureCache | None = None,
) -> ConversationDataset:
    """The rows of a file or a mixture as the model reads them.

    Args:
        path: see `llava.train.mixture.open_rows`.
        model: multimodal; its weights are not looked at.
        version: name of the conversation template.
        cache: features of a frozen vision tower; images in it are not opened.
    """
    reader = RowReader(
        tokenizer=tokenizer,
        template=conv_templates[version],
        image_processor=model.get_vision_tower().image_processor,
        model_config=model.config,
        max_length=model.config.tokenizer_model_max_length,
        visual_tokens=lambda image_size: visual_token_costs(model, image_size)[-1],
        images=open_images(data_args.image_folder, data_args.index_cache) if data_args.image_folder else ImageFolder(),
        is_multimodal=data_args.is_multimodal,
        cache=cache,
    )
    rows = open_rows(path, data_args.index_cache)
    return ConversationDataset(rows, reader, data_args.on_bad_sample, data_args.max_bad_share, data_args.lazy_preprocess)
