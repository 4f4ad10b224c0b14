"""Conversation templates as data, and the one class that turns a conversation into a prompt.

The texts, separators and role names are those the published checkpoints were trained with; a changed character changes
the model's input.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import html
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN

if TYPE_CHECKING:
    from PIL import Image

ImageMessage: TypeAlias = "tuple[str, Image.Image | None, str]"
"""A message with an image: text, image, and how `get_images` prepares it (Pad, Default, Crop or Resize)."""
TurnContent: TypeAlias = "str | ImageMessage | None"
"""What one turn holds; None or an empty text leaves the turn open for the model to fill."""

_Fields: TypeAlias = "dict[str, Any]"  # named here because `Conversation.dict` hides the builtin inside the class

_IMAGE_MARK = re.compile(
    f"({DEFAULT_IM_START_TOKEN}(?={DEFAULT_IMAGE_TOKEN})|{DEFAULT_IMAGE_TOKEN}|(?<={DEFAULT_IMAGE_TOKEN}){DEFAULT_IM_END_TOKEN})"
)
"""An image's place, and the tokens that some models have around it."""


class Span(NamedTuple):
    """A stretch of a prompt.

    Attributes:
        text: of the prompt, as long as it is.
        is_text: whether it is somebody's text. The rest is the template's markup, which alone may hold special tokens.
    """

    text: str
    is_text: bool


class SeparatorStyle(enum.Enum):
    """How roles, messages and separators are strung together; one `Conversation._spans_*` method each."""

    SINGLE = enum.auto()
    """`role: message` and one separator after every turn."""
    TWO = enum.auto()
    """`role: message` and two separators that take turns, the second one after an answer."""
    MPT = enum.auto()
    """Role and message without a colon, one separator after every turn."""
    PLAIN = enum.auto()
    """Messages only, no roles: captions for the alignment stage."""
    LLAMA_2 = enum.auto()
    """Instructions in `[INST]` brackets, the system text inside the first."""


