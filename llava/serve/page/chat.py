"""What the page's controls do: send questions, receive answers, record votes.

Nothing here knows Gradio; `layout.py` connects it to the page's components.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from pathlib import Path

from llava.images import ImageError
from llava.serve.backend.chat_client import ChatClient, ChatError, Delta, Outcome
from llava.serve.page.catalogue import Catalogue
from llava.serve.page.log import ConversationLog, Kind
from llava.serve.page.sessions import (
    MAX_QUESTION_CHARACTERS,
    MAX_TURNS,
    ChatImage,
    ChatSession,
    ChatSessions,
    Reply,
    Settings,
    Turn,
    read_image,
)

logger = logging.getLogger(__name__)

REFRESH_SECONDS = 0.06
"""Shortest time between two updates of a running answer."""
MAX_ANSWER_CHARACTERS = 200_000
BUDGET_LABEL = "Token budget"
"""The slider of `max_visual_tokens`."""
VOTES: dict[str, Kind] = {"Like": "upvote", "Dislike": "downvote", "Flag": "flag"}


class Refusal(ValueError):
    """A sentence for the user: why this cannot be done."""


class Chat:
    """The actions of the page.

    Args:
        client: of the server that answers. catalogue: of its models. sessions: of the browsers. log: of answers and votes.
        upload_folder: the only folder that images are read from.
    """

    def __init__(
        self, client: ChatClient, catalogue: Catalogue, sessions: ChatSessions, log: ConversationLog, upload_folder: Path
    ) -> None:
        self.client, self.catalogue, self.sessions, self.log = client, catalogue, sessions, log
        self.upload_folder = upload_folder.resolve()
        self.draining = False

    async def begin(
        self, session: str, text: str, files: Sequence[str], sides: Sequence[Settings], images: Sequence[ChatImage] = ()
    ) -> ChatSession:
        """Add a question to a conversation.

        Args:
            files: paths of uploads. images: already read.

        Raises:
            Refusal: there is no question, an image cannot be used, no model is served, or an answer is still being written.
        """
        conversation = self.sessions.get(session)
        question = text.strip()
        if conversation.busy:
            raise Refusal("An answer is still being written; stop it first.")
        if not question:
            raise Refusal("Type a question about the image." if files else "Type a question.")
        if len(question) > MAX_QUESTION_CHARACTERS:
            raise Refusal(f"The question has {len(question):,} characters, at most {MAX_QUESTION_CHARACTERS:,} are taken.")
        if len(conversation.turns) >= MAX_TURNS:
            raise Refusal(f"This conversation has {MAX_TURNS} questions; clear it to go on.")
        conversation.busy = True  # before the first await: a second press must find it
        try:
            await self._check_models(sides, conversation.num_images + len(files) + len(images))
            uploaded = [await asyncio.to_thread(self._read, name) for name in files]
        except BaseException:
            conversation.busy = False
            raise
        conversation.turns.append(Turn(question, [*images, *uploaded], {side: Reply(settings) for side, settings in enumerate(sides)}))
        return conversation

    async def begin_again(self, session: str, sides: Sequence[Settings]) -> ChatSession:
        """Ask the last question again.

        Raises:
            Refusal: there is none, or an answer is still being written.
        """
        conversation = self.sessions.get(session)
        if conversation.busy:
            raise Refusal("An answer is still being written; stop it first.")
        if not conversation.turns:
            raise Refusal("There is no question to ask again yet.")
        conversation.busy = True
        try:
            await self._check_models(sides, conversation.num_images)
        except BaseException:
            conversation.busy = False
            raise
        conversation.turns[-1].replies = {side: Reply(settings) for side, settings in enumerate(sides)}
        return conversation

    async def answers(self, conversation: ChatSession) -> AsyncIterator[None]:
        """Answer the last question on all sides concurrently; yields whenever there is something new to draw."""
        turn = conversation.turns[-1]
        news = asyncio.Event()
        conversation.stop = False
        tasks = [asyncio.create_task(self._answer(conversation, turn, side, news.set)) for side in turn.replies]
        try:
            yield
            while not all(task.done() for task in tasks):
                done = [asyncio.create_task(news.wait()), *tasks]
                await asyncio.wait(done, timeout=0.5, return_when=asyncio.FIRST_COMPLETED)
                done[0].cancel()
                if conversation.stop:
                    break
                if news.is_set():
                    news.clear()
                    yield
                    await asyncio.sleep(REFRESH_SECONDS)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            conversation.busy = False
        for side, reply in turn.replies.items():
            self.log.write("chat", conversation, side, turn, reply)
        yield

    def stop(self, session: str) -> None:
        """Stop the running answers; the text so far stays."""
        conversation = self.sessions.find(session)
        if conversation is not None:
            conversation.stop = True

    def clear(self, session: str) -> None:
        """Forget a conversation."""
        self.sessions.drop(session)

    async def once(self, text: str, files: Sequence[str], settings: Settings) -> Reply:
        """Answer one question in a conversation of its own, for programs.

        Raises:
            Refusal: as in `begin`, or the answer failed.
        """
        session = f"once-{uuid.uuid4().hex}"
        try:
            conversation = await self.begin(session, text, files, [settings])
            async for _ in self.answers(conversation):
                pass
            reply = conversation.turns[-1].replies[0]
        finally:
            self.sessions.drop(session)
        if reply.error is not None:
            raise Refusal(f"{reply.error.text} ({reply.error.code}, request {reply.error.request_id})")
        return reply

    def vote(self, session: str, side: int, message: int, value: bool | str | None) -> str:
        """Record a user's vote on one answer.

        Args:
            message: index of the answer among that side's messages, where questions and answers alternate.
            value: True or `Like`, False or `Dislike`, `Flag`; nothing takes it back.

        Returns:
            A confirmation to show; empty where nothing has changed (browsers send some votes twice).

        Raises:
            Refusal: there is no such answer or vote.
        """
        conversation = self.sessions.find(session)
        turns = conversation.turns if conversation is not None else []
        index = message // 2
        reply = turns[index].reply(side) if message % 2 and 0 <= index < len(turns) else None
        if conversation is None or reply is None or reply.status == "streaming":
            raise Refusal("There is no finished answer to vote on there.")
        name = ("Like" if value else "Dislike") if isinstance(value, bool) else str(value or "")
        if name and name not in VOTES:
            raise Refusal("There is no such vote.")
        kind: Kind = VOTES[name] if name else "unvote"
        if kind == reply.vote:
            return ""
        reply.vote = kind
        self.log.write(kind, conversation, side, turns[index], reply)
        return {"upvote": "Thank you: noted as good.", "downvote": "Thank you: noted as bad.", "flag": "Thank you: flagged."}.get(
            kind, "Taken back."
        )

    async def drain(self) -> None:
        """Take no more questions, and wait for the running answers."""
        self.draining = True
        while self.sessions.num_busy:
            await asyncio.sleep(0.05)

    async def _check_models(self, sides: Sequence[Settings], num_images: int) -> None:
        if self.draining:
            raise Refusal("The page is shutting down; reload it in a moment.")
        found = await self.catalogue.get()
        if not found.models:
            raise Refusal(found.error.text if found.error else "No model is being served now; start a worker.")
        for settings in sides:
            model = found.find(settings.model)
            if model is None:
                raise Refusal("The chosen model is not being served now; choose another.")
            if num_images > (model.max_images if model.takes_images else 0):
                raise Refusal(
                    f"{model.name} takes at most {model.max_images} images in one conversation; clear it to go on."
                    if model.takes_images
                    else f"{model.name} takes no images."
                )

    def _read(self, name: str) -> ChatImage:
        """Read one upload: a regular file in the upload folder or below it, and nothing else."""
        path = Path(name)
        try:
            inside = path.resolve().is_relative_to(self.upload_folder) and path.is_file()
            if not inside:
                raise Refusal("An image is no longer here; add it again.")
            return read_image(path.read_bytes())
        except ImageError as error:
            raise Refusal(f"An image cannot be used: {error}.") from error
        except OSError as error:
            raise Refusal("An image is no longer here; add it again.") from error

    async def _answer(self, conversation: ChatSession, turn: Turn, side: int, news: Callable[[], None]) -> None:
        reply = turn.replies[side]
        body = {**reply.settings.body(), "messages": conversation.messages(side)}
        start = time.perf_counter()
        try:
            async with aclosing(self.client.stream(body)) as events:  # type: ignore[type-var]
                async for event in events:
                    _take(event, reply, 1000 * (time.perf_counter() - start))
                    news()
        except ChatError as error:
            reply.error, reply.status = page_error(error), "failed"
        except asyncio.CancelledError:
            reply.status = "stopped"
            raise
        except Exception:
            logger.exception("reply %s of conversation %s failed inside the page", reply.id, conversation.id)
            reply.error, reply.status = ChatError("The page itself failed on this answer.", "page_error", reply.id), "failed"
        finally:
            reply.total_ms = 1000 * (time.perf_counter() - start)
            news()


def page_error(error: ChatError) -> ChatError:
    """A budget that is too small, by the name of the slider in place of the API's field; other errors as they are."""
    if error.param != "max_visual_tokens" or error.least is None:
        return error
    text = (
        f"The {BUDGET_LABEL.lower()} is too small for these images: the smallest possible here is {error.least:,}. "
        f"Move “{BUDGET_LABEL}” up, or to 0 for no limit."
    )
    return ChatError(text, error.code, error.request_id, error.status, error.param, error.least)


def _take(event: Delta | Outcome, reply: Reply, milliseconds: float) -> None:
    if isinstance(event, Delta):
        if reply.first_ms is None:
            reply.first_ms = milliseconds
        reply.text += event.text
        if len(reply.text) > MAX_ANSWER_CHARACTERS:
            raise ChatError(f"The answer does not end; it was cut off at {MAX_ANSWER_CHARACTERS:,} characters.", "answer_too_long")
    else:
        reply.outcome, reply.status = event, "done"
