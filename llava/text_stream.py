"""Token ids become text piece by piece, and a stop text ends it before a letter of it was sent."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from llava.inference import cut_at_stop

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
"""A SentencePiece token that stands for one byte; a run of them is decoded as a whole."""


class TextStream:
    """The text of one answer, growing.

    The pieces together are exactly the answer that `Assistant.answer` gives: cut at the first stop text, without white space at either
    end. What may still become part of a stop text, of a character, or of white space at the end is held back.

    Args:
        tokenizer: of the model. stop: texts that end the answer.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.stop = tuple(stop)
        self.ids: list[int] = []
        self.stopped = False
        self._text = ""  # everything decoded so far
        self._sent = 0  # how much of the stripped text has been handed out
        # The window is decoded with the tokens before it, since tokenizers treat a text's first token differently.
        self._window_start = 0
        self._window_read = 0

    def add(self, token: int) -> str:
        """Take one token; give the piece of text that is certain now."""
        self.ids.append(token)
        known = self._decode(self.ids[self._window_start : self._window_read])
        text = self._decode(self.ids[self._window_start :])
        grown = self._text + text[len(known) :]
        if self.stop and cut_at_stop(grown, self.stop)[1]:  # also within a run of bytes: what was asked for is there
            self.stopped = True
            return ""
        if len(text) > len(known) and not text.endswith(_UNFINISHED) and not self._is_byte(token):
            self._text = grown
            self._window_start, self._window_read = self._window_read, len(self.ids)
        return self._take(self._certain())

    def end(self) -> str:
        """The last piece."""
        text, stopped = cut_at_stop(self._decode(self.ids), self.stop)
        self._text, self.stopped = text, self.stopped or stopped
        return self._take(text.rstrip())

    def _is_byte(self, token: int) -> bool:
        return _BYTE.fullmatch(str(self.tokenizer.convert_ids_to_tokens(token))) is not None

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _certain(self) -> str:
        """The text without what may still turn out to be a stop text or white space at the end."""
        held = 0
        for marker in self.stop:
            for length in range(min(len(marker) - 1, len(self._text)), held, -1):
                if self._text.endswith(marker[:length]):
                    held = length
                    break
        return self._text[: len(self._text) - held].rstrip()

    def _take(self, certain: str) -> str:
        piece = certain.lstrip()[self._sent :]
        self._sent += len(piece)
        return piece
