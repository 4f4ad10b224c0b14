"""The reader of JSON values: what people's files hold is read, or one sentence names the line and the cure."""

from __future__ import annotations

import hashlib
import io
import json
import math
import random
from typing import Any

import pytest

import llava.json_rows as json_rows
from llava.json_rows import JsonRow, iter_rows, parse_row


def rows_of(data: str | bytes, allow_nan: bool = True) -> list[JsonRow]:
    return list(iter_rows(io.BytesIO(data.encode() if isinstance(data, str) else data), "FILE", allow_nan))


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ('{"a": 1}\n{"b": 2}\n', [1, 2]),
        ('\n\n{"a": 1}\r\n \r\n{"b": 2}', [3, 5]),
        ('{"a": 1}{"b": 2}', [1, 1]),
        ('{"a": 1} \t {"b": 2}', [1, 1]),
        ('{\n  "a": 1\n}\n{\n"b":\n2\n}\n', [1, 4]),
        ('\ufeff{"a": 1}\n\ufeff{"b": 2}', [1, 2]),
        ('{"a": 1}\r{"b": 2}\r', [1, 1]),
        ('[{"a": 1}, {"b": 2}]', [1, 1]),
        ('\ufeff [\n{"a": 1},\n{"b":\n2}\n]\n', [2, 3]),
        ('[{"a": 1}]\n[]\n[{"b": 2}]', [1, 3]),
        ('\x1e{"a": 1}\n\x1e{"b": 2}\n', [1, 2]),
    ],
)
def test_what_is_read(text: str, lines: list[int]) -> None:
    found = rows_of(text)
    assert [row.value for row in found] == [{"a": 1}, {"b": 2}]
    assert [row.line for row in found] == lines and not any(row.problem for row in found)
    assert [json.loads(row.text) for row in found] == [{"a": 1}, {"b": 2}]


@pytest.mark.parametrize("text", ["", "\n \r\n", "\ufeff", "[]", "[ ]\n[\n]"])
def test_nothing_is_no_row(text: str) -> None:
    assert rows_of(text) == []


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        ('{"id": ', "ends before it is complete"),
        ('{"id": "half a te', "Invalid control character|ends before it is complete"),
        ("{'id': 1}", "double quotes.*json.dumps"),
        ('{"id": tru}', "not valid JSON"),
        ("id,text", "not valid JSON"),
        (",", r"there is a comma where a row should start; .* into one \[ \]"),
        ("\0\0\0\0", "NUL characters, as in UTF-16 or in a file that was truncated"),
        ('{"id": "\0"}', "NUL characters"),
        ('{"w": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply; flatten it"),
        ('{"w": ' + "1" * 5000 + "}", "too many digits to be parsed; write it as a string"),
        ('{\n "id": 1\n "text": 2,\n "w": {\n }\n}', "not valid JSON .*at '\"text\": 2,'"),
    ],
)
def test_a_broken_value_costs_nothing_but_itself(broken: str, problem: str) -> None:
    """Between rows that are read, at the end and alone: one row, one sentence, and the rows behind it have their lines."""
    for before, after in (("", ""), ('{"a": 1}\n', ""), ('{"a": 1}\n', '\n{"b": 2}\n{"c": 3}')):
        found = rows_of(before + broken + after)
        wrong = [row for row in found if row.problem]
        assert [row.value for row in found if not row.problem] == [{"a": 1}] * bool(before) + [{"b": 2}, {"c": 3}] * bool(after)
        assert len(wrong) == 1 and wrong[0].line == 1 + bool(before) and wrong[0].value is None and len(wrong[0].problem) < 300
        if after:
            assert [row.line for row in found[-2:]] == [2 + 1 + broken.count("\n"), 2 + 2 + broken.count("\n")]
        with pytest.raises(ValueError, match=problem):
            parse_row(wrong[0].text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1},\n{"b" 2}]', "FILE is not a valid JSON list: line 2, after 1 rows: not valid JSON"),
        ('[{"a": 1},\n\n]', "line 3, after 1 rows: there is a comma before the closing"),
        ('[{"a": 1}\n{"b": 2}]', r"line 2, after 1 rows: the row is followed by '\{'"),
        ('[{"a": 1},\n', "after 1 rows: the value ends before it is complete"),
        ('[{"a": 1}\n', "after 1 rows: the list ends before it is complete"),
        ('[{"a": "x', "line 1, after 0 rows: the value ends before it is complete"),
        ('[1]\n{"b": 2}', r"line 2, after 1 rows: the list is followed by '\{'; put all rows into one list"),
        ("[" * 100_000, "line 1, after 0 rows: .* nested too deeply"),
    ],
)
def test_a_mistake_in_a_list_is_an_error(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rows_of(text)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a": 1}\n{"b": "\xff"}', r"line 2 of FILE is not UTF-8 \(invalid start byte\); save it as UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "line 1 of FILE is not UTF-8 .* iconv -f UTF-16"),
        (b'{"a": "\xe2\x98', "line 1 of FILE is not UTF-8"),
    ],
)
def test_bytes_that_are_no_text(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rows_of(data)


def test_the_line_of_a_bad_byte_is_counted_over_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "CHUNK_BYTES", 3)
    with pytest.raises(ValueError, match="line 41 of FILE is not UTF-8"):
        rows_of(b'{"a": 1}\n' * 40 + b"\xff")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_numbers_that_json_has_not(number: str) -> None:
    line = f'{{"w": [{number}]}}\n{{"a": 1.5}}'
    assert not math.isfinite(rows_of(line)[0].value["w"][0])
    refused, following = rows_of(line, allow_nan=False)
    assert refused.problem == f"{number} is not a number in JSON; write null or a finite number" and following.value == {"a": 1.5}
    with pytest.raises(ValueError, match="is not a number in JSON"):
        parse_row(refused.text, allow_nan=False)


