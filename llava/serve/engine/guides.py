"""Answers whose text has to follow a JSON schema, a regular expression or a grammar: which tokens may come next.

llguidance reads the grammars and knows the tokens; here stand the bounds. A grammar comes from a client, so it is built in a process of its
own first (`guide_check.py`), which a hostile one may take down; and each look at the next tokens is bounded by what the library calls fuel.
"""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer, grammar_from, regex_to_lark
from llguidance.hf import from_tokenizer
from torch import Tensor

from llava.serve.protocol import ErrorKind, Guide, GuideKind, ServeError
from llava.serve.protocol.error_templates import (
    GUIDE_TOO_COMPLEX,
    GUIDE_UNSUPPORTED,
    GUIDE_UNSUPPORTED_KEYWORDS,
    GUIDES_UNSUPPORTED,
    UNSUPPORTED_KEYWORDS,
)

logger = logging.getLogger(__name__)

LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 50_000,
    "step_max_items": 50_000,
    "max_items_in_row": 500,
    "max_lexer_states": 20_000,
    "verbose_errors": False,
}
"""Of `LLParserLimits`: some milliseconds for each look at the next tokens, and about 40 MB for each grammar. The time of a look grows with
the cube of what may be under way at once (`max_items_in_row`): that of an ambiguous grammar is 180 ms at 2,000, the library's own limit,
and 4 ms at 500, which an object takes whose properties 120 may be left out in a row."""
CHECK_BYTES = 1_000_000_000
"""Memory that checking a grammar may take, the interpreter's own included."""
CHECK_SECONDS = 20.0
"""From the start of a check to its end, however busy the machine is; its own computing is bounded more tightly."""
KEPT = 8
"""Grammars that stay built."""
_ONE_LINE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON is written as `json.dumps` does: a small model that may indent may spend all its tokens on spaces."""
_CHECK = Path(__file__).with_name("guide_check.py")


class AnswerGuide:
    """How far one answer has come through what it has to be.

    Args:
        matcher: at its beginning. param: the field that asked for it.
    """

    def __init__(self, matcher: LLMatcher, param: str) -> None:
        self.matcher, self.param = matcher, param

    def take(self, token: int) -> None:
        """Go on by a token.

        Raises:
            ServeError: the grammar became too much to follow on the way.
        """
        taken = self.matcher.consume_token(token)
        if not taken or self.matcher.is_error():  # one that has failed takes an end all the same
            logger.warning("a guide cannot go on: %s", self.matcher.get_error()[:500])
            told = GUIDE_TOO_COMPLEX.format(param=self.param)
            raise ServeError(ErrorKind.INVALID_REQUEST, told, self.param)

    @property
    def finished(self) -> bool:
        """Whether nothing can follow but the end."""
        return self.matcher.is_stopped()


class Guides:
    """Makes guides for the answers of one model; may be called in several threads at once.

    Args:
        tokenizer: of the model. size: of its vocabulary, as wide as its logits. ends: ids that are its own end.
    """

    def __init__(self, tokenizer: Any, size: int, ends: Sequence[int]) -> None:
        self.tokenizer, self.size, self.ends = tokenizer, size, list(ends)
        self._lock = threading.Lock()
        self._tokens: LLTokenizer | None = None
        self._known: OrderedDict[Guide, LLMatcher] = OrderedDict()

    def begin(self, guide: Guide) -> AnswerGuide:
        """
        Raises:
            ServeError: what is asked for cannot be read, or not be followed.
        """
        with self._lock:
            matcher = self._known.get(guide)
            if self._tokens is None:
                self._tokens = self._read_tokenizer(guide)
        if matcher is None:  # not under the lock: others need not wait
            matcher = self._built(guide, self._tokens)
        with self._lock:
            self._known[guide] = matcher
            self._known.move_to_end(guide)
            if len(self._known) > KEPT:
                self._known.popitem(last=False)
        return AnswerGuide(matcher.deep_copy(), guide.param)

    @staticmethod
    def _built(guide: Guide, tokens: LLTokenizer) -> LLMatcher:
        try:
            grammar = written(guide)
        except ValueError as error:
            raise _refused(guide, str(error)) from error
        if wrong := checked(grammar):
            raise _refused(guide, wrong)
        matcher = LLMatcher(tokens, grammar, log_level=0, limits=LLParserLimits(**LIMITS))
        if not matcher.is_error():
            matcher.compute_bitmask()  # the first look is often the longest, and shows whether anything can be written at all
        if matcher.is_error():
            raise _refused(guide, matcher.get_error())
        return matcher

    def _read_tokenizer(self, guide: Guide) -> LLTokenizer:
        try:
            return from_tokenizer(self.tokenizer, n_vocab=self.size, eos_token=self.ends or None)
        except ValueError as error:  # of a kind that the library cannot read
            logger.warning("answers of this model cannot be guided: %s", error)
            raise ServeError(ErrorKind.INVALID_REQUEST, GUIDES_UNSUPPORTED, guide.param) from error


def written(guide: Guide) -> str:
    """A guide as a grammar of the library's. A space may stand first, as in the tokens that most answers begin with: it is no part of the
    answer's text."""
    if guide.kind is GuideKind.GRAMMAR:
        return grammar_from("grammar", guide.text)
    if guide.kind is GuideKind.JSON:
        schema = json.loads(guide.text)
        options = {"x-guidance": _ONE_LINE}
        return f'start: " "? text\ntext: %json {json.dumps({**(schema if isinstance(schema, dict) else {}), **options})}'
    pattern = guide.text if guide.kind is GuideKind.REGEX else "|".join(re.escape(choice) for choice in json.loads(guide.text))
    return f'start: " "? text\ntext: /{regex_to_lark(pattern, "")}/'


