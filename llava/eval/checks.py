"""Checks of an evaluation before its first question, so that a wrong flag is one error instead of a failure of every row."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from llava.conversation import get_template
from llava.flags import ENGINES
from llava.inference import Assistant, Options, Question
from llava.messages import RoutingRequest
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.model.routing import allowed_levels

TRIED = 100
"""After this many questions that the model cannot answer, and none that it can, the flags are at fault."""


def check_server(engine: str, address: str | None) -> None:
    """Check that an engine's name and a server's address go together, where a server is the only vLLM that can be asked.

    Raises:
        ValueError: they do not.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}, expected one of {', '.join(ENGINES)}.")
    if (engine == "vllm") != (address is not None):
        raise ValueError(
            f"engine is {engine} and vllm is {address!r}; the engine vllm needs the address of a server, as in http://localhost:8000, and "
            "the embedded one takes none."
        )


def check_routing(assistant: Assistant, request: RoutingRequest) -> None:
    """Check that a model has the granularities that it is to be evaluated at.

    A single request for 576 tokens per view gets the finest granularity of any model (see `RoutingRequest`); in a table of results a number
    must mean what it says.

    Raises:
        ValueError: a plain language model, a granularity that the model lacks, or whatever `allowed_levels` refuses.
    """
    if not isinstance(assistant.model, LlavaMetaForCausalLM):
        raise ValueError("The model is a plain language model; give --model-path a checkpoint that takes images.")
    levels = [level.tokens for level in assistant.model.levels]
    wanted = request.granularity
    if isinstance(wanted, int) and wanted not in levels:
        raise ValueError(
            f"The granularity is {wanted}, but this model has {levels} tokens per view; choose one of these, so that results carry "
            "the granularity they were measured at."
        )
    allowed_levels(levels, request, has_router=assistant.model.model.router is not None)


def check_questions(assistant: Assistant, questions: Iterable[tuple[Any, Callable[[], Question]]], options: Options) -> None:
    """Check that the model can answer one of the first questions; options that none of them can be answered with are wrong themselves.

    Usually the first question settles it. The model computes nothing.

    Args:
        questions: ids, and functions that open each question's images; one that cannot be opened is skipped.

    Raises:
        ValueError: none of the first `TRIED` can be answered, with the reason for the first.
    """
    refused: list[tuple[Any, ValueError]] = []
    for question_id, load in questions:
        try:
            question = load()
        except Exception:  # reported as this question's failure when it is its turn
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
    """Check that a question has a template, a granularity within its budget, and room in the model's context.

    Raises:
        ValueError: it has not; the message names the flag or field to change.
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
            "(max_position_embeddings in config.json); choose a coarser --granularity or a smaller --max-visual-tokens, or "
            "shorten the text."
        )