def test_a_row_is_one_value() -> None:
    assert parse_row(' {"a": 1}\r\n') == {"a": 1}
    with pytest.raises(ValueError, match=r"followed by '\{\}'; give each value a line of its own"):
        parse_row('{"a": 1}{}')


@pytest.mark.parametrize("start", ['{"a": "', '["', '[{"a": ["', "x"])
def test_a_value_without_end_is_refused_before_memory_is(start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "MAX_ROW_CHARACTERS", 1000)
    monkeypatch.setattr(json_rows, "CHUNK_BYTES", 100)
    file = io.BytesIO(start.encode() + b"x" * 100_000)
    with pytest.raises(ValueError, match="line 1 of FILE starts a value of over 1,000 characters"):
        list(iter_rows(file, "FILE"))
    assert file.tell() < 5000


def _some_value(drawn: random.Random, depth: int = 0) -> Any:
    texts = ["", "ä", "\N{SNOWMAN}\U0001f600", 'quotes " \\ and ]},\n {', "\ud83d", "\u2028", "\ufeff", "NaN", "true"]
    simple = [None, True, 0, -1.5e-7, 10**20, *texts]
    kind = drawn.random() if depth < 4 else 1.0
    if kind < 0.3:
        return [_some_value(drawn, depth + 1) for _ in range(drawn.randrange(4))]
    if kind < 0.6:
        return {drawn.choice(texts): _some_value(drawn, depth + 1) for _ in range(drawn.randrange(4))}
    return drawn.choice(simple)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_a_window_that_moves_cuts_nothing(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any values, as a list and one after the other, whatever the chunks cut: the same values, texts and checksum."""
    monkeypatch.setattr(json_rows, "CHUNK_BYTES", size)
    drawn = random.Random(size)
    for _ in range(60):
        values = [{"row": _some_value(drawn)} for _ in range(drawn.randrange(1, 6))]
        options: dict[str, Any] = {"indent": drawn.choice([None, 0, 1]), "ensure_ascii": True}
        texts = [json.dumps(value, **options) for value in values]
        for text in (drawn.choice(["\n", "", "\r\n"]).join(texts), json.dumps(values, **options)):
            digest = hashlib.sha256()
            found = list(iter_rows(io.BytesIO(text.encode()), "FILE", digest=digest))
            assert [row.value for row in found] == values and digest.digest() == hashlib.sha256(text.encode()).digest()
            assert [json.loads(row.text) for row in found] == values


def test_half_lines_of_every_length() -> None:
    """A line cut anywhere, the next one below it or behind it: the rows around it are read, and no cut goes without a word."""
    whole = json.dumps({"id": 7, "text": 'a "b" \\ c', "w": [1, {"x": None}]})
    for cut in range(1, len(whole)):
        found = rows_of(f'{{"a": 1}}\n{whole[:cut]}\n{{"b": 2}}\n{{"c": 3}}')
        assert found[0].value == {"a": 1} and found[-1].value == {"c": 3}
        assert any(row.problem for row in found)