def checked(grammar: str) -> str:
    """What is wrong with a grammar, in the library's words; nothing if it can be built, within bounds of time and memory."""
    asked = {"path": [place for place in sys.path if place], "grammar": grammar, "limits": LIMITS, "bytes": CHECK_BYTES}
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(_CHECK)], input=json.dumps(asked).encode(), capture_output=True, timeout=CHECK_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return "it takes too long to build"
    if done.returncode:
        logger.warning("the check of a grammar ended with status %d: %s", done.returncode, done.stderr[-500:].decode(errors="replace"))
        return "it takes too much to build"
    return done.stdout.decode()


def _refused(guide: Guide, error: str) -> ServeError:
    """What a client reads; the library's own words go to the log, but for names of JSON Schema."""
    logger.info("a guide was refused (%s): %s", guide.param, error[:500])
    unknown = re.search(r"Unimplemented keys: \[(.*?)\]", error)
    named = sorted(UNSUPPORTED_KEYWORDS & set(re.findall(r"\w+", unknown[1]))) if unknown else []
    told = (GUIDE_UNSUPPORTED_KEYWORDS if named else GUIDE_UNSUPPORTED).format(param=guide.param, keywords=", ".join(named))
    return ServeError(ErrorKind.INVALID_REQUEST, told, guide.param)


@cache
def _executor() -> LLExecutor:
    return LLExecutor()


def allowed(guides: Sequence[AnswerGuide], size: int, device: torch.device) -> Tensor:
    """(R, V) bool: which tokens may come next in each answer; only the end in one that failed on the way, which `take` then tells.

    Args:
        size: V, as wide as the logits.
    """
    words = (size + 31) // 32
    bits = torch.zeros(len(guides), words, dtype=torch.int32)
    looks = [(each.matcher, row) for row, each in enumerate(guides)]
    _executor().unsafe_compute_mask_ptr(looks, bits.data_ptr(), words * bits.element_size(), len(guides))
    return (bits.to(device)[:, :, None] >> torch.arange(32, device=device) & 1).bool().flatten(1)[:, :size]
