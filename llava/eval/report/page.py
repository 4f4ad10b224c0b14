"""The report as one HTML file that needs no other file: style, plots and images are inside, and there is no script.

Its layout is in `templates/`. All texts that come from questions, models or files are escaped by the template engine.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from llava.eval.report.measure import PARTS
from llava.eval.report.plots import scatter
from llava.eval.report.tables import baseline_table, family_table, policy_table
from llava.eval.report.texts import baseline_text, row_of

IMAGE_WIDTH = 760
PLOT_SIZES = {"wide": (560, 460), "narrow": (360, 440)}
"""Width and height of the plot on a wide and on a narrow screen, of which the style shows one."""


def write_page(report: Mapping[str, Any], images: Sequence[Image.Image]) -> str:
    """The page of a report.

    Args:
        report: what is written to report.json. images: one per entry of its `examples`.
    """
    rows, finest = report["rows"], len(report["granularities"]) - 1
    engine = Environment(
        loader=PackageLoader("llava.eval.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return engine.get_template("page.html").render(
        report=report,
        plots={name: scatter(rows, *size) for name, size in PLOT_SIZES.items()},
        adaptive=row_of(rows, "adaptive"),
        levels=[{"tokens": tokens, "share": 100 * place / max(finest, 1)} for place, tokens in enumerate(report["granularities"])],
        timed=[row for row in rows if row["cost"] is not None],
        parts=PARTS,
        policies=policy_table(report, against_finest=True),
        families=family_table(report),
        baseline=None if report.get("baseline") is None else (baseline_text(report), baseline_table(report)),
        examples=[(example, *_embedded(image)) for example, image in zip(report["examples"], images, strict=True)],
    )


def _embedded(image: Image.Image) -> tuple[str, int, int]:
    """An image as a data URL, at the width it has on a sharp screen, and its size in pixels."""
    size = IMAGE_WIDTH, round(image.height * IMAGE_WIDTH / image.width)
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=82, subsampling=0, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii"), *size
