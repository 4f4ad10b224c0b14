"""The text of each token of an answer, and when its log probability may be sent."""

from __future__ import annotations

import re
from collections import deque
from typing import Any

from llava.serve.engine.sampling import Picked
from llava.serve.protocol import TokenScore

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_ANCHOR = "a"
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = (byte for byte in range(256) if byte not in _PRINTABLE)
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + place): byte for place, byte in enumerate(_OTHERS)}
"""GPT-2's byte alphabet, in which byte-level tokenizers write tokens: printable bytes as they are, the others from U+0100 on."""


class TokenTexts:
    """The text of single tokens.

    A token of a SentencePiece or byte-level tokenizer may be part of a character; such bytes are written as Python's
    `surrogateescape` does, see `TokenScore`.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special = frozenset((*added, *tokenizer.all_special_ids))
        """Ids that are not part of an answer's text, such as end-of-sequence."""
        # A decoder drops the space before a text's first token, so each token is decoded behind another one.
        self._anchor = int(tokenizer(_ANCHOR, add_special_tokens=False)["input_ids"][-1])
        self._before = str(tokenizer.decode([self._anchor]))
        self._known: dict[int, str] = {}

    def __call__(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = self._of(token)
        return self._known[token]

    def _of(self, token: int) -> str:
        text = str(self.tokenizer.decode([self._anchor, token])).removeprefix(self._before)
        if _UNFINISHED not in text:
            return text
        written = str(self.tokenizer.convert_ids_to_tokens(token))
        if byte := _BYTE.fullmatch(written):
            return _escaped(bytes([int(byte[1], 16)]))
        if all(letter in _BYTE_OF for letter in written):
            return _escaped(bytes(_BYTE_OF[letter] for letter in written))
        return text  # the replacement character itself


def _escaped(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


class ScoreStream:
    """The scores of one answer, each held back until its token's text has been sent.

    The tokens together are the answer's text, except for white space at its ends: special tokens are left out, and so are those of a stop
    text. A token within which a stop text begins is cut there; its log probability stays that of the whole token.

    Args:
        texts: of tokens.
    """

    def __init__(self, texts: TokenTexts) -> None:
        self.texts = texts
        self._held: deque[TokenScore] = deque()
        self._sent = 0  # bytes of the held tokens that have been sent already

    def add(self, token: int, picked: Picked) -> None:
        """Add a token, if its log probability was requested and it is part of the text."""
        if picked.log_probability is not None and token not in self.texts.special:
            others = tuple((self.texts(other), value) for other, value in picked.alternatives)
            self._held.append(TokenScore(self.texts(token), picked.log_probability, others))

    def sent(self, text: str) -> tuple[TokenScore, ...]:
        """The scores of the tokens whose text is complete with this next piece of the answer."""
        self._advance(text)
        found = []
        while self._held and len(self._held[0].data) <= self._sent:
            found.append(self._held.popleft())
            self._sent -= len(found[-1].data)
        return tuple(found)

    def end(self, text: str, stopped: bool) -> tuple[TokenScore, ...]:
        """The remaining scores, with the answer's last piece. stopped: by a stop text, whose tokens are among those held."""
        found = self.sent(text)
        if not stopped:
            return (*found, *self._held)  # white space
        if not self._sent:
            return found
        cut = self._held[0]
        return (*found, TokenScore(_escaped(cut.data[: self._sent]), cut.log_probability, cut.alternatives))

    def _advance(self, text: str) -> None:
        """Match a text against the held tokens' bytes. Bytes that the text lacks are skipped: leading white space, and bytes that form no
        character, for which a decoder writes one or several replacement characters."""
        data = b"".join(score.data for score in self._held)
        for letter in text:
            written = letter.encode("utf-8", "surrogatepass")
            place = data.find(written, self._sent)
            if place >= 0:
                self._sent = place + len(written)
            elif letter == _UNFINISHED:
                self._sent = min(self._sent + 1, len(data))
