"""What a model is asked (turns, routing, options), and how turns, as people send them, become a prompt. Nothing here needs torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Literal

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER
from llava.conversation import Conversation, Span, get_template, spans_between

ROLES = ("system", "user", "assistant")
Detail = Literal["low", "high"]
"""Of an image, by the names of OpenAI's API."""


@dataclass(frozen=True)
class Message:
    """One turn: `role` is one of `ROLES`. `<image>` in a user's text marks where an image goes."""

    role: str
    text: str


@dataclass(frozen=True)
class RoutingRequest:
    """What a caller asks of one call.

    granularity: `None` lets the router choose (full granularity where the model has none), a number fixes the tokens per view (any
        number above the finest level means the finest: scripts ask every LLaVA for 576), a list limits the choice.
    max_visual_tokens: a budget for all images of one prompt together.
    bias: added to the router's logits per log2 of an image's tokens over its coarsest level's; negative is cheaper.
    details: one per image of the prompt, or none at all. Within what `granularity` leaves open, `low` takes the coarsest level and `high`
        the finest, or where a budget is given the finest that it has room for; `None` is the router's choice.
    """

    granularity: int | Sequence[int] | None = None
    max_visual_tokens: int | None = None
    bias: float = 0.0
    details: tuple[Detail | None, ...] = ()

    def detail_of(self, image: int) -> Detail | None:
        """The detail of one of the prompt's images."""
        return self.details[image] if self.details else None


