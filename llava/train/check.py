"""Read every row of a data set on the path that training takes, and say what is broken before a run finds out.

    python -m llava.train.dataset --check --model_name_or_path DIR --data_path rows.json --image_folder images --output report

The model's config and tokenizer are enough: no weights are read. Every row of every source is read once, whatever its weight.
Printed are counts and the first findings; `--output` takes everything as `report.json` and histograms as `report.png`. The exit
status is not 0 where something is broken. Without `--check` the index is built and the rows are counted, nothing more.
"""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import AutoConfig, HfArgumentParser

from llava.constants import IGNORE_INDEX
from llava.conversation import conv_templates
from llava.durable import whole_file, write_whole
from llava.images import ImageError
from llava.interrupts import run_program
from llava.log import setup_logging
from llava.model.builder import MODEL_CLASSES
from llava.model.processing import AvgLlavaProcessor
from llava.train.arguments import DataArguments, ModelArguments
from llava.train.dataset import BadSampleError, ConversationDataset, RowTooLongError, UnreadKeyError, image_names
from llava.train.mixture import Mixture, open_rows
from llava.train.shards import MissingPictureError

logger = logging.getLogger(__name__)

MISSING, BROKEN, TOO_LONG, BAD_ROW, NO_LABELS = "missing picture", "broken picture", "too long", "broken row", "no labels"
UNREAD = "unread key "
"""What can be wrong with a row; a key's name follows the last. Rows without labels are read by training; here they count as broken above
`--max_bad_share`."""

_KIND_OF_ERROR = ((MissingPictureError, MISSING), (ImageError, BROKEN), (RowTooLongError, TOO_LONG))
_BATCH_ROWS = 16


@dataclass
class CheckArguments:
    """Flags of the check, beside those of `DataArguments`."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Checkpoint whose config and tokenizer read the rows."})
    check: bool = field(default=False, metadata={"help": "Read every row; otherwise the index is built and rows are counted."})
    version: str | None = field(default=None, metadata={"help": "Conversation template; the checkpoint's by default."})
    vis_token_granularity: str | None = field(default=None, metadata={"help": "Levels; the checkpoint's by default."})
    model_max_length: int | None = field(default=None, metadata={"help": "Longest row; the checkpoint's by default."})
    output: str | None = field(default=None, metadata={"help": "Folder for report.json and report.png."})
    num_workers: int = field(default=0, metadata={"help": "Processes that read; 0 reads in this one."})
    show: int = field(default=10, metadata={"help": "Findings that are printed; the report holds all."})


@dataclass(frozen=True)
class Finding:
    """Something wrong with a row.

    Attributes:
        kind: what is wrong, `MISSING` to `NO_LABELS`, or `UNREAD` and a key.
        source: name of the row's source; `file` and `row`: the file and the row's number in it; `id`: the row's own.
        message: what is wrong, with the row named.
    """

    kind: str
    source: str
    file: str
    row: int
    id: str
    message: str


@dataclass(frozen=True)
class RowFacts:
    """What reading a row told.

    Attributes:
        length: tokens, text and visual together; `None` where the row could not be read so far.
        visual: visual tokens of its pictures together at every granularity, coarse to fine.
        pictures: how many it names.
    """

    source: str
    length: int | None
    visual: list[int]
    pictures: int
    finding: Finding | None


class RowInspector(Dataset[RowFacts]):
    """Reads rows and keeps the facts alone, so that workers send no pictures.

    Args:
        dataset: the rows of a `Mixture`, as training reads them.
        model: an outline of the model, for what a picture costs.
    """

    def __init__(self, dataset: ConversationDataset, model: Any) -> None:
        assert isinstance(dataset.rows, Mixture)
        self.rows = dataset.rows
        self.dataset = dataset
        self.model = model

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> RowFacts:
        from llava.train.train import visual_token_costs

        source = self.rows.locate(index)[0]
        try:
            item = self.dataset.read(index)
        except BadSampleError as error:
            cause = error.__cause__
            kind = next((kind for wanted, kind in _KIND_OF_ERROR if isinstance(cause, wanted)), BAD_ROW)
            if isinstance(cause, UnreadKeyError):
                kind = UNREAD + cause.key
            length = cause.length if isinstance(cause, RowTooLongError) else None
            return RowFacts(source.name, length, [], self._named(index), self._finding(index, kind, str(error)))
        costs = [visual_token_costs(self.model, size) for size in item["image_sizes"]]
        visual = [sum(level) for level in zip(*costs, strict=True)]
        length = len(item["input_ids"]) - len(costs) + (visual[-1] if visual else 0)
        finding = None
        if not (item["labels"] != IGNORE_INDEX).any():
            message = f"{self.dataset.describe(index)}: no token of the row is learnt; give an answer that is not empty."
            finding = self._finding(index, NO_LABELS, message)
        return RowFacts(source.name, length, visual, len(costs), finding)

    def _finding(self, index: int, kind: str, message: str) -> Finding:
        source, number = self.rows.locate(index)
        return Finding(kind, source.name, str(source.rows.source), number, self.dataset.row_id(index), message)

    def _named(self, index: int) -> int:
        try:
            return len(image_names(self.rows[index]))
        except (ValueError, AttributeError):
            return 0


class Report:
    """Facts of all rows, added up.

    Args:
        rows: the mixture as it was given, weights and all.
        levels: tokens per view of every granularity, coarse to fine.
        max_length: the context.
    """

    def __init__(self, rows: Mixture, levels: Sequence[int], max_length: int) -> None:
        self.levels = list(levels)
        self.max_length = max_length
        self.findings: list[Finding] = []
        self.sources: dict[str, Counter[str]] = {
            source.name: Counter({"rows in the file": len(source.rows), "rows per epoch": len(source)}) for source in rows.sources
        }
        self._lengths: list[int] = []
        self._visual: list[list[int]] = []

    def add(self, facts: RowFacts) -> None:
        """Take one row in."""
        counts = self.sources[facts.source]
        counts["rows read"] += 1
        counts["pictures"] += facts.pictures
        counts["text-only rows"] += not facts.pictures
        if facts.finding is not None:
            self.findings.append(facts.finding)
            counts[facts.finding.kind] += 1
        if facts.length is not None:
            self._lengths.append(facts.length)
        if facts.visual:
            self._visual.append(facts.visual)

    @property
    def totals(self) -> Counter[str]:
        """The counts of all sources together."""
        return sum(self.sources.values(), Counter())

    def is_broken(self, max_bad_share: float) -> bool:
        """Whether training would stop at a row, or more rows than this share have no labels."""
        totals = self.totals
        return len(self.findings) > totals[NO_LABELS] or totals[NO_LABELS] > max_bad_share * totals["rows read"]

    def histograms(self) -> dict[str, Any]:
        """Tokens per row, and visual tokens per row with pictures at every granularity."""
        visual = np.array(self._visual, dtype=np.int64).reshape(-1, len(self.levels))
        return {
            "tokens per row": _histogram(np.array(self._lengths, dtype=np.int64)),
            "visual tokens per row with pictures": {
                str(level): _histogram(column) for level, column in zip(self.levels, visual.T, strict=True)
            },
        }

    def as_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON."""
        return {
            "context": self.max_length,
            "granularities": self.levels,
            "totals": dict(self.totals),
            "sources": {name: dict(counts) for name, counts in self.sources.items()},
            "histograms": self.histograms(),
            "findings": [asdict(finding) for finding in self.findings],
        }

    def text(self, show: int) -> str:
        """The report for a terminal, with the first findings."""
        lines = []
        for name, counts in [*self.sources.items(), *([("all", self.totals)] if len(self.sources) > 1 else [])]:
            lines.append(f"{name}: " + ", ".join(f"{counts[key]:,} {key}" for key in self.totals))
        histograms = self.histograms()
        lines.append(f"tokens per row: {_summary(histograms['tokens per row'])}; the context is {self.max_length}")
        for level, histogram in histograms["visual tokens per row with pictures"].items():
            lines.append(f"visual tokens at granularity {level}: {_summary(histogram)}")
        lines += [f"{finding.kind}: {finding.message}" for finding in self.findings[:show]]
        if len(self.findings) > show:
            lines.append(f"... and {len(self.findings) - show:,} more")
        return "\n".join(lines)


