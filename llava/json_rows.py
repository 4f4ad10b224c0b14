"""The one reader of files that hold a sequence of JSON values: training rows, questions, answers.

The content of a file decides how it is read, not its name. A file that starts with `[` is a list, or several in a row, and their elements
are its rows; in any other file each value is a row, whether one per line (JSONL), several on a line, or one over several lines. Byte order
marks count as white space. The file is read through a window of a few rows, so a file of any size takes little memory.

Within a list nothing after a syntax error can be parsed, so it is an error. Elsewhere a value that cannot be parsed is a row of its own
that says what is wrong with it, and reading continues behind it. Nothing here knows what a row means.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

MAX_ROW_CHARACTERS = 64 * 2**20
"""Longest value; anything longer is not a row but a file of another format, or a broken one."""
CHUNK_BYTES = 2**20

_SPACE = re.compile(r"[\s\ufeff]*")
_NEXT_LINE = re.compile(r"\n")
_NEXT_VALUE = re.compile(r"\n(?=[\[{])")
_LONGEST_TOKEN = len(r"\ud83d\ude00") + 4
"""An error this close to the end of the window may be a literal or an escape that the window cuts."""
_QUOTED = 40


class JsonRow(NamedTuple):
    """A value of a file.

    Attributes:
        line: the line it starts in, counted from 1.
        text: the value as it is in the file.
        value: the parsed value; `None` where it cannot be parsed.
        problem: why it cannot be parsed and what to do, without a full stop; empty otherwise.
    """

    line: int
    text: str
    value: Any
    problem: str = ""


def read_rows(path: Path, allow_nan: bool = True) -> list[JsonRow]:
    """The values of a file; see `iter_rows`."""
    with path.open("rb") as file:
        return list(iter_rows(file, str(path), allow_nan))


def iter_rows(file: BinaryIO, name: str, allow_nan: bool = True, digest: Any = None) -> Iterator[JsonRow]:
    """Read a file of JSON values piece by piece.

    Args:
        file: open for bytes.
        name: what errors call the file.
        allow_nan: accept `NaN`, `Infinity` and numbers beyond the range of a float, as Python writes them; they are not JSON, so callers
            that pass values on refuse them.
        digest: a hash that is updated with every byte.

    Raises:
        ValueError: bytes that are not UTF-8, a value without an end, or a list with a syntax error; the message names the line.
    """
    window = _Window(file, name, allow_nan, digest)
    return _elements(window) if window.next_character() == "[" else _values(window)


def parse_row(text: str, allow_nan: bool = True) -> Any:
    """The value of a row's text.

    Raises:
        ValueError: why it cannot be parsed and what to do, without a full stop.
    """
    try:
        start = _skip_space(text, 0)
        value, end = _decoder(allow_nan).raw_decode(text, start)
    except (ValueError, RecursionError) as error:
        raise ValueError(_problem(error, text)) from error
    if (end := _skip_space(text, end)) < len(text):
        raise ValueError(f"the value is followed by {_quoted(text, end)}; give each value a line of its own")
    return value


def _values(window: _Window) -> Iterator[JsonRow]:
    """Values in sequence, on one line or on several."""
    while window.next_character():
        line = window.line
        try:
            row = JsonRow(line, *window.value())
        except BrokenFileError:
            raise
        except (ValueError, RecursionError) as error:
            text = window.skip_broken(getattr(error, "pos", window.at))
            row = JsonRow(line, text, None, _problem(error, text))
        yield row


def _elements(window: _Window) -> Iterator[JsonRow]:
    """The elements of lists that follow each other.

    Raises:
        ValueError: a syntax error; the message says in which line and after how many rows.
    """
    count = 0
    while start := window.next_character():
        if start != "[":
            raise window.error(count, f"the list is followed by {_quoted(start)}; put all rows into one list, or remove its brackets")
        window.at += 1
        if window.next_character() == "]":
            window.at += 1
            continue
        separator = ","
        while separator == ",":
            if window.next_character() == "]":
                raise window.error(count, "there is a comma before the closing ']'; remove it")
            line = window.line
            try:
                row = JsonRow(line, *window.value())
            except BrokenFileError:
                raise
            except (ValueError, RecursionError) as error:
                problem = _problem(error, window.text, window.at)
                window.at = getattr(error, "pos", window.at)
                raise window.error(count, problem) from error
            yield row
            count += 1
            separator = window.next_character()
            if separator not in (",", "]"):
                found = f"the row is followed by {separator!r}, expected ',' or ']'; repair the file"
                raise window.error(count, found if separator else f"the list {_CUT_OFF}")
            window.at += 1


class _Window:
    """A window that moves over a long text.

    Attributes:
        text: the window.
        at: position in the window where reading continues.
    """

    def __init__(self, file: BinaryIO, name: str, allow_nan: bool, digest: Any) -> None:
        self.text = ""
        self.at = 0
        self._name = name
        self._chunks = self._decoded(file, digest)
        self._scan = _decoder(allow_nan).raw_decode
        self._ended = False
        self._line = 1
        self._counted = 0

    @property
    def line(self) -> int:
        """The current line, counted from 1."""
        self._line += self.text.count("\n", self._counted, self.at)
        self._counted = self.at
        return self._line

    def next_character(self) -> str:
        """Skip white space; the next character, or an empty string at the end."""
        while True:
            self.at = _skip_space(self.text, self.at)
            if self.at < len(self.text):
                return self.text[self.at]
            if self._ended:
                return ""
            self._move()

    def value(self) -> tuple[str, Any]:
        """Text and value of the JSON value that starts here.

        Raises:
            ValueError, RecursionError: there is none, or it is longer than `MAX_ROW_CHARACTERS`.
        """
        while True:
            try:
                value, end = self._scan(self.text, self.at)
            except json.JSONDecodeError as error:
                if self._ended or not _may_be_cut(error):
                    raise
            else:
                if end < len(self.text) or self._ended:  # a number at the very end may continue
                    text, self.at = self.text[self.at : end], end
                    return text, value
            self._move_within_value()

    def skip_broken(self, mistake: int) -> str:
        """Continue after a value that cannot be parsed, and return its text.

        That is its line, or, where the error is in a later line than the value's start, everything up to the next line that starts like
        a row: a truncated line costs only itself, and a broken object over many lines is one broken row.

        Args:
            mistake: position of the error in the window.
        """
        end = _NEXT_LINE
        if "\n" in self.text[self.at : mistake]:
            end = _NEXT_VALUE
        while (match := end.search(self.text, self.at)) is None and not self._ended:
            self._move_within_value()
        stop = len(self.text) if match is None else match.start()
        text, self.at = self.text[self.at : stop], stop
        return text.rstrip()

    def error(self, count: int, problem: str) -> ValueError:
        """The error for a list that cannot be read beyond this position."""
        return ValueError(f"{self._name} is not a valid JSON list: line {self.line}, after {count} rows: {problem}.")

    def _move_within_value(self) -> None:
        if len(self.text) - self.at > MAX_ROW_CHARACTERS:
            raise BrokenFileError(
                f"line {self.line} of {self._name} starts a value of over {MAX_ROW_CHARACTERS:,} characters; give a JSON list of rows, or "
                "one row per line."
            )
        self._move()

    def _move(self) -> None:
        """Drop what was read and double what is left, so that a long value is scanned only a few times."""
        self._line, self._counted = self.line, 0
        parts = [self.text[self.at :]]
        missing = max(1, len(parts[0]))
        while missing > 0 and not self._ended:
            chunk = next(self._chunks, None)
            self._ended = chunk is None
            parts.append(chunk or "")
            missing -= len(parts[-1])
        self.text, self.at = "".join(parts), 0

    def _decoded(self, file: BinaryIO, digest: Any) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        lines = 1
        while True:
            chunk = file.read(CHUNK_BYTES)
            if digest is not None:
                digest.update(chunk)
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                line = lines + error.object.count(b"\n", 0, error.start)
                cure = "save it as UTF-8"
                if error.object[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                    cure = "it starts as UTF-16 does, so convert it: iconv -f UTF-16 -t UTF-8"
                raise BrokenFileError(f"line {line} of {self._name} is not UTF-8 ({error.reason}); {cure}.") from error
            if not chunk:
                return
            lines += chunk.count(b"\n")
            yield text


class BrokenFileError(ValueError):
    """The rest of the file cannot be read: bytes that are not text, or a value longer than `MAX_ROW_CHARACTERS`."""


class _NotInJsonError(ValueError):
    """A number that Python's parser accepts although it is not JSON."""


