"""The offline pass of stage 4: what every row's answer costs at every granularity, written to Parquet once.

    python -m llava.train.score_granularities --model_name_or_path DIR --data_path rows.json --image_folder images \
        --output_file scores.parquet

The language model is frozen in stage 4, so these losses are constants; with `--granularity_scores scores.parquet` the
router then trains without the language model. Rows about one image are scored together: the image is encoded once, and
the beginning that they share is read once.
Finished parts are kept in `scores.parquet.parts/`, and an interrupted pass resumes after them. The file records which weights,
rows and settings it belongs to, and the trainer refuses it for others.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from llava.conversation import conv_templates
from llava.durable import held_alone, room_for, whole_file
from llava.interrupts import keeping, sentence_of
from llava.log import setup_logging
from llava.model.builder import load_pretrained_model
from llava.train.data import Collator, ConversationDataset, check_rows, make_dataset, row_columns
from llava.train.features import FeatureCache
from llava.train.flags import DataArguments, ModelArguments, ScoreArguments
from llava.train.mixture import Mixture
from llava.train.objectives import Batch, granularities, image_features, score_rows_of_one_image
from llava.train.rows import Row
from llava.train.stages import part_of
from llava.utils import pick_device

logger = logging.getLogger(__name__)

FEATURES_KEPT = 2**30
"""Bytes of cached features above which scoring drops the cache."""
ROWS_OF_AN_IMAGE = 64
"""Rows about the same images in one batch."""
SCHEMA_VERSION = "2"
SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("losses", pa.list_(pa.float32()), nullable=False),
        pa.field("visual_tokens", pa.list_(pa.int32()), nullable=False),
    ]
)
"""One line per row: its number, its id, answer loss and visual tokens at every granularity, coarse to fine."""


ANSWER_FIELDS = (
    "mm_vision_select_layer", "mm_vision_select_feature", "mm_patch_merge_type", "unpad_rule", "vision_config", "image_processor",
    "rope_parameters", "rms_norm_eps", "sliding_window", "num_attention_heads", "num_key_value_heads", "hidden_act",
)  # fmt: skip
"""Configuration fields that change answers without changing a weight's shape."""


def model_fingerprint(model: nn.Module) -> str:
    """A digest of every weight that answers depend on, all parts but the router's, and of how they are used."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if part_of(name) == "router":
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    config: Any = model.config
    text = config.get_text_config()
    fields = {name: getattr(config, name, getattr(text, name, None)) for name in ANSWER_FIELDS}
    levels: Any = model.levels
    grids = [(level.tokens, level.grid) for level in levels]
    digest.update(json.dumps([fields, grids], sort_keys=True, default=str).encode())
    return digest.hexdigest()


def data_fingerprint(dataset: ConversationDataset) -> str:
    """A digest of the rows and of everything that decides how one is read. Checksums come from the index; no file is read.

    Raises:
        ValueError: rows that do not come from files.
    """
    if not isinstance(dataset.rows, Mixture):
        raise ValueError(f"scores belong to files of rows, but the rows are a {type(dataset.rows).__name__}; use open_rows.")
    reader = dataset.reader
    config = reader.model_config
    digest = hashlib.sha256(f"{dataset.rows.fingerprint} {reader.images.fingerprint}".encode())
    settings = {
        "template": asdict(reader.template, dict_factory=lambda items: {key: str(value) for key, value in items}),
        "image_aspect_ratio": config.image_aspect_ratio,
        "image_grid_pinpoints": config.image_grid_pinpoints,
        "mm_patch_merge_type": config.mm_patch_merge_type,
        "unpad_rule": config.unpad_rule,
        "mm_use_im_start_end": config.mm_use_im_start_end,
    }
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class GranularityScores:
    """Losses and visual tokens of rows, by row number.

    Attributes:
        losses: (R, G), nan for rows that were not scored or have no labels.
        visual_tokens: (R, G).
    """

    losses: Tensor
    visual_tokens: Tensor

    @classmethod
    def load(
        cls, path: str | Path, model_digest: str, data_digest: str, levels: Sequence[int]
    ) -> GranularityScores:
        """Read a score file.

        Raises:
            ValueError: no such file, a damaged one, or the scores of another model, other data or other granularities.
        """
        if not Path(path).is_file():
            raise ValueError(f"there is no score file {path}; write it with python -m llava.train.score_granularities.")
        table = _read(Path(path))
        different = _differences(table.schema, _metadata(model_digest, data_digest, levels))
        if different:
            raise ValueError(
                f"the scores in {path} are for another {' and '.join(different)} than this run's; score again with "
                "python -m llava.train.score_granularities."
            )
        rows = torch.tensor(table["row"].to_numpy())
        losses = torch.full((int(rows.max()) + 1, len(levels)), torch.nan)
        tokens = torch.zeros(losses.shape, dtype=torch.int32)
        for column, target in (("losses", losses), ("visual_tokens", tokens)):
            values = table[column].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            target[rows] = torch.tensor(values.reshape(len(rows), len(levels)))
        return cls(losses, tokens)

    def lookup(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(B, G) losses and (B, G) visual tokens of these rows."""
        index = torch.tensor(rows)
        return self.losses[index], self.visual_tokens[index]


