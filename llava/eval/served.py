"""A server that answers a file of questions, asked by so many requests at once that its engine stays full."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from llava.eval.answerers import Outcomes, Reply
from llava.eval.chat_server import ChatServer, FailedError, GoneServerError
from llava.eval.checks import TRIED
from llava.eval.one_by_one import Failure
from llava.eval.questions import Row
from llava.messages import Message, Options, normalise_turns
from llava.openai_chat import chat_messages, image_url

Item = TypeVar("Item")
Done = TypeVar("Done")


def chat_of(row: Row, image_folder: Path) -> list[dict[str, Any]]:
    """A row as the messages of a chat completion.

    Raises:
        ValueError: an image cannot be read, or the text cannot be written.
    """
    turns = normalise_turns([Message("user", row.text)], len(row.images))
    return chat_messages(turns, [image_url(image_folder / name) for name in row.images])


class Served:
    """A server at an address, asked by as many requests at once as it batches.

    Args:
        in_flight: requests at once. image_folder: that image names are relative to.
    """

    def __init__(self, server: ChatServer, options: Options, image_folder: Path, in_flight: int) -> None:
        self.server, self.options, self.image_folder, self.in_flight = server, options, image_folder, in_flight
        self.model_id = server.model
        self._loop = asyncio.new_event_loop()

    def connect(self) -> None:
        """Find the model; errors as in `ChatServer.connect`."""
        self._loop.run_until_complete(self.server.connect())
        self.model_id = self.server.model

    def check(self, rows: Iterable[Row]) -> None:
        refused: list[tuple[Any, str]] = []
        for row in islice(rows, TRIED):
            try:
                self._loop.run_until_complete(self._ask(row))
            except FailedError as error:
                raise GoneServerError(f"{self.server.address} fails at the first question: {error}") from error
            except ValueError as error:
                refused.append((row.question_id, str(error)))
            else:
                return
        if refused:
            name, reason = refused[0]
            raise ValueError(
                f"{self.server.address} can answer none of the first {len(refused)} questions with these options; {name!r}: {reason}"
            )

    def answers(self, rows: Iterable[Row]) -> Outcomes:
        in_vain = 0
        for outcomes in in_window(self._ask, rows, self.in_flight, self._loop):
            for _, outcome in outcomes:
                in_vain = in_vain + 1 if isinstance(outcome, Failure) else 0
            yield outcomes
            if in_vain >= max(TRIED, self.in_flight):
                last = next(outcome.reason for _, outcome in outcomes if isinstance(outcome, Failure))
                raise GoneServerError(f"The last {in_vain} questions failed at {self.server.address}, the last of them with: {last}")

    def close(self) -> None:
        self._loop.run_until_complete(self.server.close())
        self._loop.close()

    async def _ask(self, row: Row) -> Reply:
        messages = await asyncio.to_thread(chat_of, row, self.image_folder)  # images are decoded beside the requests in flight
        return await self.server.ask(messages, len(row.images), self.options)


def in_window(
    work: Callable[[Item], Awaitable[Done]], items: Iterable[Item], size: int, loop: asyncio.AbstractEventLoop
) -> Iterator[list[tuple[Item, Done | Failure]]]:
    """Work on up to `size` items at once; an item is taken from `items` only when there is room for it.

    Yields:
        What is done, as soon as it is, in whatever order; what is left when the caller stops is cancelled.

    Raises:
        OSError: one of the items met what no other can pass.
    """
    source, waiting = iter(items), dict[asyncio.Task[Done], Item]()
    try:
        while True:
            for item in islice(source, size - len(waiting)):
                waiting[loop.create_task(_awaited(work(item)))] = item
            if not waiting:
                return
            done, _ = loop.run_until_complete(asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED))
            yield [(waiting.pop(task), _outcome(task)) for task in done]
    finally:
        for task in waiting:
            task.cancel()
        if waiting:
            loop.run_until_complete(asyncio.wait(waiting))


async def _awaited(work: Awaitable[Done]) -> Done:
    return await work


def _outcome(task: asyncio.Task[Done]) -> Done | Failure:
    error = task.exception()
    if error is None:
        return task.result()
    if isinstance(error, GoneServerError) or not isinstance(error, Exception):
        raise error
    return Failure.of(error)
