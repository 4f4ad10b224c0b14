"""What runs beside transformers' generation loop: stop texts, cancellation, the first token's time, and an answer read piece by piece."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from queue import Queue
from time import perf_counter
from typing import Any, Generic, TypeVar

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from llava.text_stream import TextStream, cut_at_stop

T = TypeVar("T")


class FirstTokenClock(StoppingCriteria):
    """Records when the first token is there; stops nothing."""

    def __init__(self) -> None:
        self.first_token: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self.first_token is None:
            input_ids[:, -1].tolist()  # waits for an accelerator
            self.first_token = perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class StopWhenCancelled(StoppingCriteria):
    """Stops a generation whose reader has gone away."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


class StopAtText(StoppingCriteria):
    """Decodes each row as it grows, and stops a row whose text holds a stop text, however it is tokenised.

    Args:
        texts: one per row. ends: ids that end a row. on_piece: gets the pieces of text of a single row.
    """

    def __init__(self, texts: Sequence[TextStream], ends: Sequence[int], on_piece: Callable[[str], None] | None) -> None:
        self.texts, self.ends, self.on_piece = texts, ends, on_piece

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """(B,) whether each row of new tokens (B, T) is done."""
        for text, token in zip(self.texts, input_ids[:, -1].tolist(), strict=True):
            if text.stopped or (text.ids and text.ids[-1] in self.ends):
                continue  # padding, while other rows go on
            piece = text.add(token)
            if piece and self.on_piece is not None:
                self.on_piece(piece)
        return torch.tensor([text.stopped for text in self.texts], device=input_ids.device)


class StopBeamsAtText(StoppingCriteria):
    """Stops beams that hold a stop text. Beams change places from step to step, so each is decoded as a whole."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        self.tokenizer, self.stop = tokenizer, stop

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """(B,) whether each row of new tokens (B, T) is done."""
        texts = self.tokenizer.batch_decode(input_ids, skip_special_tokens=True)
        return torch.tensor([cut_at_stop(text, self.stop)[1] for text in texts], device=input_ids.device)


class AnswerStream(Generic[T]):
    """An answer while it is generated: iterate once, for pieces of text that together are its text; `answer` is there at their end.

    The model runs in a thread of its own during the iteration, which raises its errors. Closing the iterator early ends the generation
    after the current token; `answer` then holds what there is.

    Args:
        generate: makes the answer, passes its pieces to the function that it gets, and ends early when the event is set.
    """

    def __init__(self, generate: Callable[[Callable[[str], None], threading.Event], T]) -> None:
        self._generate = generate
        self._cancelled = threading.Event()
        self._arrived: Queue[str | BaseException | None] = Queue()
        self._thread: threading.Thread | None = None
        self._answer: T | None = None

    def __iter__(self) -> Iterator[str]:
        if self._thread is not None:
            raise RuntimeError("The stream is being read or was read already; ask again for another one.")
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()
        try:
            while (arrived := self._arrived.get()) is not None:
                if isinstance(arrived, BaseException):
                    raise arrived
                yield arrived
        finally:
            self._cancelled.set()
            self._thread.join()

    def _work(self) -> None:
        try:
            self._answer = self._generate(self._arrived.put, self._cancelled)
            self._arrived.put(None)
        except BaseException as error:  # handed to the reader's thread, which raises it
            self._arrived.put(error)

    @property
    def answer(self) -> T:
        """The whole answer.

        Raises:
            RuntimeError: the pieces have not been read to their end.
        """
        if self._answer is None:
            raise RuntimeError("The stream has not been read to its end, so there is no whole answer yet.")
        return self._answer