def _metadata(model_digest: str, data_digest: str, levels: Sequence[int]) -> dict[str, str]:
    return {
        "schema version": SCHEMA_VERSION,
        "model": model_digest,
        "data": data_digest,
        "granularities": ",".join(map(str, levels)),
    }


def parts_of_rows(rows: Sequence[Row], part_size: int) -> list[list[int]]:
    """Row numbers in the order they are scored: rows about one image together, in parts of at least `part_size`."""
    groups = row_columns(rows).image_groups
    order = np.argsort(groups, kind="stable")
    parts: list[list[int]] = [[]]
    last = -1
    for index, group in zip(order.tolist(), groups[order].tolist(), strict=True):
        if len(parts[-1]) >= part_size and not (group == last >= 0):
            parts.append([])
        parts[-1].append(index)
        last = group
    return parts


class _ImagesSeen(dict[str, tuple[int, int]]):
    """Sizes of the images that a batch holds already; `RowReader` opens none of them again."""

    image_size = dict.__getitem__


class _BatchReader(Dataset[Batch]):
    """Batches by number, for a data loader whose workers read whole ones; an image is opened once in each."""

    def __init__(self, dataset: ConversationDataset, batches: Sequence[Sequence[int]], collator: Collator) -> None:
        self.dataset, self.batches, self.collator = dataset, batches, collator

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> Batch:
        seen, dataset = _ImagesSeen(), copy.copy(self.dataset)
        dataset.reader = replace(dataset.reader, cache=seen)
        items = []
        for row in self.batches[number]:
            items.append(dataset[row])
            seen.update(zip(items[-1]["image_keys"], items[-1]["image_sizes"], strict=True))
        return self.collator(items)


def batches_of_part(rows: Sequence[int], groups: Sequence[int], batch_size: int) -> list[list[int]]:
    """Rows about the same images in batches of their own of up to `ROWS_OF_AN_IMAGE`, the others in batches of `batch_size`.

    Args:
        groups: as in `RowColumns.image_groups`, of these rows; equal ones follow each other.
    """
    shared: list[list[int]] = []
    alone: list[int] = []
    for group, pairs in itertools.groupby(zip(groups, rows, strict=True), key=itemgetter(0)):
        members = [row for _, row in pairs]
        if group >= 0 and len(members) > 1:
            shared += [members[start : start + ROWS_OF_AN_IMAGE] for start in range(0, len(members), ROWS_OF_AN_IMAGE)]
        else:
            alone += members
    return shared + [alone[start : start + batch_size] for start in range(0, len(alone), batch_size)]


@torch.no_grad()
def score_part(
    model: Any, dataset: ConversationDataset, rows: Sequence[int], batch_size: int, collator: Collator, num_workers: int = 0
) -> pa.Table:
    """Score some rows; every image among them is encoded once, and what rows about it have in common is read once."""
    found: dict[int, tuple[Any, ...]] = {}
    device = next(model.parameters()).device
    cache = FeatureCache(limit_bytes=2**62)
    batches = batches_of_part(rows, row_columns(dataset.rows).image_groups[list(rows)].tolist(), batch_size)
    reader = _BatchReader(dataset, batches, collator)
    for batch in DataLoader(reader, batch_size=None, num_workers=min(num_workers, len(batches))):
        if cache.used_bytes > FEATURES_KEPT:  # rows about one image follow each other, so older features are not needed again
            cache = FeatureCache(limit_bytes=2**62)
        batch = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        losses, tokens = score_rows_of_one_image(model, batch, image_features(model, batch, cache))
        lines = zip(batch["rows"], batch["ids"], losses.float().cpu().tolist(), tokens.tolist(), strict=True)
        found.update((line[0], line) for line in lines)
    columns = zip(*(found[row] for row in rows), strict=True)
    return pa.table(dict(zip(SCHEMA.names, columns, strict=True)), schema=SCHEMA)


