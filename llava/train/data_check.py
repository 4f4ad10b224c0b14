"""Read every row of a data set as training does, and report what is broken before a run does.

    python -m llava.train.dataset --check --model_name_or_path DIR --data_path rows.json --image_folder images --output report

The model's config and tokenizer are enough: no weights are read. Every row of every source is read once, whatever its weight.
Counts and the first findings are printed; `--output` writes everything to `report.json`, and histograms to `report.png`. The exit status
is not 0 if something is broken. Without `--check` the index is built and the rows are counted, nothing more.
"""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from llava.constants import IGNORE_INDEX
from llava.conversation import conv_templates
from llava.durable import whole_file, write_whole
from llava.images import ImageError
from llava.interrupts import sentence_of
from llava.log import setup_logging
from llava.model.native import AvgLlavaProcessor
from llava.train.build import change_fields, model_outline, read_model_config
from llava.train.data import ConversationDataset, make_dataset
from llava.train.flags import CheckArguments, DataArguments, ModelArguments
from llava.train.mixture import Mixture, Source, open_rows
from llava.train.rows import BadSampleError, RowTooLongError, UnreadKeyError, image_names, visual_token_costs
from llava.train.shards import MissingImageError

logger = logging.getLogger(__name__)

MISSING, BROKEN, TOO_LONG, BAD_ROW, NO_LABELS = "missing picture", "broken picture", "too long", "broken row", "no labels"
UNREAD = "unread key "
"""What can be wrong with a row, as `report.json` has it; a key's name follows the last. Training reads rows without labels; here they count
as broken above `--max_bad_share`."""

_NOUNS = {
    "rows in the file": ("row in the file", "rows in the file"),
    "rows per epoch": ("row per epoch", "rows per epoch"),
    "rows read": ("row read", "rows read"),
    "pictures": ("image", "images"),
    "text-only rows": ("text-only row", "text-only rows"),
    MISSING: ("missing image", "missing images"),
    BROKEN: ("broken image", "broken images"),
    TOO_LONG: ("row too long", "rows too long"),
    BAD_ROW: ("broken row", "broken rows"),
    NO_LABELS: ("row without labels", "rows without labels"),
}
"""A count of `report.json` -> what the terminal calls one and several of them."""

_KIND_OF_ERROR = ((MissingImageError, MISSING), (ImageError, BROKEN), (RowTooLongError, TOO_LONG))
_BATCH_ROWS = 16


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
    """What was found by reading a row.

    Attributes:
        length: tokens, text and visual together; `None` where the row could not be read so far.
        visual: visual tokens of all its images at every granularity, coarse to fine.
        images: how many it names.
    """

    source: str
    length: int | None
    visual: list[int]
    images: int
    finding: Finding | None