def check(check_args: CheckArguments, data_args: DataArguments) -> Report:
    """Read every row of a data set.

    Raises:
        ValueError: a path, flag or checkpoint that cannot work; rows alone never raise.
    """
    if check_args.output is not None and find_spec("matplotlib") is None:
        raise ValueError('the picture of the report needs matplotlib; pip install "avg-llava[train]", or leave --output out.')
    dataset, model, rows = _prepare(check_args, data_args)
    report = Report(rows, [level.tokens for level in model.levels], model.config.tokenizer_model_max_length)
    loader: Iterable[list[RowFacts]] = DataLoader(
        RowInspector(dataset, model), batch_size=_BATCH_ROWS, num_workers=check_args.num_workers, collate_fn=list
    )
    with tqdm(total=len(dataset), desc="reading", unit="row", mininterval=0.5) as progress:
        for batch in loader:
            for facts in batch:
                report.add(facts)
            progress.update(len(batch))
    if check_args.output is not None:
        write_report(report, Path(check_args.output))
    return report


def model_outline(path: str) -> Any:
    """A checkpoint's model without weights, from its config alone.

    Raises:
        ValueError: not a checkpoint of this package.
    """
    try:
        config = AutoConfig.from_pretrained(path)
    except OSError as error:
        raise ValueError(f"no config can be read at {path!r}; give a checkpoint folder or a hub id that can be reached.") from error
    if config.model_type not in MODEL_CLASSES:
        raise ValueError(
            f"{path} is of model type {config.model_type!r}, expected one of {', '.join(MODEL_CLASSES)}: the rows are read as a model "
            "with a vision tower reads them, so name one of the same tokenizer and canvases."
        )
    model_class = MODEL_CLASSES[config.model_type]
    model_class._complete_tower(config, path)
    if config.vision_config is None:
        raise ValueError(f"{path} has no vision tower; give the checkpoint that training starts from or leads to.")
    with torch.device("meta"):
        return model_class(config)