def score(args: ScoreArguments) -> Path:
    """Score every row of a data set and write one file.

    Parts are distributed over the processes of a run by `RANK` and `WORLD_SIZE`; the process that finishes last joins them. A file
    that already belongs to this model and these rows is left as it is.

    Returns:
        The file written.

    Raises:
        ValueError: a model with one granularity only; another process that writes the same scores; or existing scores that are
            damaged or belong to another model or other data.
        NoSpaceError: the disk is full; finished parts stay.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    output = Path(args.output_file)
    folder = output.with_name(output.name + ".parts")
    lock = output.with_name(f".{output.name}.rank-{rank}.lock")
    with keeping(lambda: _kept(folder)), held_alone(lock, f"the scores {output}" + f" as process {rank}" * (world_size > 1)):
        model, dataset, collator = _prepare(args)
        metadata = _metadata(model_fingerprint(model), data_fingerprint(dataset), granularities(model))
        if _is_done(output, metadata):
            logger.info("%s already holds these scores", output)
            return output
        parts = parts_of_rows(dataset.rows, args.part_rows)
        with room_for(folder):
            folder.mkdir(parents=True, exist_ok=True)
        files = [folder / f"part-{number:05d}-of-{len(parts):05d}.parquet" for number in range(len(parts))]
        own = [(file, rows) for file, rows in zip(files, parts, strict=True)][rank::world_size]
        for file, rows in tqdm(own, desc="scoring", unit="part"):
            if _is_done(file, metadata):
                continue
            if _is_done(output, metadata):  # another process has joined the parts
                break
            table = score_part(model, dataset, rows, args.batch_size, collator, args.num_workers)
            _write(table.replace_schema_metadata(metadata), file)
        with filelock.FileLock(output.with_name(f".{output.name}.lock")):
            _join(folder, files, metadata, output)
    return output


def _kept(folder: Path) -> str:
    """What an interrupted pass leaves behind, without a full stop."""
    count = len(list(folder.glob("part-*.parquet")))
    if not count:
        return "no part was finished"
    return f"{count} finished {'part is' if count == 1 else 'parts are'} kept in {folder}; the same command resumes from there"


def _prepare(args: ScoreArguments) -> tuple[Any, ConversationDataset, Collator]:
    device = args.device or pick_device()
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    tokenizer, model, _, _ = load_pretrained_model(
        args.model_name_or_path, None, None, device=device, dtype=getattr(torch, args.dtype)
    )
    levels = ModelArguments(args.model_name_or_path, vis_token_granularity=args.vis_token_granularity).granularities
    if levels is not None:
        model.config.vis_token_granularity = levels
    if len(model.levels) < 2:
        raise ValueError(f"{args.model_name_or_path} has one granularity, so there is nothing to rank; give --vis_token_granularity.")
    version = args.version or model.config.conv_version
    if version not in conv_templates:
        raise ValueError(f"--version is {version!r}; choose one of {', '.join(conv_templates)}.")
    model.config.tokenizer_model_max_length = model.config.tokenizer_model_max_length or model.config.context_length
    data_args = DataArguments(args.data_path, image_folder=args.image_folder, index_cache=args.index_cache)
    dataset = make_dataset(args.data_path, model, tokenizer, version, data_args)
    check_rows(dataset, "rows")
    return model, dataset, Collator(tokenizer.pad_token_id or 0)


def _is_done(file: Path, metadata: dict[str, str]) -> bool:
    """Whether a file exists and belongs to this model and these rows.

    Raises:
        ValueError: it is damaged, or belongs to others; neither is overwritten.
    """
    try:
        schema = pq.read_schema(file)
    except FileNotFoundError:
        return False
    except (pa.ArrowInvalid, OSError) as error:
        raise _damaged(file, error) from None
    different = _differences(schema, metadata)
    if different:
        raise ValueError(
            f"{file} holds scores for another {' and '.join(different)} than this run's; delete it, or choose another --output_file."
        )
    return True


def _differences(schema: pa.Schema, metadata: dict[str, str]) -> list[str]:
    stored = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
    return [name for name, value in metadata.items() if stored.get(name) != value]


def _read(file: Path) -> pa.Table:
    """Read a file of `_write`, checking its checksums.

    Raises:
        ValueError: it is damaged.
    """
    try:
        table = pq.read_table(file, page_checksum_verification=True)
        if not table.schema.equals(SCHEMA):
            raise pa.ArrowInvalid("other columns")
        return table
    except (pa.ArrowInvalid, OSError) as error:
        raise _damaged(file, error) from None


def _damaged(file: Path, error: Exception) -> Exception:
    """What to raise for an error of Arrow's while it reads a file; an error of the system, such as a lack of permission, is kept."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    return ValueError(f"{file} is damaged, or not a file of scores; delete it, then run python -m llava.train.score_granularities again.")


def _write(table: pa.Table, file: Path) -> None:
    with whole_file(file) as unfinished:
        pq.write_table(table, unfinished, write_page_checksum=True)


def _join(folder: Path, files: Sequence[Path], metadata: dict[str, str], output: Path) -> None:
    """Join the parts into one file, unless some are missing or another process was faster."""
    if not folder.is_dir():
        return
    missing = sum(not _is_done(file, metadata) for file in files)
    if missing:
        logger.info("%d of %d parts are still missing; the process that writes the last one joins them", missing, len(files))
        return
    table = pa.concat_tables([_read(file) for file in files]).sort_by("row")
    _write(table.replace_schema_metadata(metadata), output)
    shutil.rmtree(folder)
    logger.info("wrote the scores of %d rows to %s", table.num_rows, output)


def run(args: ScoreArguments) -> None:
    """Score what the flags name.

    Raises:
        SystemExit: flags, data or a checkpoint that cannot work, in one sentence.
    """
    setup_logging()
    try:
        score(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"scoring stopped: {sentence_of(error)}") from error
