"""An assistant whose answers a server writes, for the report and lmms-eval: the front of the model here decides and reports.

Tower, projector, router and word embeddings are in this process, the decoder layers are not. Every question is asked with the level that
was decided for its images, so that what the server answers is what the report counts.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, ClassVar

import torch

from llava.eval.answerers import Reply
from llava.eval.chat_server import ChatServer, FailedError, GoneServerError
from llava.eval.checks import TRIED
from llava.eval.served import in_window
from llava.eval.vllm_engines import IN_FLIGHT
from llava.images import to_rgb
from llava.inference import Answer, Assistant, Question, micro_model_path
from llava.messages import Message, Options, RoutingRequest, normalise_turns
from llava.model.builder import load_pretrained_model
from llava.model.routing import RoutingReport
from llava.openai_chat import chat_messages, data_url
from llava.timing import StageTimer


@dataclass(frozen=True)
class ServedAnswer(Answer):
    """An answer of a server, which counts its tokens and does not name them: `token_ids` is empty."""

    counted_tokens: int = 0

    @property
    def num_new_tokens(self) -> int:
        return self.counted_tokens


@dataclass
class ServedAssistant(Assistant):
    """Decides granularities with the front of a model, and has a server of the same model answer.

    server: connected already.
    """

    server: ChatServer
    loop: asyncio.AbstractEventLoop

    has_decoder: ClassVar[bool] = False

    @classmethod
    def connect(cls, address: str, model_path: str | None = None, **options: Any) -> ServedAssistant:
        """Find the server, then load the front of its model.

        Args:
            model_path: the checkpoint that the server has, too. options: those of `load_pretrained_model`.

        Raises:
            ValueError: a checkpoint that is not whole, or a server with several models. OSError: there is no such server.
        """
        path, server, loop = model_path or micro_model_path(), ChatServer(address), asyncio.new_event_loop()
        try:
            loop.run_until_complete(server.connect())
            tokenizer, model, image_processor, _ = load_pretrained_model(path, front_only=True, **options)
        except BaseException:
            _close(server, loop)
            raise
        return cls(tokenizer, model, image_processor, server, loop)

    def close(self) -> None:
        """Let go of the connections."""
        _close(self.server, self.loop)

    def check(self, questions: Iterable[tuple[Any, Callable[[], Question]]], options: Options) -> None:
        """Ask until a question is answered.

        Args:
            questions: ids, and functions that open each question's images; one that cannot be opened is skipped.

        Raises:
            ValueError: none of the first `TRIED` is answered, with the reason for the first. OSError: the server fails.
        """
        refused: list[tuple[Any, ValueError]] = []
        for question_id, load in islice(questions, TRIED):
            try:
                question = load()
            except Exception:  # reported as this question's failure when it is its turn
                continue
            try:
                self.answer_batch([question], options)
            except FailedError as error:
                raise GoneServerError(f"{self.server.address} fails at the first question: {error}") from error
            except ValueError as error:
                refused.append((question_id, error))
            else:
                return
        if refused:
            question_id, reason = refused[0]
            raise ValueError(f"{self.server.address} can answer none of the first {len(refused)} questions; {question_id!r}: {reason}")

    def answer_batch(self, questions: Sequence[Question], options: Options | None = None) -> list[Answer]:
        """Answer questions, all at once; arguments as in `Assistant.answer_batch`.

        Raises:
            ValueError: input that cannot work, what the server refuses, or a server of another model. OSError: the server is gone.
        """
        options = options or Options()
        timer = StageTimer(self.model.device)
        reports = self._decide(questions, options, timer)
        wishes = [replace(options, routing=_wish(own, options.routing)) for own in reports]
        with timer("generate"):
            replies = self.replies(list(zip(questions, wishes, strict=True)))
        answers: list[Answer] = []
        for question, own, reply in zip(questions, reports, replies, strict=True):
            self.check_length(question, sum(report.num_visual_tokens for report in own), reply)
            answers.append(
                ServedAnswer(reply.text, [], reply.finish_reason, reply.prompt_tokens, own, dict(timer.milliseconds), reply.new_tokens)
            )
        return answers

    @torch.inference_mode()
    def _decide(self, questions: Sequence[Question], options: Options, timer: StageTimer) -> list[list[RoutingReport]]:
        """A report per image of each question; images are encoded only where the router is asked."""
        rows = [self.prompt_row(question.messages, len(question.images), options.conv_mode) for question in questions]
        with timer("views"):
            inputs = {id(image): self.image_input(image) for question in questions for image in question.images}
        images = [inputs[id(image)] for question in questions for image in question.images]
        plan = self.model.plan(rows, images, options.routing)
        if any(plan.asks_router(row) for row in range(len(rows))):
            with timer("vision"):
                images = self.model.with_features(images)
        logits = self.model.logits_where_asked(rows, images, plan, timer)
        reports = [
            self.model.report(level, plan.layouts[image], logits.get(image)) for image, level in enumerate(plan.choose(logits))
        ]
        return [[reports[image] for image in owned] for owned in plan.owners]

    def replies(self, asked: Sequence[tuple[Question, Options]]) -> list[Reply]:
        """What the server answers, asked by up to `IN_FLIGHT` requests at once.

        Raises:
            ValueError: the server refuses one of them. OSError: the server is gone.
        """
        images = {id(image): image for question, _ in asked for image in question.images}
        urls = {key: data_url(to_rgb(image)) for key, image in images.items()}

        async def ask(place: int) -> Reply | ValueError:
            question, options = asked[place]
            turns = [Message("user", question.messages)] if isinstance(question.messages, str) else question.messages
            try:
                messages = chat_messages(normalise_turns(turns, len(question.images)), [urls[id(image)] for image in question.images])
                stop = self._stop_texts(options)  # a template's separator too, which the server does not know
                return await self.server.ask(messages, len(question.images), replace(options, stop=stop))
            except ValueError as error:
                return error

        found: dict[int, Reply] = {}
        for outcomes in in_window(ask, range(len(asked)), IN_FLIGHT, self.loop):
            for place, outcome in outcomes:
                if isinstance(outcome, Reply):
                    found[place] = outcome
                else:
                    raise outcome if isinstance(outcome, ValueError) else RuntimeError(outcome.reason)
        return [found[place] for place in range(len(asked))]

    def check_length(self, question: Question, visual_tokens: int, reply: Reply) -> None:
        """Check that the server read the prompt that was decided on.

        Raises:
            ValueError: its prompt has another length.
        """
        row = self.prompt_row(question.messages, len(question.images))
        expected = row.num_text_tokens + visual_tokens
        if reply.prompt_tokens != expected:
            raise ValueError(
                f"{self.server.address} read a prompt of {reply.prompt_tokens} positions, expected {expected}, {visual_tokens} of them "
                "visual tokens; name the checkpoint that the server has, and see that it runs with the plug-in."
            )

    def _generate(
        self,
        images: Any,
        messages: Any,
        options: Options,
        on_piece: Callable[[str], None] | None = None,
        cancelled: threading.Event | None = None,
    ) -> Answer:
        (answer,) = self.answer_batch([Question(images, messages)], options)
        if on_piece is not None:
            on_piece(answer.text)
        return answer

    def answer_rows(self, composed: Any, options: Options, timer: StageTimer | None = None) -> list[Answer]:
        """Refused: there is no decoder layer here.

        Raises:
            ValueError: always.
        """
        raise ValueError("Composed rows cannot be sent to a server of chat completions; ask answer_batch.")

    def log_likelihoods(self, questions: Any, continuations: Any, options: Options | None = None) -> Any:
        """Refused: a server of chat completions scores no given answer.

        Raises:
            ValueError: always.
        """
        raise ValueError("A server of chat completions cannot score a given answer; use the embedded engine.")


def _wish(reports: Sequence[RoutingReport], wish: RoutingRequest) -> RoutingRequest:
    """The level that was decided, as a request; the original one where images of a question differ, since a request has one for all."""
    levels = {report.granularity for report in reports}
    return RoutingRequest(levels.pop()) if len(levels) == 1 else wish


def _close(server: ChatServer, loop: asyncio.AbstractEventLoop) -> None:
    loop.run_until_complete(server.close())
    loop.close()
