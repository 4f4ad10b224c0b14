"""How an answer's cost came about, as a table."""

from __future__ import annotations

from torch import Tensor

from llava.inference import Answer
from llava.model.routing import RoutingReport


def explain(answer: Answer) -> str:
    """A table of how the answer's cost came about: logits and tokens at each granularity, milliseconds per part."""
    lines = []
    for index, report in enumerate(answer.reports):
        name = f"image {index + 1}: " if len(answer.reports) > 1 else ""
        saved = 100 * (1 - report.num_visual_tokens / report.full_visual_tokens)
        lines.append(
            f"{name}granularity {report.granularity}, {report.num_visual_tokens} visual tokens of {report.full_visual_tokens} "
            f"({saved:.0f} % saved)"
        )
        lines.append(f"  {'tokens per view':>15}  {'visual tokens':>13}  {'logit':>7}  {'probability':>11}")
        for (granularity, tokens), logit, probability in zip(
            report.tokens_per_level.items(), _column(report, report.logits), _column(report, report.probabilities), strict=True
        ):
            mark = "  <- chosen" if granularity == report.granularity else ""
            lines.append(f"  {granularity:>15}  {tokens:>13}  {logit:>7}  {probability:>11}{mark}")
    parts = "  ".join(f"{part} {value:.1f}" for part, value in answer.milliseconds.items())
    lines.append(f"milliseconds: {parts}")
    lines.append(f"prompt positions {answer.prompt_tokens}, new tokens {len(answer.token_ids)}, finished by {answer.finish_reason}")
    return "\n".join(lines)


def _column(report: RoutingReport, values: Tensor | None) -> list[str]:
    """A value per level, or dashes where no router was asked."""
    return ["-"] * len(report.tokens_per_level) if values is None else [f"{value:.3f}" for value in values.tolist()]
