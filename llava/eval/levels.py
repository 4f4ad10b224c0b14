"""What an evaluation may ask of a model's granularities, checked before its first question."""

from __future__ import annotations

from llava.inference import Assistant
from llava.model.routing import RoutingRequest, allowed_levels


def check_routing(assistant: Assistant, request: RoutingRequest) -> None:
    """See that a model has the granularities that it is to be measured at.

    A single answer may be asked for 576 tokens per view of any model and takes its finest (see `RoutingRequest`); a number that stands in
    a table of results may not mean another one.

    Raises:
        ValueError: a granularity that the model lacks, or whatever `allowed_levels` refuses.
    """
    levels = [level.tokens for level in assistant.model.levels]
    wanted = request.granularity
    if isinstance(wanted, int) and wanted not in levels:
        raise ValueError(
            f"The granularity is {wanted}, but this model has {levels} tokens per view; an evaluation asks for one of these, so that its "
            "result is not taken for another's."
        )
    allowed_levels(levels, request, has_router=assistant.model.model.router is not None)