@dataclasses.dataclass
class Conversation:
    """A system text, two roles, the turns so far, and the rule that makes one prompt of them.

    A turn is a two-item list `[role, message]`; see `TurnContent` for what a message can be.
    """

    system: str
    roles: tuple[str, str]
    messages: list[list[Any]]
    offset: int
    """Number of leading turns that are examples of the template and not the user's."""
    sep_style: SeparatorStyle = SeparatorStyle.SINGLE
    sep: str = "###"
    sep2: str | None = None
    version: str = "Unknown"
    """Name of the training format that this template belongs to."""
    skip_next: bool = False
    image_turn: bool = False
    """Give the image of the first turn an exchange of its own, `<Image><image></Image>` answered by `Received.`"""
    system_head: str = ""
    """The markup in front of the system text, inside `system`."""

    def set_system_message(self, text: str) -> None:
        """Replace the system text, keeping the template's markup around it."""
        self.system = self.system_head + text

    def append_message(self, role: str, message: TurnContent) -> None:
        """Add one turn; a `message` of None leaves it open for the model."""
        self.messages.append([role, message])

    def copy(self) -> Conversation:
        """Return a conversation whose list of turns can grow without touching this one."""
        return dataclasses.replace(self, messages=[list(turn) for turn in self.messages])

    def get_prompt(self) -> str:
        """Return the text that the tokenizer sees, with `<image>` where the first turn's image goes.

        Raises:
            ValueError: the turns do not fit the template (an answer under `plain`, an empty first question under `[INST]`).
        """
        return "".join(span.text for span in self.get_spans())

    def get_spans(self) -> list[Span]:
        """Return the prompt as the template's markup and the texts that it was filled with; errors as in `get_prompt`."""
        turns = [(role, _text_of(message)) for role, message in self._turns_with_image_token()]
        build = {
            SeparatorStyle.SINGLE: self._spans_single,
            SeparatorStyle.TWO: self._spans_two,
            SeparatorStyle.MPT: self._spans_mpt,
            SeparatorStyle.PLAIN: self._spans_plain,
            SeparatorStyle.LLAMA_2: self._spans_llama_2,
        }[self.sep_style]
        return [span for span in build(turns) if span.text]

    def _turns_with_image_token(self) -> list[list[Any]]:
        """Return the turns, the first one's image announced by one `<image>` in front of its text."""
        if not self.messages or not isinstance(self.messages[0][1], tuple):
            return self.messages
        role, message = self.messages[0]
        text = message[0].replace(DEFAULT_IMAGE_TOKEN, "").strip()
        if not self.image_turn:
            return [[role, f"{DEFAULT_IMAGE_TOKEN}\n{text}"], *self.messages[1:]]
        announcement = [[self.roles[0], f"<Image>{DEFAULT_IMAGE_TOKEN}</Image>"], [self.roles[1], "Received."]]
        return [*announcement, [role, text], *self.messages[1:]]

    def _separators(self) -> tuple[str, str]:
        if self.sep2 is None:
            raise ValueError(
                f"template version {self.version!r} has no second separator (sep2 is None) to end an answer with: "
                "use it for one open turn, or set sep2"
            )
        return self.sep, self.sep2

    def _spans_single(self, turns: list[tuple[str, str]]) -> Iterator[Span]:
        return self._spans_of_roles(turns, ":", (self.sep, self.sep))

    def _spans_two(self, turns: list[tuple[str, str]]) -> Iterator[Span]:
        return self._spans_of_roles(turns, ":", self._separators())

    def _spans_mpt(self, turns: list[tuple[str, str]]) -> Iterator[Span]:
        return self._spans_of_roles(turns, "", (self.sep, self.sep))

    def _spans_of_roles(self, turns: list[tuple[str, str]], colon: str, separators: tuple[str, str]) -> Iterator[Span]:
        """Every turn after its role's name; the second separator ends what the second role says."""
        yield from self._system_spans()
        yield _markup(separators[0])
        for role, text in turns:
            yield _markup(role + colon + (" " if colon and text else ""))
            if text:
                yield from text_spans(text)
                yield _markup(separators[role == self.roles[1]])

    def _spans_plain(self, turns: list[tuple[str, str]]) -> Iterator[Span]:
        yield from self._system_spans()
        for i, (_, text) in enumerate(turns):
            if text:
                yield from text_spans(text)
                yield _markup(self._separators()[1] if i % 2 else self.sep)

    def _spans_llama_2(self, turns: list[tuple[str, str]]) -> Iterator[Span]:
        """Questions in brackets; an answer that follows no question gets empty brackets, because the model answers to brackets."""
        if turns and turns[0][0] == self.roles[0] and not turns[0][1]:
            raise ValueError(
                f"the first turn is {turns[0]!r}, but an [INST] template starts with a text of {self.roles[0]!r}: "
                "append the user's question first"
            )
        system = [_markup("<<SYS>>\n"), *self._system_spans(), _markup("\n<</SYS>>\n\n")] if self.system else []
        begun = asked = False
        for role, text in turns:
            is_question = role != self.roles[1]
            if text if is_question else not asked:
                yield _markup(f"{self.sep if begun else ''}[INST] ")  # the tokenizer writes the first bos itself
                yield from [] if begun else system
                yield from text_spans(text if is_question else "")
                yield _markup(" [/INST]")
                begun = asked = True
            if text and not is_question:
                yield from (_markup(" "), *text_spans(text), _markup(f" {self._separators()[1]}"))
                asked = False

    def _system_spans(self) -> tuple[Span, ...]:
        """The system text behind its markup; it may be a caller's text (`set_system_message`)."""
        head = self.system_head if self.system.startswith(self.system_head) else ""
        return _markup(head), *text_spans(self.system[len(head) :])

    def get_images(self, return_pil: bool = False) -> list[Any]:
        """Return the images of the user's turns in order, prepared as each message asks.

        Args:
            return_pil: give PIL images; otherwise base64 texts of PNG files, as the worker takes them.
        """
        from llava.conversation_images import process_image, to_base64  # and Pillow, which prompts do without

        images = [
            process_image(message[1], message[2])
            for role, message in self.messages[self.offset :]
            if role == self.roles[0] and isinstance(message, tuple) and message[1] is not None
        ]
        return images if return_pil else [to_base64(image, "PNG") for image in images]

    def to_gradio_chatbot(self) -> list[_Fields]:
        """Return the turns after the template's examples as Gradio's list of `{"role", "content"}` messages.

        An image comes before its text as an `<img>` element with its own data; an open turn is left out.
        """
        from llava.conversation_images import process_image, to_base64

        shown = []
        for i, (_, message) in enumerate(self.messages[self.offset :]):
            content = _text_of(message).replace(DEFAULT_IMAGE_TOKEN, "").strip() if i % 2 == 0 else _text_of(message)
            if isinstance(message, tuple) and message[1] is not None:
                data = to_base64(process_image(message[1], "Default"), "JPEG")
                content = f'<img src="data:image/jpeg;base64,{data}" alt="{html.escape(content)}">\n{content}'
            if content:
                shown.append({"role": "assistant" if i % 2 else "user", "content": content})
        return shown

    def dict(self) -> _Fields:
        """Return what LLaVA's services log of a conversation; images are left out."""
        return {
            "system": self.system,
            "roles": self.roles,
            "messages": [[role, _text_of(m) if isinstance(m, tuple) else m] for role, m in self.messages],
            "offset": self.offset,
            "sep": self.sep,
            "sep2": self.sep2,
        }


