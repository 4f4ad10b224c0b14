"""Where the answers stand in a prompt's ids: behind what opens one, up to and with what ends it.

The router reads the instruction. In training labels say what is an answer; where there are none (a loss computed outside the model, scores
for reinforcement learning, a conversation that goes on) the marks of the template do, so that the same prompt has the same granularity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llava.conversation import Conversation, SeparatorStyle
from llava.mm_utils import tokenize_spans

_TEXTS = ("a", "Is it 7?", "Two.\n", "(no)", "été", "B!")
"""They end and begin in many ways, so that the ids which prompts with them share are the template's alone."""


def answer_marks(tokenizer: Any, template: Conversation) -> tuple[list[int], list[int]]:
    """The ids that open an answer in the prompts of a template, and those that end it; empty for a template without roles."""
    if template.sep_style is SeparatorStyle.PLAIN:
        return [], []
    asked = [_ids(tokenizer, template, text, None) for text in _TEXTS]
    answered = [_ids(tokenizer, template, _TEXTS[0], text) for text in _TEXTS]
    return _common_end(asked), _common_end(answered)


def in_answers(ids: Tensor, start: Sequence[int], end: Sequence[int]) -> Tensor | None:
    """Which ids are an answer's, what ends it included.

    Args:
        ids: (L,). start, end: from `answer_marks`.

    Returns:
        (L,) bool, or `None` where no answer is opened.
    """
    tokens = ids.tolist()
    if (begin := _behind(tokens, start, 0)) is None:
        return None
    found = torch.zeros(len(tokens), dtype=torch.bool)
    while begin is not None:
        stop = _behind(tokens, end, begin)
        found[begin:stop] = True
        begin = None if stop is None else _behind(tokens, start, stop)
    return found.to(ids.device)


def _behind(tokens: Sequence[int], mark: Sequence[int], position: int) -> int | None:
    """The position behind the first mark that begins at one or later."""
    mark, width = list(mark), len(mark)
    if width == 0:
        return None
    return next((at + width for at in range(position, len(tokens) - width + 1) if tokens[at : at + width] == mark), None)


def _ids(tokenizer: Any, template: Conversation, question: str, answer: str | None) -> list[int]:
    conversation = template.copy()
    conversation.messages = [[conversation.roles[0], question], [conversation.roles[1], answer]]
    return tokenize_spans(conversation.get_spans(), tokenizer)


def _common_end(rows: Sequence[Sequence[int]]) -> list[int]:
    """The longest run of ids that all rows end with."""
    columns = zip(*(reversed(row) for row in rows), strict=False)
    shared: list[int] = []
    for column in columns:
        if len(set(column)) > 1:
            break
        shared.insert(0, column[0])
    return shared
