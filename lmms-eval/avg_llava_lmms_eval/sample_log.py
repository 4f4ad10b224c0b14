"""A line of JSON per sample, written as the samples are answered: what the router saw fit to spend, and what it cost."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava.durable import append_whole, room_for
from llava.eval.journal import json_lines
from llava.model.routing import RoutingReport


def output_folder(argv: Sequence[str] | None = None) -> str | None:
    """The harness's `--output_path`, read from the command line: the harness does not tell it to a model."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--output_path")
    return parser.parse_known_args(sys.argv[1:] if argv is None else argv)[0].output_path


def routing_fields(reports: Sequence[RoutingReport]) -> dict[str, Any]:
    """What the log says about the images of one sample.

    Returns:
        granularity, logits and probabilities: one entry per image (`None` where no router was used); visual_tokens and
        full_visual_tokens: of all images together, as chosen and at the finest level.
    """
    return {
        "granularity": [report.granularity for report in reports],
        "visual_tokens": sum(report.num_visual_tokens for report in reports),
        "full_visual_tokens": sum(report.full_visual_tokens for report in reports),
        "logits": [None if report.logits is None else [round(x, 5) for x in report.logits.float().tolist()] for report in reports],
        "probabilities": [
            None if report.probabilities is None else [round(x, 5) for x in report.probabilities.float().tolist()] for report in reports
        ],
    }


class SampleLog:
    """Appends records to a file; without a folder it keeps none."""

    def __init__(self, folder: str | Path | None, name: str) -> None:
        """Make `folder/name`, so that a folder that cannot be written is an error before the first question.

        Raises:
            OSError: it cannot be written, or there is no room.
        """
        self.path = None if folder is None else Path(folder) / name
        if self.path is not None:
            with room_for(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
            self.write([])

    def write(self, records: Sequence[dict[str, Any]]) -> None:
        """Append records and hand them to the operating system, so that a run that is killed leaves them behind.

        Raises:
            NoSpaceError: there is no room; nothing of these records is written.
        """
        if self.path is not None:
            append_whole(self.path, json_lines(records, default=str))
