"""Ids and labels of a conversation, built together, turn by turn.

Supervised is what the model would have to generate: the text by which the prompt with an answer is longer than the prompt that generation
starts from. Both come from the conversation template itself, so every template works, an answer may hold anything (a role tag, a
separator, `<unk>`), and no text is split again to recover the speakers. The published code does split, and drops all labels of rows where
its count is off.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
)
from llava.conversation import Conversation, SeparatorStyle, Span, spans_between, text_spans
from llava.messages import put_images_first
from llava.mm_utils import tokenize_spans

SPEAKERS = ("human", "gpt")
"""Values of `from` in LLaVA's data, in the order of a template's roles."""


@dataclass(frozen=True)
class Targets:
    """One row for the language model.

    Attributes:
        input_ids: token ids, `IMAGE_TOKEN_INDEX` where an image goes.
        labels: the id where it is supervised, `IGNORE_INDEX` elsewhere.
    """

    input_ids: list[int]
    labels: list[int]

    @property
    def num_supervised(self) -> int:
        """How many tokens are supervised."""
        return sum(label != IGNORE_INDEX for label in self.labels)

    @property
    def num_images(self) -> int:
        """How many images the row has."""
        return self.input_ids.count(IMAGE_TOKEN_INDEX)


@dataclass(frozen=True)
class Segment:
    """A part of the prompt that is either given to the model or supervised."""

    spans: tuple[Span, ...]
    supervised: bool

    @property
    def text(self) -> str:
        """The text as it is in the prompt."""
        return "".join(span.text for span in self.spans)


def place_images(
    turns: Sequence[dict[str, str]], num_images: int, version: str = "", use_start_end: bool = False
) -> list[dict[str, str]]:
    """Move the placeholders of a row to where training expects them.

    A single image goes in front of its turn, on a line of its own, as in LLaVA. So do several that follow the text together
    (`llava.messages.images_first`); otherwise they stay where they are.

    Args:
        turns: LLaVA's list of `{"from", "value"}`.
        num_images: images of the row.
        version: the template's `version`; those with "mmtag" wrap an image in `<Image>` tags.
        use_start_end: surround each placeholder with start and end tokens.

    Raises:
        ValueError: the numbers of placeholders and images differ, or a placeholder is in an answer.
    """
    placed = []
    for number, turn in enumerate(turns):
        text = turn["value"]
        if DEFAULT_IMAGE_TOKEN in text and turn.get("from") == SPEAKERS[1]:
            raise ValueError(f"turn {number} is an answer (gpt) with {DEFAULT_IMAGE_TOKEN} in it; images belong in questions, so move it.")
        if DEFAULT_IMAGE_TOKEN in text and num_images == 1:
            text = f"{DEFAULT_IMAGE_TOKEN}\n{text.replace(DEFAULT_IMAGE_TOKEN, '').strip()}".strip()
        placed.append({**turn, "value": put_images_first(text)})
    found = sum(turn["value"].count(DEFAULT_IMAGE_TOKEN) for turn in placed)
    if found != num_images:
        raise ValueError(
            f"the row has {num_images} images, but its turns have {found} {DEFAULT_IMAGE_TOKEN} placeholders; "
            "write one placeholder per image."
        )
    wrapped = DEFAULT_IMAGE_TOKEN
    if "mmtag" in version:
        wrapped = f"<Image>{wrapped}</Image>"
    if use_start_end:
        wrapped = wrapped.replace(DEFAULT_IMAGE_TOKEN, DEFAULT_IM_START_TOKEN + DEFAULT_IMAGE_TOKEN + DEFAULT_IM_END_TOKEN)
    return [{**turn, "value": turn["value"].replace(DEFAULT_IMAGE_TOKEN, wrapped)} for turn in placed]


def segments_of(turns: Sequence[dict[str, str]], template: Conversation) -> list[Segment]:
    """The prompt of a conversation as given and supervised segments, which joined are the prompt with all answers.

    An empty answer adds no segment. Answers before the first question are dropped, as in LLaVA.

    Args:
        turns: LLaVA's list of `{"from", "value"}`.
        template: a conversation template; its own example turns are not used.

    Raises:
        ValueError: an unknown speaker, speakers that do not alternate, or turns that do not fit the template.
    """
    exchange = _checked_turns(turns)
    if template.sep_style is SeparatorStyle.PLAIN:
        return _caption_segments(exchange, template)
    conversation = template.copy()
    conversation.messages = []
    segments: list[Segment] = []
    for index, (speaker, text) in enumerate(exchange):
        role = conversation.roles[SPEAKERS.index(speaker)]
        if speaker == "human":
            conversation.append_message(role, text)
            if index + 1 < len(exchange):
                continue
        else:
            conversation.append_message(role, None)
            _write(segments, conversation, supervised=False)
            conversation.messages[-1][1] = text
        _write(segments, conversation, supervised=speaker == "gpt")
    return segments


def build_targets(turns: Sequence[dict[str, str]], template: Conversation, tokenizer: Any) -> Targets:
    """Ids and labels of a conversation. The turns are plain text, whatever they spell (`llava.mm_utils.tokenize_spans`).

    Args:
        turns: LLaVA's list of `{"from", "value"}`, after `place_images`.
        template: conversation template.
        tokenizer: as loaded by `llava.tokenizer.load_tokenizer`.

    Raises:
        ValueError: see `segments_of`.
    """
    ids: list[int] = []
    labels: list[int] = []
    written: list[Span] = []
    for segment in segments_of(turns, template):
        written += segment.spans
        grown = tokenize_spans(written, tokenizer)
        # A tokenizer may merge the last piece of one segment with the first of the next; the token then belongs to the next.
        kept = _common_prefix(ids, grown)
        new = grown[kept:]
        supervised = [IGNORE_INDEX if token == IMAGE_TOKEN_INDEX or not segment.supervised else token for token in new]
        ids, labels = grown, labels[:kept] + supervised
    return Targets(ids, labels)


def _checked_turns(turns: Sequence[dict[str, str]]) -> list[tuple[str, str]]:
    exchange = []
    for turn in turns:
        speaker, text = turn.get("from"), turn.get("value")
        if speaker not in SPEAKERS or not isinstance(text, str):
            raise ValueError(
                f"a turn is {_shortened(turn)}; expected {{'from': 'human' or 'gpt', 'value': text}} in every turn."
            )
        exchange.append((speaker, text))
    if exchange and exchange[0][0] != "human":
        exchange = exchange[1:]
    for index, (speaker, _) in enumerate(exchange):
        if speaker != SPEAKERS[index % 2]:
            raise ValueError(
                f"turn {index} is from {speaker!r}, expected {SPEAKERS[index % 2]!r}; human and gpt must alternate."
            )
    if not exchange:
        raise ValueError("the conversation has no turn from human; write at least one question.")
    return exchange


def _caption_segments(exchange: Sequence[tuple[str, str]], template: Conversation) -> list[Segment]:
    """A caption after its image: under `plain` the text of the question is not used, as in LLaVA."""
    if len(exchange) != 2 or DEFAULT_IMAGE_TOKEN not in exchange[0][1]:
        raise ValueError(
            f"template plain takes one question with {DEFAULT_IMAGE_TOKEN} and one answer, but the row has "
            f"{len(exchange)} turns starting with {exchange[0][1][:40]!r}; choose another --version or drop the row."
        )
    placeholders = DEFAULT_IMAGE_TOKEN * exchange[0][1].count(DEFAULT_IMAGE_TOKEN)
    caption = (*text_spans(exchange[1][1]), Span(template.sep, is_text=False))
    return [Segment(tuple(text_spans(template.system + placeholders)), False), Segment(caption, True)]


def _write(segments: list[Segment], conversation: Conversation, supervised: bool) -> None:
    """Append to the segments what the conversation's prompt adds to them."""
    written, prompt = "".join(segment.text for segment in segments), conversation.get_prompt()
    assert prompt.startswith(written), f"the template rewrote its own beginning: {prompt!r} after {written!r}"
    if added := spans_between(conversation.get_spans(), len(written)):
        segments.append(Segment(tuple(added), supervised))


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    length = 0
    for left, right in zip(first, second, strict=False):
        if left != right:
            break
        length += 1
    return length


def _shortened(value: object, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."


def count_words(turns: Iterable[dict[str, str]]) -> int:
    """Words of a conversation: LLaVA's measure of a row's length, cheap because nothing is tokenized."""
    return sum(len(turn["value"].split()) for turn in turns)


def has_answer(turns: Sequence[dict[str, str]]) -> bool:
    """Whether `segments_of` finds anything to supervise: a non-empty turn from `gpt` after the first question."""
    speakers = [turn["from"] for turn in turns]
    first = speakers.index(SPEAKERS[0]) if SPEAKERS[0] in speakers else len(speakers)
    return any(turn["from"] == SPEAKERS[1] and turn["value"] for turn in turns[first:])
