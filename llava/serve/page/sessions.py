"""The page's conversations, kept on the server: a browser sends its new question and never the history."""

from __future__ import annotations

import base64
import hashlib
import io
import time
import uuid
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import Image

from llava.image_structure import image_format
from llava.images import open_image
from llava.serve.backend.chat_client import ChatError, Outcome

THUMBNAIL = 384
"""Longest side of the small copy that the page shows."""
MAX_QUESTION_CHARACTERS = 20_000
MAX_TURNS = 100

Status = Literal["streaming", "done", "stopped", "failed"]


@dataclass(frozen=True)
class ChatImage:
    """One image of a question: data_url for the model, thumbnail (a data URL too) for the page, both made here from checked bytes."""

    data_url: str
    thumbnail: str
    size: tuple[int, int]
    sha256: str

    @property
    def cost(self) -> int:
        """Bytes of memory that it takes."""
        return len(self.data_url) + len(self.thumbnail)


def read_image(data: bytes) -> ChatImage:
    """Check and decode the bytes of an image file.

    Raises:
        ImageError: see `llava.images`.
    """
    with open_image(data).decoded() as image:
        size, thumbnail = image.size, _small_jpeg(image)
    return ChatImage(
        data_url=_data_url(image_format(data).lower(), data),
        thumbnail=_data_url("jpeg", thumbnail),
        size=size,
        sha256=hashlib.sha256(data).hexdigest(),
    )


def _small_jpeg(image: Image.Image) -> bytes:
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=88)
    return file.getvalue()


def _data_url(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


@dataclass(frozen=True)
class Settings:
    """The options of one side. granularity: `None` lets the router choose. max_visual_tokens: `None` for no budget."""

    model: str
    granularity: int | None = None
    max_visual_tokens: int | None = None
    granularity_bias: float = 0.0
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 512

    def body(self) -> dict[str, Any]:
        """The fields of a request; our own only where they are set, so that a server without them can be asked too."""
        body: dict[str, Any] = {
            "model": self.model,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_tokens,
        }
        ours = {
            "granularity": self.granularity,
            "max_visual_tokens": self.max_visual_tokens,
            "granularity_bias": self.granularity_bias or None,
        }
        return body | {name: value for name, value in ours.items() if value is not None}


@dataclass
class Reply:
    """One side's answer to one question.

    first_ms, total_ms: measured by the page, network included. vote: the kind of the last vote on it.
    """

    settings: Settings
    text: str = ""
    status: Status = "streaming"
    outcome: Outcome | None = None
    error: ChatError | None = None
    first_ms: float | None = None
    total_ms: float | None = None
    vote: str | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def counts(self) -> bool:
        """Whether it belongs to the history that later questions are sent with."""
        return self.status in ("done", "stopped") and bool(self.text.strip())


@dataclass
class Turn:
    """A question with its images, and a reply per side."""

    question: str
    images: list[ChatImage]
    replies: dict[int, Reply] = field(default_factory=dict)

    def reply(self, side: int) -> Reply | None:
        """That side's, or the first side's where the second was not there yet."""
        return self.replies.get(side) or self.replies.get(0)


@dataclass
class ChatSession:
    """One browser's conversation: its turns, and whether an answer is running or has to stop."""

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    turns: list[Turn] = field(default_factory=list)
    busy: bool = False
    stop: bool = False
    used: float = field(default_factory=time.monotonic)

    @property
    def cost(self) -> int:
        return sum(image.cost for turn in self.turns for image in turn.images)

    @property
    def num_images(self) -> int:
        return sum(len(turn.images) for turn in self.turns)

    def messages(self, side: int) -> list[dict[str, Any]]:
        """The conversation up to its last question, as that side has seen it.

        A question without a usable answer is left out, and its images go with the next one.
        """
        messages: list[dict[str, Any]] = []
        waiting: list[ChatImage] = []
        for turn in self.turns[:-1]:
            reply = turn.reply(side)
            waiting += turn.images
            if reply is None or not reply.counts:
                continue
            messages += [_user_message(turn.question, waiting), {"role": "assistant", "content": reply.text.strip()}]
            waiting = []
        last = self.turns[-1]
        return [*messages, _user_message(last.question, waiting + last.images)]


def _user_message(question: str, images: list[ChatImage]) -> dict[str, Any]:
    if not images:
        return {"role": "user", "content": question}
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": image.data_url}} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": question}]}


class ChatSessions:
    """The conversations of all browsers, by session; the longest unused are forgotten when there are too many or too large ones.

    Args:
        max_count: of conversations. max_bytes: of their images together. max_age: seconds without use.
    """

    def __init__(self, max_count: int = 1000, max_bytes: int = 1_000_000_000, max_age: float = 3 * 3600.0) -> None:
        self.max_count, self.max_bytes, self.max_age = max_count, max_bytes, max_age
        self._by_session: OrderedDict[str, ChatSession] = OrderedDict()

    def get(self, session: str) -> ChatSession:
        """That session's conversation, a new one where there is none."""
        conversation = self._by_session.setdefault(session, ChatSession())
        self._by_session.move_to_end(session)
        conversation.used = time.monotonic()
        self._forget_old(keep=session)
        return conversation

    def find(self, session: str) -> ChatSession | None:
        return self._by_session.get(session)

    def drop(self, session: str) -> ChatSession | None:
        """Forget a conversation and end what it still has running."""
        conversation = self._by_session.pop(session, None)
        if conversation is not None:
            conversation.stop = True
        return conversation

    @property
    def num_busy(self) -> int:
        return sum(conversation.busy for conversation in self._by_session.values())

    def __len__(self) -> int:
        return len(self._by_session)

    def _forget_old(self, keep: str) -> None:
        total = sum(conversation.cost for conversation in self._by_session.values())
        oldest_allowed = time.monotonic() - self.max_age
        for session, conversation in list(self._by_session.items()):
            fits = total <= self.max_bytes and len(self._by_session) <= self.max_count and conversation.used >= oldest_allowed
            if fits:
                return
            if session != keep:
                total -= conversation.cost
                self.drop(session)
