"""What an evaluation may ask of a model, checked before its first question, so that a wrong flag is no failure of every row."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from llava.conversation import get_template
from llava.inference import Assistant, Options, Question
from llava.messages import RoutingRequest
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.model.routing import allowed_levels

TRIED = 100
"""So many questions that cannot be asked, and none that can, are no accident."""


def check_routing(assistant: Assistant, request: RoutingRequest) -> None:
    """See that a model has the granularities that it is to be measured at.

    A single answer may be asked for 576 tokens per view of any model and takes its finest (see `RoutingRequest`); a number that stands in
    a table of results may not mean another one.

    Raises:
        ValueError: a plain language model, a granularity that the model lacks, or whatever `allowed_levels` refuses.
    """
    if not isinstance(assistant.model, LlavaMetaForCausalLM):
        raise ValueError("The model is a plain language model; give --model-path a checkpoint that takes images.")
    levels = [level.tokens for level in assistant.model.levels]
    wanted = request.granularity
    if isinstance(wanted, int) and wanted not in levels:
        raise ValueError(
            f"The granularity is {wanted}, but this model has {levels} tokens per view; an evaluation asks for one of these, so that its "
            "result is not taken for another's."
        )
    allowed_levels(levels, request, has_router=assistant.model.model.router is not None)


def check_questions(assistant: Assistant, questions: Iterable[tuple[Any, Callable[[], Question]]], options: Options) -> None:
    """See that the model can be asked one of the first questions; what none of them can be asked with is no question's own fault.

    Usually the very first one tells, and nothing is computed by the model.

    Args:
        questions: ids, and what opens each one's images; one that cannot be opened tells nothing about the model.

    Raises:
        ValueError: none of the first `TRIED` can be asked, with what is in the way of the first.
    """
    refused: list[tuple[Any, ValueError]] = []
    for question_id, load in questions:
        try:
            question = load()
        except Exception:  # counted as this question's failure when it is asked
            continue
        try:
            check_question(assistant, question, options)
        except ValueError as error:
            refused.append((question_id, error))
        else:
            return
        if len(refused) == TRIED:
            break
    if refused:
        question_id, reason = refused[0]
        raise ValueError(f"The model can answer none of the first {len(refused)} questions with these options; {question_id!r}: {reason}")


def check_question(assistant: Assistant, question: Question, options: Options) -> None:
    """See that a question has a template, granularities within its budget, and room in the model's context.

    Raises:
        ValueError: it has not; the sentence names the flag or field to change.
    """
    model, images = assistant.model, question.images
    if images and assistant.image_processor is None:
        raise ValueError("the model has no vision tower (mm_vision_tower in config.json); give --model-path one that takes images.")
    try:
        get_template(options.conv_mode or model.config.conv_version)
    except ValueError as error:
        raise ValueError(f"{error} (conv_version in config.json, unless --conv-mode is given).") from error
    row = assistant.prompt_row(question.messages, len(images), options.conv_mode)
    plan = model.plan([row], [assistant.image_input(image) for image in images], options.routing)
    cheapest = sum(fewest for fewest, _ in plan.cost_ranges(0))
    positions, context = row.num_text_tokens + cheapest, model.config.context_length
    if positions >= context:
        raise ValueError(
            f"its prompt takes {positions} positions, {cheapest} of them visual tokens, but the context has {context} "
            "(max_position_embeddings in config.json); choose a coarser --vis-token-granularity or a smaller --max-visual-tokens, or "
            "shorten the text."
        )
