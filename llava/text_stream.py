"""Token ids become text piece by piece, and a stop text ends it before a letter of it was sent."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
"""A SentencePiece token that stands for one byte; a run of them is decoded as a whole."""


def cut_at_stop(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """Cut a text at the first stop text in it; return whether there was one."""
    places = [text.find(marker) for marker in stop if marker in text]
    return (text[: min(places)], True) if places else (text, False)


class TextStream:
    """The text of one answer, growing.

    The pieces together are exactly the answer that `Assistant.answer` gives: cut at the first stop text, without white space at either
    end. What may still become part of a stop text, of a character, or of white space at the end is held back. A token costs the decoding
    of a few ids, however long the answer is; all of them are decoded at a stop text and at the end.

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
        self._longest_stop = max(map(len, self.stop), default=0)
        # The window is decoded with the tokens before it, since tokenizers treat a text's first token differently.
        self._window_start = 0
        self._window_read = 0

    def add(self, token: int) -> str:
        """Take one token; give the piece of text that is certain now."""
        self.ids.append(token)
        known = self._decode(self.ids[self._window_start : self._window_read])
        text = self._decode(self.ids[self._window_start :])
        new = text[len(known) :]
        if self._brings_stop(new):  # also within a run of bytes: what was asked for is there
            self.stopped = True
            return ""
        if new and not text.endswith(_UNFINISHED) and not self._leaves_run_open(token):
            self._text += new
            self._window_start, self._window_read = self._window_read, len(self.ids)
        return self._take(self._certain())

    def end(self) -> str:
        """The last piece."""
        text, stopped = cut_at_stop(self._decode(self.ids), self.stop)
        self._text, self.stopped = text, self.stopped or stopped
        return self._take(text.rstrip())

    def _brings_stop(self, new: str) -> bool:
        """Whether the text holds a stop text once `new` is at its end; before, it held none."""
        if not self.stop:
            return False
        reach = max(0, len(self._text) - self._longest_stop + 1)  # a stop text that began further back had its end further back, too
        return cut_at_stop(self._text[reach:] + new, self.stop)[1] and cut_at_stop(self._decode(self.ids), self.stop)[1]

    def _leaves_run_open(self, token: int) -> bool:
        """Whether bytes behind this token would be decoded together with those before it: it is one, or a special token, left out."""
        return _BYTE.fullmatch(str(self.tokenizer.convert_ids_to_tokens(token))) is not None or not self._decode([token])

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