def _prepare(check_args: CheckArguments, data_args: DataArguments) -> tuple[ConversationDataset, Any, Mixture]:
    from llava.train.build import change_fields
    from llava.train.train import make_dataset

    path = check_args.model_name_or_path
    if path is None:
        raise ValueError("--check reads rows as a model does; name its folder with --model_name_or_path.")
    model = model_outline(path)
    config = model.config
    levels = ModelArguments(path, vis_token_granularity=check_args.vis_token_granularity).granularities
    changes = {
        "vis_token_granularity": levels,
        "image_aspect_ratio": data_args.image_aspect_ratio,
        "image_grid_pinpoints": data_args.canvases,
        "tokenizer_model_max_length": check_args.model_max_length or config.tokenizer_model_max_length or config.context_length,
    }
    change_fields(config, path, {name: value for name, value in changes.items() if value not in (None, getattr(config, name))})
    version = check_args.version or config.conv_version
    if version not in conv_templates:
        raise ValueError(f"--version is {version!r}; choose one of {', '.join(conv_templates)}.")
    tokenizer = AvgLlavaProcessor.from_pretrained(path).tokenizer
    tokenizer.model_max_length = sys.maxsize  # a row that is too long is our finding, not the tokenizer's warning
    dataset = make_dataset(data_args.data_path, model, tokenizer, version, replace(data_args, lazy_preprocess=True))
    assert isinstance(dataset.rows, Mixture)
    rows = dataset.rows
    return ConversationDataset(rows.unweighted(), dataset.reader), model, rows


def write_report(report: Report, folder: Path) -> None:
    """Write `report.json` and `report.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "report.json", json.dumps(report.as_dict(), indent=1, ensure_ascii=False) + "\n")
    with whole_file(folder / "report.png") as draft:
        _draw(report, draft)
    logger.info("wrote %s", folder / "report.json")


def _draw(report: Report, path: Path) -> None:
    """Two histograms side by side: tokens per row with the context, and visual tokens at every granularity."""
    from matplotlib.figure import Figure

    histograms = report.histograms()
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _stairs(left, histograms["tokens per row"], "")
    left.axvline(report.max_length, color="black", linestyle="--", label=f"context {report.max_length}")
    left.set(title="Length of rows", xlabel="tokens, visual ones at full granularity included", ylabel="rows")
    for level, histogram in histograms["visual tokens per row with pictures"].items():
        _stairs(right, histogram, f"granularity {level}")
    right.set(title="Visual tokens of rows with pictures", xlabel="visual tokens", ylabel="rows")
    for panel in (left, right):
        panel.legend()
    figure.savefig(path, dpi=120, format="png")


def _stairs(panel: Any, histogram: dict[str, Any], label: str) -> None:
    if histogram["rows"]:
        panel.stairs(histogram["counts"], histogram["edges"], fill=True, alpha=0.5, label=label or None)


def _histogram(values: np.ndarray) -> dict[str, Any]:
    """Counts between whole-numbered edges, with what is asked for first."""
    if not len(values):
        return {"rows": 0, "edges": [], "counts": []}
    low, high = int(values.min()), int(values.max()) + 1
    edges = np.unique(np.linspace(low, high, 41).round().astype(int))
    counts, _ = np.histogram(values, bins=edges)
    return {
        "rows": len(values),
        "mean": round(float(values.mean()), 1),
        "shortest": low,
        "median": int(np.median(values)),
        "95 %": int(np.quantile(values, 0.95)),
        "longest": high - 1,
        "edges": edges.tolist(),
        "counts": counts.tolist(),
    }


def _summary(histogram: dict[str, Any]) -> str:
    if not histogram["rows"]:
        return "none"
    return ", ".join(f"{name} {histogram[name]:,}" for name in ("shortest", "median", "mean", "95 %", "longest"))


def main() -> None:
    """The command line: the report, and a status that says whether training can start."""
    raise SystemExit(run_program(_run))


def _run() -> None:
    parser = HfArgumentParser((CheckArguments, DataArguments))  # type: ignore[arg-type]
    check_args, data_args = parser.parse_args_into_dataclasses()
    setup_logging()
    try:
        if not check_args.check:
            for source in open_rows(data_args.data_path, data_args.index_cache).sources:
                print(f"{source.name}: {len(source.rows):,} rows in the file, {len(source):,} rows per epoch, sha256 {source.rows.sha256}")
            return
        report = check(check_args, data_args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"the check stopped: {error}") from error
    print(report.text(check_args.show))
    if report.is_broken(data_args.max_bad_share):
        raise SystemExit(
            f"broken: {len(report.findings):,} findings; repair the data, or leave such rows out with --on_bad_sample skip and a "
            f"--max_bad_share that allows for them (it is {data_args.max_bad_share})."
        )
    print("every row can be learnt from" if not report.findings else "training can start")


if __name__ == "__main__":
    main()
