"""Structured output: which tokens may come next in an answer that must follow a JSON schema, a regular expression or a grammar.

llguidance compiles the grammars and computes the masks; the limits are set here. A grammar comes from a client, so it is first built in a
process of its own (`guide_check.py`), which a hostile one may crash; and the library bounds each mask's work by what it calls fuel.
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
"""Of `LLParserLimits`: some milliseconds per mask, and about 40 MB per grammar. The time of a mask grows with the cube of the parser's
items per row (`max_items_in_row`): an ambiguous grammar takes 180 ms at 2,000, the library's default, and 4 ms at 500, which is enough for
an object of 120 optional properties in a row."""
CHECK_BYTES = 1_000_000_000
"""Memory that checking a grammar may take, the interpreter's own included."""
CHECK_SECONDS = 20.0
"""Wall time of a check, however busy the machine is; its CPU time is bounded more tightly."""
KEPT = 8
"""Compiled grammars that are cached."""
_ONE_LINE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON as `json.dumps` writes it: a small model that may indent can spend all its tokens on spaces."""
_CHECK = Path(__file__).with_name("guide_check.py")


class AnswerGuide:
    """One answer's position in its grammar.

    Args:
        matcher: at the start. param: the request field that gave the grammar. request_id: names the request in the log.
    """

    def __init__(self, matcher: LLMatcher, param: str, request_id: str) -> None:
        self.matcher, self.param, self.request_id = matcher, param, request_id

    def take(self, token: int) -> None:
        """Advance by a token.

        Raises:
            ServeError: following the grammar exceeded the limits.
        """
        taken = self.matcher.consume_token(token)
        if not taken or self.matcher.is_error():  # a failed matcher still accepts an end
            logger.warning("request %s: its guide cannot advance: %s", self.request_id, self.matcher.get_error()[:500])
            message = GUIDE_TOO_COMPLEX.format(param=self.param)
            raise ServeError(ErrorKind.INVALID_REQUEST, message, self.param)

    @property
    def finished(self) -> bool:
        """Whether only the end can follow."""
        return self.matcher.is_stopped()


class Guides:
    """Makes guides for the answers of one model; thread-safe.

    Args:
        tokenizer: of the model. size: width of its logits. ends: its end-of-sequence ids.
    """

    def __init__(self, tokenizer: Any, size: int, ends: Sequence[int]) -> None:
        self.tokenizer, self.size, self.ends = tokenizer, size, list(ends)
        self._lock = threading.Lock()
        self._tokens: LLTokenizer | None = None
        self._known: OrderedDict[Guide, LLMatcher] = OrderedDict()

    def begin(self, guide: Guide, request_id: str) -> AnswerGuide:
        """A guide at the start of an answer.

        Args:
            request_id: names the request in the log, where the details of a refusal are.

        Raises:
            ServeError: the grammar cannot be parsed, or not be followed within the limits.
        """
        with self._lock:
            matcher = self._known.get(guide)
            if self._tokens is None:
                self._tokens = self._read_tokenizer(guide, request_id)
        if matcher is None:  # outside the lock, so that others need not wait
            try:
                matcher = self._built(guide, self._tokens)
            except ValueError as error:
                raise _refused(guide, str(error), request_id) from error
        with self._lock:
            self._known[guide] = matcher
            self._known.move_to_end(guide)
            if len(self._known) > KEPT:
                self._known.popitem(last=False)
        return AnswerGuide(matcher.deep_copy(), guide.param, request_id)

    @staticmethod
    def _built(guide: Guide, tokens: LLTokenizer) -> LLMatcher:
        grammar = to_grammar(guide)
        if wrong := grammar_error(grammar):
            raise ValueError(wrong)
        matcher = LLMatcher(tokens, grammar, log_level=0, limits=LLParserLimits(**LIMITS))
        if not matcher.is_error():
            matcher.compute_bitmask()  # the first mask is often the slowest, and shows whether any text is possible
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return matcher

    def _read_tokenizer(self, guide: Guide, request_id: str) -> LLTokenizer:
        try:
            return from_tokenizer(self.tokenizer, n_vocab=self.size, eos_token=self.ends or None)
        except ValueError as error:  # a kind of tokenizer that the library does not support
            logger.warning("request %s: answers of this model cannot be guided: %s", request_id, error)
            raise ServeError(ErrorKind.INVALID_REQUEST, GUIDES_UNSUPPORTED, guide.param) from error


def to_grammar(guide: Guide) -> str:
    """A guide in the library's grammar format. A leading space is allowed, as in the tokens that most answers start with; it is not part of
    the answer's text."""
    if guide.kind is GuideKind.GRAMMAR:
        return grammar_from("grammar", guide.text)
    if guide.kind is GuideKind.JSON:
        schema = json.loads(guide.text)
        options = {"x-guidance": _ONE_LINE}
        return f'start: " "? text\ntext: %json {json.dumps({**(schema if isinstance(schema, dict) else {}), **options})}'
    pattern = guide.text if guide.kind is GuideKind.REGEX else "|".join(re.escape(choice) for choice in json.loads(guide.text))
    return f'start: " "? text\ntext: /{regex_to_lark(pattern, "")}/'


def grammar_error(grammar: str) -> str:
    """What is wrong with a grammar, in the library's words; empty if it builds within the bounds of time and memory."""
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


def _refused(guide: Guide, error: str, request_id: str) -> ServeError:
    """The client's error; of the library's own words, which are logged, only JSON Schema keywords are passed on."""
    logger.info("request %s: its guide in %s is refused: %s", request_id, guide.param, error[:500])
    unknown = re.search(r"Unimplemented keys: \[(.*?)\]", error)
    named = sorted(UNSUPPORTED_KEYWORDS & set(re.findall(r"\w+", unknown[1]))) if unknown else []
    message = (GUIDE_UNSUPPORTED_KEYWORDS if named else GUIDE_UNSUPPORTED).format(param=guide.param, keywords=", ".join(named))
    return ServeError(ErrorKind.INVALID_REQUEST, message, guide.param)


@cache
def _executor() -> LLExecutor:
    return LLExecutor()


def allowed(guides: Sequence[AnswerGuide], size: int, device: torch.device) -> Tensor:
    """(R, V) bool: which tokens may come next in each answer; only the end in one that has failed, which `take` then reports.

    Args:
        size: V, the width of the logits.
    """
    width = (size + 31) // 32  # of a row's mask, in 32-bit words
    bits = torch.zeros(len(guides), width, dtype=torch.int32)
    matchers = [(each.matcher, row) for row, each in enumerate(guides)]
    _executor().unsafe_compute_mask_ptr(matchers, bits.data_ptr(), width * bits.element_size(), len(guides))
    return (bits.to(device)[:, :, None] >> torch.arange(32, device=device) & 1).bool().flatten(1)[:, :size]
