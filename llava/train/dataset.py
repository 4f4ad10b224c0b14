"""Rows of LLaVA's JSON or JSONL, read one by one into ids, labels and views, and batched.

A row is `{"conversations": [{"from", "value"}, ...]}` with `"image"`: one file name or a list of them; other keys are kept
out of the way. Nothing here knows the model: what a picture costs in visual tokens is asked of a function.

    python -m llava.train.dataset --check --model_name_or_path DIR --data_path rows.json --image_folder images

reads every row on this path and reports what is broken; see `llava.train.check`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from llava.constants import IGNORE_INDEX
from llava.conversation import Conversation
from llava.mm_utils import process_images
from llava.train.features import FeatureCache
from llava.train.index import UNREAD_KEYS, Row, measure, picture_groups, unread_key
from llava.train.mixture import Mixture
from llava.train.shards import PictureFolder, Pictures
from llava.train.targets import Targets, build_targets, place_images

logger = logging.getLogger(__name__)

MOST_UNANSWERED = 0.5
"""Largest share of rows without an answer; above it the answers rather stand where they are not looked for."""
IMAGE_WORDS = 128
"""How many words a picture counts for when rows are grouped by length, as in LLaVA."""


class BadSampleError(ValueError):
    """A row that cannot be learnt from; the sentence names the row."""


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
    """A row that says under a key that is not read what it is about.

    Attributes:
        key: one of `UNREAD_KEYS`.
    """

    def __init__(self, message: str, key: str) -> None:
        super().__init__(message)
        self.key = key

    def __reduce__(self) -> tuple[Any, ...]:
        return UnreadKeyError, (self.args[0], self.key)


def image_names(row: Row) -> list[str]:
    """File names of a row's pictures, in the order of its placeholders.

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
        ValueError: the row is no mapping, has no list of turns, or one that is something else.
    """
    if not isinstance(row, dict) or not isinstance(row.get("conversations"), list):
        raise ValueError("the row has no list 'conversations'; expected LLaVA's format.")
    for number, turn in enumerate(row["conversations"]):
        text = turn.get("value") if isinstance(turn, dict) else None
        if not isinstance(text, str):
            raise ValueError(f"turn {number} is {str(turn)[:60]!r}, expected {{'from': 'human' or 'gpt', 'value': text}}.")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"turn {number} holds half of a character (a lone surrogate); write the text anew as UTF-8.")
    return row["conversations"]


@dataclass(frozen=True)
class RowReader:
    """Turns a row into what a batch holds.

    Attributes:
        tokenizer: as loaded by `llava.tokenizer.load_tokenizer`.
        template: conversation template.
        image_processor: of the vision tower.
        model_config: says how a picture is cut into views.
        max_length: longest row, text and visual tokens together.
        visual_tokens: (width, height) of a picture -> most visual tokens it can cost in this run.
        pictures: where rows that do not bring a place of their own have their pictures.
        is_multimodal: whether rows may have pictures.
        cache: pictures in it are not opened.
    """

    tokenizer: Any
    template: Conversation
    image_processor: Any
    model_config: Any
    max_length: int
    visual_tokens: Callable[[tuple[int, int]], int]
    pictures: Pictures = field(default_factory=PictureFolder)
    is_multimodal: bool = True
    cache: FeatureCache | None = None

    def targets(self, row: Row) -> Targets:
        """Ids and labels of a row.

        Raises:
            ValueError: turns, placeholders and pictures that do not fit.
        """
        turns = turns_of(row)
        names = image_names(row)
        key = unread_key(row)
        if key is not None:
            raise UnreadKeyError(f"the row's key {key!r} is not read, and it would be learnt blind: {UNREAD_KEYS[key]}.", key)
        if names and not self.is_multimodal:
            raise ValueError(f"the row has picture {names[0]!r}, but --is_multimodal is False.")
        placed = place_images(turns, len(names), self.template.version, self.model_config.mm_use_im_start_end)
        return build_targets(placed, self.template, self.tokenizer)

    def views(self, name: str, pictures: Pictures | None = None) -> tuple[Tensor | None, tuple[int, int]]:
        """Views (C, 3, S, S) of a picture, `None` where its features are at hand, and its (width, height).

        Raises:
            ValueError, OSError: the picture is missing or broken.
        """
        pictures = pictures or self.pictures
        key = pictures.key(name)
        if self.cache is not None and key in self.cache:
            return None, self.cache.image_size(key)
        image = pictures.load(name)
        views = process_images([image], self.image_processor, self.model_config)[0]
        return views if views.ndim == 4 else views[None], image.size

    def read(self, row: Row, targets: Targets | None = None, pictures: Pictures | None = None) -> dict[str, Any]:
        """Everything that a batch needs of one row.

        Args:
            row: LLaVA's row.
            targets: its ids and labels where they are at hand.
            pictures: where it has its pictures; the reader's own place without it.

        Raises:
            ValueError, OSError: the row cannot be learnt from, or is longer than the context; it is never cut.
        """
        targets = targets or self.targets(row)
        pictures = pictures or self.pictures
        names = image_names(row)
        viewed = [self.views(name, pictures) for name in names]
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
            "image_keys": [pictures.key(name) for name in names],
        }


class ConversationDataset(Dataset[dict[str, Any]]):
    """Rows to learn from.

    Args:
        rows: LLaVA's rows: those of `open_rows`, or a list.
        reader: turns a row into tensors.
        on_bad_sample: `raise`, or `skip`: log a broken row and read the next one in its place, so that batches keep
            their size.
        max_bad_share: with `skip`, more than this share of broken rows stops the run. Every process counts what it
            meets, its data loader's workers together.
        lazy: write ids and labels when a row is read; otherwise all of them at once.

    Raises:
        BadSampleError: a broken row, where all are read at once and none is skipped.
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
        """Length of every row in words; a picture counts as many."""
        columns = row_columns(self.rows)
        return (columns.words + IMAGE_WORDS * columns.pictured).tolist()

    @property
    def modality_lengths(self) -> list[int]:
        """Words of every row, negative for rows without a picture."""
        columns = row_columns(self.rows)
        words = np.maximum(columns.words, 1)
        return np.where(columns.pictured, words, -words).tolist()

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
        """A row's number, where it comes from files also which one, and its id."""
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
        """A row for the collator, broken or not.

        Raises:
            BadSampleError: the row is broken; the reason is its cause.
        """

        def work() -> dict[str, Any]:
            row = self.rows[index]
            pictures = self.rows.locate(index)[0].pictures if isinstance(self.rows, Mixture) else None
            targets = self._targets[index] if self._targets else None
            return {**self.reader.read(row, targets, pictures), "row": index, "id": self._id_of(row, index)}

        return self._guarded(index, work)

    def targets(self, index: int) -> Targets:
        """Ids and labels of a row.

        Raises:
            BadSampleError: the row is broken; the reason is its cause.
        """
        return self._guarded(index, lambda: self.reader.targets(self.rows[index]))

    def _prepared(self, index: int) -> Targets | None:
        """Ids and labels of a row; `None` for a broken one that is skipped when its turn comes."""
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
        pictured: (R,) whether there are pictures.
        picture_groups: (R,) the same number for rows about the same pictures, -1 without one.
        answered: (R,) whether there is an answer to learn.
        unread: (R,) the place in `UNREAD_KEYS` of a key that is not read, -1 without one.
    """

    words: np.ndarray
    pictured: np.ndarray
    picture_groups: np.ndarray
    answered: np.ndarray
    unread: np.ndarray


def row_columns(rows: Sequence[Row]) -> Mixture | RowColumns:
    """The columns of rows: from their index, or measured where they are a list."""
    if isinstance(rows, Mixture):
        return rows
    measured = [measure(row) for row in rows]
    groups = picture_groups(pa.array([each.image for each in measured], pa.string()))
    words, answered, unread = (np.array([getattr(each, name) for each in measured]) for name in ("words", "answered", "unread"))
    return RowColumns(words, groups >= 0, groups, answered, unread)


def check_rows(dataset: ConversationDataset, what: str, needs_images: bool = False) -> None:
    """Look at all rows at once, without reading one, before anything is learnt: rows that teach nothing are counted and said once.

    Args:
        what: which rows these are, in sentences.
        needs_images: whether a row without an image teaches nothing either.

    Raises:
        ValueError: no row teaches anything, more than `MOST_UNANSWERED` of them have no answer, or, where broken rows are not skipped,
            rows have a key that is not read.
    """
    columns = row_columns(dataset.rows)
    count = len(dataset.rows)
    for key, (unread, first) in _unread_keys(columns.unread).items():
        finding = (
            f"{unread:,} of {count:,} {what} have the key {key!r}, which is not read: {UNREAD_KEYS[key]}; the first is "
            f"{dataset.describe(first)}."
        )
        if dataset.on_bad_sample == "raise":
            raise ValueError(f"{finding} With --on_bad_sample skip they are left out.")
        logger.warning(finding)
    silent = np.flatnonzero(~columns.answered)
    if len(silent) > MOST_UNANSWERED * count:
        dataset.targets(int(silent[0]))  # may know better what is wrong with it
        raise ValueError(
            f"{len(silent):,} of {count:,} {what} have no answer, so nothing is learnt from them: give each a turn of 'gpt' that is not "
            f"empty; the first is {dataset.describe(int(silent[0]))}."
        )
    if needs_images and not (columns.answered & columns.pictured).any():
        raise ValueError(f"none of the {count:,} {what} has both an image and an answer, so the router learns nothing from them.")
    if len(silent):
        logger.warning(
            "%d of %d %s have no answer and teach nothing; the first is %s", len(silent), count, what, dataset.describe(int(silent[0]))
        )


def _unread_keys(unread: np.ndarray) -> dict[str, tuple[int, int]]:
    """How many rows have each key that is not read, and the number of the first."""
    places, firsts, counts = np.unique(unread, return_index=True, return_counts=True)
    keys = list(UNREAD_KEYS)
    return {keys[place]: (int(count), int(first)) for place, first, count in zip(places, firsts, counts, strict=True) if place >= 0}


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


def main() -> None:
    """The command line: `llava.train.check`."""
    from llava.train.check import main as check

    check()


if __name__ == "__main__":
    main()