class RowInspector(Dataset[RowFacts]):
    """Reads rows and returns the facts alone, so that workers send no images.

    Args:
        dataset: the rows of a `Mixture`, as training reads them.
        model: an outline of the model, for what an image costs.
    """

    def __init__(self, dataset: ConversationDataset, model: Any) -> None:
        assert isinstance(dataset.rows, Mixture)
        self.rows = dataset.rows
        self.dataset = dataset
        self.model = model

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> RowFacts:
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
            message = f"{self.dataset.describe(index)}: no token of the row is supervised; give it a non-empty answer."
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
        rows: the mixture as given, with its weights.
        levels: tokens per view of every granularity, coarse to fine.
        max_length: length of the context in tokens.
    """

    def __init__(self, rows: Mixture, levels: Sequence[int], max_length: int) -> None:
        self.levels = list(levels)
        self.max_length = max_length
        self.findings: list[Finding] = []
        self.sources = {source.name: source_counts(source) for source in rows.sources}
        self._lengths: list[int] = []
        self._visual: list[list[int]] = []

    def add(self, facts: RowFacts) -> None:
        """Add the facts of one row."""
        counts = self.sources[facts.source]
        counts["rows read"] += 1
        counts["pictures"] += facts.images
        counts["text-only rows"] += not facts.images
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
        """Tokens per row, and visual tokens per row with images at every granularity."""
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
            lines.append(f"{name}: {_counted({key: counts[key] for key in self.totals})}")
        histograms = self.histograms()
        lines.append(f"tokens per row: {_summary(histograms['tokens per row'])}; the context is {self.max_length}")
        for level, histogram in histograms["visual tokens per row with pictures"].items():
            lines.append(f"visual tokens at granularity {level}: {_summary(histogram)}")
        lines += [f"{_noun(finding.kind)}: {finding.message}" for finding in self.findings[:show]]
        if len(self.findings) > show:
            lines.append(f"... and {len(self.findings) - show:,} more")
        return "\n".join(lines)


def check(check_args: CheckArguments, data_args: DataArguments) -> Report:
    """Read every row of a data set.

    Raises:
        ValueError: a path, flag or checkpoint that cannot work; a broken row is a finding and never raises.
    """
    if check_args.output is not None and find_spec("matplotlib") is None:
        raise ValueError('report.png needs matplotlib; pip install "avg-llava[train]", or leave --output out.')
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


def _prepare(check_args: CheckArguments, data_args: DataArguments) -> tuple[ConversationDataset, Any, Mixture]:
    path = check_args.model_name_or_path
    if path is None:
        raise ValueError("--check reads rows as a model does; give its folder as --model_name_or_path.")
    model = model_outline(read_model_config(path))
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
    tokenizer.model_max_length = sys.maxsize  # rows that are too long are findings of the check, not warnings of the tokenizer
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
    left.set(title="Length of rows", xlabel="tokens, with visual tokens at full granularity", ylabel="rows")
    for level, histogram in histograms["visual tokens per row with pictures"].items():
        _stairs(right, histogram, f"granularity {level}")
    right.set(title="Visual tokens of rows with images", xlabel="visual tokens", ylabel="rows")
    for panel in (left, right):
        panel.legend()
    figure.savefig(path, dpi=120, format="png")


def _stairs(panel: Any, histogram: dict[str, Any], label: str) -> None:
    if histogram["rows"]:
        panel.stairs(histogram["counts"], histogram["edges"], fill=True, alpha=0.5, label=label or None)


def _histogram(values: np.ndarray) -> dict[str, Any]:
    """Counts between integer edges, with summary statistics."""
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


def source_counts(source: Source) -> Counter[str]:
    """What is known of a source without reading its rows."""
    return Counter({"rows in the file": len(source.rows), "rows per epoch": len(source)})


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {_noun(key, count)}" for key, count in counts.items())


def _noun(key: str, count: int = 1) -> str:
    """What the terminal calls so many of a count of the report."""
    if key.startswith(UNREAD):
        return f"{'row' if count == 1 else 'rows'} with the unread key {key.removeprefix(UNREAD)!r}"
    return _NOUNS[key][count != 1]


def _summary(histogram: dict[str, Any]) -> str:
    if not histogram["rows"]:
        return "none"
    return ", ".join(f"{name} {histogram[name]:,}" for name in ("shortest", "median", "mean", "95 %", "longest"))


def run(check_args: CheckArguments, data_args: DataArguments) -> None:
    """Print the report, or count the rows.

    Raises:
        SystemExit: flags that cannot work, or rows that training would stop at, in one sentence.
    """
    setup_logging()
    try:
        if not check_args.check:
            for source in open_rows(data_args.data_path, data_args.index_cache).sources:
                print(f"{source.name}: {_counted(source_counts(source))}, sha256 {source.rows.sha256}")
            return
        report = check(check_args, data_args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"the check stopped: {sentence_of(error)}") from error
    print(report.text(check_args.show))
    if report.is_broken(data_args.max_bad_share):
        raise SystemExit(
            f"broken: {len(report.findings):,} findings; repair the data, or train with --on_bad_sample skip, which leaves such rows "
            f"out, and a --max_bad_share that allows for them (it is {data_args.max_bad_share})."
        )
    print("every row can be trained on" if not report.findings else "training can start")