@dataclass(frozen=True)
class Options:
    """How to answer.

    conv_mode: the conversation template; `None` takes the checkpoint's.
    temperature: 0 is greedy. top_p, num_beams, max_new_tokens, min_new_tokens: transformers' own.
    seed: makes sampling repeatable.
    stop: texts that end the answer, besides the template's separator.
    routing: granularity, budget and bias, see `RoutingRequest`.
    """

    conv_mode: str | None = None
    temperature: float = 0.0
    top_p: float | None = None
    num_beams: int = 1
    max_new_tokens: int = 512
    min_new_tokens: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    routing: RoutingRequest = field(default_factory=RoutingRequest)

    def __post_init__(self) -> None:
        errors = []
        if self.temperature < 0:
            errors.append(f"temperature is {self.temperature}, expected 0 (greedy) or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            errors.append(f"top_p is {self.top_p}, expected a share above 0 and up to 1")
        if self.num_beams < 1:
            errors.append(f"num_beams is {self.num_beams}, expected 1 or more")
        if self.max_new_tokens < 1:
            errors.append(f"max_new_tokens is {self.max_new_tokens}, expected 1 or more")
        if not 0 <= self.min_new_tokens <= max(0, self.max_new_tokens):
            errors.append(f"min_new_tokens is {self.min_new_tokens}, expected 0 to max_new_tokens, {self.max_new_tokens}")
        if self.num_beams > 1 and self.temperature > 0:
            errors.append(f"num_beams {self.num_beams} and temperature {self.temperature} exclude each other; set one back")
        if errors:
            raise ValueError("The options cannot work: " + "; ".join(errors) + ".")


def images_first(parts: Sequence[str]) -> list[str]:
    """The parts of a turn, its images in front where they all follow its text together.

    The models were trained with a turn's images in front of its text, and transformers' LLaVA templates write them there, while most
    clients send the text first. Text between images, or on both sides of them, says something by its place and keeps it.

    Args:
        parts: texts, `<image>` for an image. Beside images, parts of white space alone are left out.
    """
    if DEFAULT_IMAGE_TOKEN not in parts:
        return list(parts)
    filled = [part for part in parts if part.strip()]
    num_texts = len(filled)
    while num_texts and filled[num_texts - 1] == DEFAULT_IMAGE_TOKEN:
        num_texts -= 1
    texts, images = filled[:num_texts], filled[num_texts:]
    return filled if any(DEFAULT_IMAGE_TOKEN in part for part in texts) else images + texts


def text_of_parts(parts: Sequence[str]) -> str:
    """A turn's text from its parts, one a line, ordered by `images_first`."""
    return "\n".join(images_first(parts))


def put_images_first(text: str) -> str:
    """A turn's text, ordered by `images_first`: images that move stand on lines of their own, where none moves nothing changes."""
    parts = [part for part in re.split(f"({DEFAULT_IMAGE_TOKEN})", text) if part.strip()]
    moved = images_first(parts)
    return text if moved == parts else "\n".join(part.strip() for part in moved)


def normalise_turns(messages: Sequence[Message], num_images: int) -> list[Message]:
    """A conversation as every template can write it: at most one system turn, in front, then users and assistants in alternation.

    Whoever keeps a conversation sends more than that, and all of it is answered:

    - Turns without text and image are left out: an empty system field, an answer that was stopped before its first word.
    - Turns of one role in a row become one, a line each.
    - A system turn behind the first others is written as the user's: the templates have one place for a system text, in front.
    - An assistant may speak first (a stored greeting) and last (answered with a further turn).
    - The images of a turn stand as in `images_first`.

    Args:
        messages: turns; `<image>` (or `<image-placeholder>`) marks an image's place. Where no turn has one, the first turn of the user's
            with text begins with all of them.
        num_images: how many images there are.

    Returns:
        The turns; what is normalised already stays as it is.

    Raises:
        ValueError: nothing from the user, a last turn of the user's without anything, an unknown role, or placeholders unlike images.
    """
    turns = [replace(turn, text=turn.text.replace(IMAGE_PLACEHOLDER, DEFAULT_IMAGE_TOKEN)) for turn in messages]
    _check_roles(turns)
    turns = [replace(turn, text=put_images_first(turn.text)) for turn in _with_places(turns, num_images)]
    _check_question(turns)
    spoken = [turn for turn in turns if turn.text.strip()]
    num_system = next(index for index, turn in enumerate(spoken) if turn.role != "system")
    rest = [replace(turn, role="user") if turn.role == "system" else turn for turn in spoken[num_system:]]
    return [_joined(role, group) for part in (spoken[:num_system], rest) for role, group in _runs(part)]


def _runs(turns: Sequence[Message]) -> list[tuple[str, list[str]]]:
    """Roles in alternation, each with the texts of its turns in a row."""
    return [(role, [turn.text for turn in run]) for role, run in groupby(turns, key=lambda turn: turn.role)]


def _joined(role: str, texts: Sequence[str]) -> Message:
    return Message(role, texts[0] if len(texts) == 1 else put_images_first("\n".join(texts)))


def _with_places(turns: Sequence[Message], num_images: int) -> list[Message]:
    """The turns with as many placeholders as images."""
    written = sum(turn.text.count(DEFAULT_IMAGE_TOKEN) for turn in turns)
    users = [index for index, turn in enumerate(turns) if turn.role == "user"]
    if written == 0 and num_images and users:
        first = next((index for index in users if turns[index].text.strip()), users[0])
        marked = replace(turns[first], text=(DEFAULT_IMAGE_TOKEN + "\n") * num_images + turns[first].text)
        return [marked if index == first else turn for index, turn in enumerate(turns)]
    if written != num_images and users:
        raise ValueError(
            f"The text holds {written} <image> placeholders, but {num_images} images were given; make them agree or leave them out."
        )
    return list(turns)


def _check_roles(turns: Sequence[Message]) -> None:
    for index, turn in enumerate(turns):
        if turn.role not in ROLES:
            raise ValueError(f"Turn {index} has the role {turn.role!r}, expected one of {', '.join(ROLES)}.")
        if turn.role == "system" and DEFAULT_IMAGE_TOKEN in turn.text:
            raise ValueError("The system turn holds an <image> placeholder; put images into the user's turns.")


def _check_question(turns: Sequence[Message]) -> None:
    """Whether there is something to answer."""
    users = [index for index, turn in enumerate(turns) if turn.role == "user"]
    if not users:
        raise ValueError("There is no turn of the user's; give a question.")
    filled = [index for index, turn in enumerate(turns) if turn.text.strip()]
    last_answer = max((index for index in filled if turns[index].role == "assistant"), default=-1)
    asked_in_vain = users[-1] > last_answer and not any(index > last_answer for index in filled)
    if asked_in_vain or not set(users) & set(filled):
        raise ValueError(f"Turn {users[-1]} is empty; give a question.")


def fill_template(messages: Sequence[Message], num_images: int, template: str, use_start_end: bool = False) -> Conversation:
    """A conversation template with turns in it; arguments and errors as in `prompt_spans`."""
    conversation = get_template(template)
    for turn in normalise_turns(messages, num_images):
        if turn.role == "system":
            conversation.set_system_message(turn.text)
            continue
        text = turn.text
        if use_start_end:
            text = text.replace(DEFAULT_IMAGE_TOKEN, DEFAULT_IM_START_TOKEN + DEFAULT_IMAGE_TOKEN + DEFAULT_IM_END_TOKEN)
        conversation.append_message(conversation.roles[turn.role == "assistant"], text)
    return conversation


def write_prompt(
    messages: Sequence[Message], num_images: int, template: str, use_start_end: bool = False, answer: str | None = None
) -> str:
    """The text of `prompt_spans`, with the same arguments and errors."""
    return "".join(span.text for span in prompt_spans(messages, num_images, template, use_start_end, answer))


def prompt_spans(
    messages: Sequence[Message], num_images: int, template: str, use_start_end: bool = False, answer: str | None = None
) -> list[Span]:
    """The prompt of a conversation, open for the next answer, or with the beginning of one.

    Args:
        messages: turns, as `normalise_turns` takes them; a system turn in front replaces the template's own text.
        num_images: how many images there are.
        template: a name from `conv_templates`.
        use_start_end: wrap each placeholder in LLaVA's start and end tokens.
        answer: the text that the answer begins with; the prompt ends right after it.

    Raises:
        ValueError: nothing to answer, or placeholders unlike images.
    """
    conversation = fill_template(messages, num_images, template, use_start_end)
    opened = conversation.copy()
    opened.append_message(conversation.roles[1], None)
    if answer is None:
        return opened.get_spans()
    conversation.append_message(conversation.roles[1], answer)
    # The answer's place is found from where the open prompt ends: its text may occur again in the template's own end mark.
    start = conversation.get_prompt().index(answer, len(opened.get_prompt().rstrip()))
    return spans_between(conversation.get_spans(), 0, start + len(answer))
