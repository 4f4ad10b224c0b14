"""What happens when something is pressed: questions go out, answers come in, votes are written down.

Plain functions of values; `layout.py` ties them to the page's parts.
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
from llava.serve.page.conversation import (
    MAX_QUESTION_CHARACTERS,
    MAX_TURNS,
    Conversation,
    Conversations,
    Picture,
    Reply,
    Settings,
    Turn,
    read_picture,
)
from llava.serve.page.log import ConversationLog, Kind

logger = logging.getLogger(__name__)

REFRESH_SECONDS = 0.06
"""How often a running answer is drawn anew, at most."""
MAX_ANSWER_CHARACTERS = 200_000
BUDGET_LABEL = "Token budget"
"""The slider of `max_visual_tokens`."""
VOTES: dict[str, Kind] = {"Like": "upvote", "Dislike": "downvote", "Flag": "flag"}


class Refusal(ValueError):
    """A sentence for the user: what was pressed cannot be done."""


class Chat:
    """The page's doings.

    Args:
        client: where questions go. catalogue: of models. conversations: of the browsers. log: of votes.
        upload_folder: the only folder that pictures are read from.
    """

    def __init__(
        self, client: ChatClient, catalogue: Catalogue, conversations: Conversations, log: ConversationLog, upload_folder: Path
    ) -> None:
        self.client, self.catalogue, self.conversations, self.log = client, catalogue, conversations, log
        self.upload_folder = upload_folder.resolve()
        self.draining = False

    async def begin(
        self, session: str, text: str, files: Sequence[str], sides: Sequence[Settings], pictures: Sequence[Picture] = ()
    ) -> Conversation:
        """Take a question into the conversation.

        Args:
            files: uploads, by their paths here. pictures: that were read before.

        Raises:
            Refusal: nothing was asked, a picture cannot be used, no model, or an answer is still being written.
        """
        conversation = self.conversations.get(session)
        question = text.strip()
        if conversation.busy:
            raise Refusal("An answer is still being written; stop it first.")
        if not question:
            raise Refusal("Type a question about the picture." if files else "Type a question.")
        if len(question) > MAX_QUESTION_CHARACTERS:
            raise Refusal(f"The question has {len(question):,} characters, at most {MAX_QUESTION_CHARACTERS:,} are taken.")
        if len(conversation.turns) >= MAX_TURNS:
            raise Refusal(f"This conversation has {MAX_TURNS} questions; clear it to go on.")
        conversation.busy = True  # before the first await: a second press must find it
        try:
            await self._check_models(sides, conversation.num_pictures + len(files) + len(pictures))
            uploaded = [await asyncio.to_thread(self._read, name) for name in files]
        except BaseException:
            conversation.busy = False
            raise
        conversation.turns.append(Turn(question, [*pictures, *uploaded], {side: Reply(settings) for side, settings in enumerate(sides)}))
        return conversation

    async def begin_again(self, session: str, sides: Sequence[Settings]) -> Conversation:
        """Ask the last question anew.

        Raises:
            Refusal: there is none, or an answer is still being written.
        """
        conversation = self.conversations.get(session)
        if conversation.busy:
            raise Refusal("An answer is still being written; stop it first.")
        if not conversation.turns:
            raise Refusal("There is no question to ask again yet.")
        conversation.busy = True
        try:
            await self._check_models(sides, conversation.num_pictures)
        except BaseException:
            conversation.busy = False
            raise
        conversation.turns[-1].replies = {side: Reply(settings) for side, settings in enumerate(sides)}
        return conversation

    async def answers(self, conversation: Conversation) -> AsyncIterator[None]:
        """Let all sides answer the last question at once; gives a turn to the caller whenever there is something new to draw."""
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
        """End the running answers; what was written stays."""
        conversation = self.conversations.find(session)
        if conversation is not None:
            conversation.stop = True

    def clear(self, session: str) -> None:
        """Forget a conversation."""
        self.conversations.drop(session)

    async def once(self, text: str, files: Sequence[str], settings: Settings) -> Reply:
        """Answer one question outside any conversation, for programs.

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
            self.conversations.drop(session)
        if reply.error is not None:
            raise Refusal(f"{reply.error.text} ({reply.error.code}, request {reply.error.request_id})")
        return reply

    def vote(self, session: str, side: int, message: int, value: bool | str | None) -> str:
        """Write down what a user thinks of one answer.

        Args:
            message: the answer's place among that side's messages, where questions and answers take turns.
            value: True or `Like`, False or `Dislike`, `Flag`; nothing takes it back.

        Returns:
            A word of thanks; empty where nothing has changed (browsers send some votes twice).

        Raises:
            Refusal: there is no such answer or vote.
        """
        conversation = self.conversations.find(session)
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
        while self.conversations.num_busy:
            await asyncio.sleep(0.05)

    async def _check_models(self, sides: Sequence[Settings], num_pictures: int) -> None:
        if self.draining:
            raise Refusal("The page is shutting down; reload it in a moment.")
        found = await self.catalogue.get()
        if not found.models:
            told = found.error.text if found.error else "No model is being served now; start a worker."
            raise Refusal(told)
        for settings in sides:
            model = found.find(settings.model)
            if model is None:
                raise Refusal("The chosen model is not being served now; choose another.")
            if num_pictures > (model.max_images if model.takes_images else 0):
                raise Refusal(
                    f"{model.name} takes at most {model.max_images} pictures in one conversation; clear it to go on."
                    if model.takes_images
                    else f"{model.name} takes no pictures."
                )

    def _read(self, name: str) -> Picture:
        """Read one upload: a plain file right in the upload folder or a folder of it, and nothing else."""
        path = Path(name)
        try:
            inside = path.resolve().is_relative_to(self.upload_folder) and path.is_file()
            if not inside:
                raise Refusal("A picture is no longer here; add it again.")
            return read_picture(path.read_bytes())
        except ImageError as error:
            raise Refusal(f"A picture cannot be used: {error}.") from error
        except OSError as error:
            raise Refusal("A picture is no longer here; add it again.") from error

    async def _answer(self, conversation: Conversation, turn: Turn, side: int, news: Callable[[], None]) -> None:
        reply = turn.replies[side]
        body = {**reply.settings.body(), "messages": conversation.messages(side)}
        start = time.perf_counter()
        try:
            async with aclosing(self.client.stream(body)) as events:  # type: ignore[type-var]
                async for event in events:
                    _take(event, reply, 1000 * (time.perf_counter() - start))
                    news()
        except ChatError as error:
            reply.error, reply.status = in_the_pages_words(error), "failed"
        except asyncio.CancelledError:
            reply.status = "stopped"
            raise
        except Exception:
            logger.exception("reply %s of conversation %s failed inside the page", reply.id, conversation.id)
            reply.error, reply.status = ChatError("The page itself failed on this answer.", "page_error", reply.id), "failed"
        finally:
            reply.total_ms = 1000 * (time.perf_counter() - start)
            news()


def in_the_pages_words(error: ChatError) -> ChatError:
    """An error that names what a user of the page sees in place of a field of the API; others as they are."""
    if error.param != "max_visual_tokens":
        return error
    smallest = "" if error.least is None else f": the smallest possible here is {error.least:,}"
    text = f"The {BUDGET_LABEL.lower()} is too small for these pictures{smallest}. Move “{BUDGET_LABEL}” up, or to 0 for no limit."
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