def _markup(text: str) -> Span:
    return Span(text, is_text=False)


def text_spans(text: str) -> list[Span]:
    """Somebody's text as spans of text and, where images go, of markup."""
    return [Span(piece, is_text=index % 2 == 0) for index, piece in enumerate(_IMAGE_MARK.split(text)) if piece]


def spans_between(spans: Sequence[Span], start: int, end: int | None = None) -> list[Span]:
    """The spans of the characters `start` to `end` of a prompt."""
    cut, position = [], 0
    for span in spans:
        text = span.text[max(start - position, 0) : None if end is None else max(end - position, 0)]
        cut += [span._replace(text=text)] if text else []
        position += len(span.text)
    return cut


def _text_of(message: TurnContent) -> str:
    if isinstance(message, tuple):
        return message[0]
    return message or ""


_HUMAN_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
_USER_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_TAGGED_IMAGE_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant is able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
_VISION_SYSTEM = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
_LLAMA_2_SYSTEM = (
    "You are a helpful, respectful and honest assistant. "
    "Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
_MPT_SYSTEM = (
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
)
_EXAMPLE_QUESTION = "What are the key differences between renewable and non-renewable energy sources?"
_EXAMPLE_ANSWER = (
    "Renewable energy sources are those that can be replenished naturally in a relatively short amount of time, such "
    "as solar, wind, hydro, geothermal, and biomass. Non-renewable energy sources, on the other hand, are finite and "
    "will eventually be depleted, such as coal, oil, and natural gas. Here are some key differences between renewable "
    "and non-renewable energy sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable energy sources are "
    "finite and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact than non-renewable "
    "sources, which can lead to air and water pollution, greenhouse gas emissions, and other negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically have lower "
    "operational costs than non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote locations than "
    "non-renewable sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different situations and "
    "needs, while non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while non-renewable sources "
    "are not, and their depletion can lead to economic and social instability.\n"
)
_UPPER_ROLES = ("USER", "ASSISTANT")
_TITLE_ROLES = ("Human", "Assistant")
_CHATML_ROLES = ("<|im_start|>user\n", "<|im_start|>assistant\n")
_LLAMA_3_ROLES = (
    "<|start_header_id|>user<|end_header_id|>\n\n",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
)


def _single(system: str, version: str = "Unknown", image_turn: bool = False) -> Conversation:
    return Conversation(system, _TITLE_ROLES, [], 0, SeparatorStyle.SINGLE, "###", None, version, image_turn=image_turn)


def _two(system: str, version: str = "v1", image_turn: bool = False) -> Conversation:
    return Conversation(system, _UPPER_ROLES, [], 0, SeparatorStyle.TWO, " ", "</s>", version, image_turn=image_turn)


def _llama_2(system: str, sep: str = "<s>") -> Conversation:
    return Conversation(system, _UPPER_ROLES, [], 0, SeparatorStyle.LLAMA_2, sep, "</s>", "llama_v2")


def _chatml(system: str) -> Conversation:
    head = "<|im_start|>system\n"
    return Conversation(head + system, _CHATML_ROLES, [], 0, SeparatorStyle.MPT, "<|im_end|>", None, "mpt", system_head=head)


_VICUNA_V0 = Conversation(
    system=_HUMAN_SYSTEM,
    roles=_TITLE_ROLES,
    messages=[[_TITLE_ROLES[0], _EXAMPLE_QUESTION], [_TITLE_ROLES[1], _EXAMPLE_ANSWER]],
    offset=2,
)
_VICUNA_V1 = _two(_USER_SYSTEM)
_PLAIN = Conversation("", ("", ""), [], 0, SeparatorStyle.PLAIN, "\n")
_MISTRAL_DIRECT = _chatml("Answer the questions.")
_LLAMA_3_HEAD = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
_LLAMA_3 = Conversation(
    system=_LLAMA_3_HEAD + _VISION_SYSTEM,
    roles=_LLAMA_3_ROLES,
    messages=[],
    offset=0,
    sep_style=SeparatorStyle.MPT,
    sep="<|eot_id|>",
    version="llama3",
    system_head=_LLAMA_3_HEAD,
)

conv_templates: dict[str, Conversation] = {
    "default": _VICUNA_V0,
    "v0": _VICUNA_V0,
    "v1": _VICUNA_V1,
    "vicuna_v1": _VICUNA_V1,
    "llama_2": _llama_2(_LLAMA_2_SYSTEM),
    "mistral_instruct": _llama_2("", sep=""),
    "chatml_direct": _MISTRAL_DIRECT,
    "mistral_direct": _MISTRAL_DIRECT,
    "plain": _PLAIN,
    "v0_plain": _PLAIN,
    "llava_v0": _single(_HUMAN_SYSTEM),
    "v0_mmtag": _single(_TAGGED_IMAGE_SYSTEM, "v0_mmtag", image_turn=True),
    "llava_v1": _two(_HUMAN_SYSTEM),
    "v1_mmtag": _two(_TAGGED_IMAGE_SYSTEM, "v1_mmtag", image_turn=True),
    "llava_llama_2": _llama_2(_VISION_SYSTEM),
    "llava_llama_3": _LLAMA_3,
    "mpt": _chatml(_MPT_SYSTEM),
}
"""Every template by name. Take a copy before appending turns (`get_template` gives one)."""

default_conversation = _VICUNA_V1
"""What LLaVA's scripts use when nobody names a template."""


def get_template(name: str) -> Conversation:
    """Return a fresh conversation of the template `name`.

    Raises:
        ValueError: there is no such template; the sentence lists the ones there are.
    """
    if name not in conv_templates:
        raise ValueError(
            f"conversation template {name!r} is unknown: choose one of {', '.join(sorted(conv_templates))}"
        )
    return conv_templates[name].copy()


@functools.cache
def answer_headers() -> tuple[str, ...]:
    """The markup in front of an answer in each template, as in `ASSISTANT:` and `[/INST]`."""
    headers = set()
    for template in conv_templates.values():
        opened = template.copy()
        opened.messages = [[opened.roles[0], "?"]]
        opened.append_message(opened.roles[1], None)
        header = opened.get_prompt().rpartition("?")[2].lstrip()
        headers |= {header} - {""}
    return tuple(sorted(headers))