def _skip_space(text: str, start: int) -> int:
    match = _SPACE.match(text, start)
    assert match is not None
    return match.end()


def _decoder(allow_nan: bool) -> json.JSONDecoder:
    return json.JSONDecoder() if allow_nan else json.JSONDecoder(parse_constant=_refuse_number, parse_float=_finite)


def _refuse_number(text: str) -> float:
    raise _NotInJsonError(f"{text[:_QUOTED]} is not a number in JSON; write null or a finite number")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse_number(text)


def _may_be_cut(error: json.JSONDecodeError) -> bool:
    return error.msg.startswith("Unterminated string") or len(error.doc) - error.pos < _LONGEST_TOKEN


_CUT_OFF = "ends before it is complete, as in a truncated file; copy or write it again"


def _problem(error: Exception, text: str, start: int = 0) -> str:
    """What is wrong with the value that starts at `start` in `text`, and what to do."""
    if isinstance(error, RecursionError):
        return f"the value {_quoted(text, start)} is nested too deeply; flatten it"
    if not isinstance(error, json.JSONDecodeError):
        said = str(error)
        return "a number has too many digits to be parsed; write it as a string" if "integer string conversion" in said else said
    if "\0" in text[start : start + _QUOTED]:
        return "there are NUL characters, as in UTF-16 or in a file that was truncated while it was written; write it again as UTF-8"
    if text.startswith(",", start):
        return "there is a comma where a row should start; only lists have commas, so put all rows into one [ ], or remove the commas"
    if error.msg.startswith("Unterminated string") or not error.doc[error.pos :].strip():
        return f"the value {_CUT_OFF}"
    found = f"{error.msg.removesuffix(' at')} at {_quoted(error.doc, error.pos)}"
    return f"not valid JSON ({found}); repair the line, or write the file with json.dumps"


def _quoted(text: str, start: int = 0) -> str:
    found = text[start : start + _QUOTED].partition("\n")[0]
    return repr(found) if found else "the end of the line" if text[start : start + 1] else "the end"
