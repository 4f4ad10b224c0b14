"""Bodies as JSON: what is parsed, and what is refused."""

from __future__ import annotations

import pytest

from llava.serve.http.errors import FieldError
from llava.serve.http.strict_json import MAX_JSON_ITEMS, parse_json
from llava.serve.protocol import ErrorKind


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": -Infinity}',
        b'{"a": 1e999}',
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": 1, "a": 2}',
        b'{"a": "\xff"}',
        b'"\xed\xa0\x80"',
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b"[" + b"1," * MAX_JSON_ITEMS + b"1]",
        b"\xef\xbb\xbf{}",
        '{"a": 1}'.encode("utf-16"),
        b'{"a": "\n"}',
        b"{} {}",
    ],
)  # fmt: skip
def test_json_is_read_strictly(body):
    with pytest.raises(FieldError) as refused:
        parse_json(body)
    assert refused.value.kind is ErrorKind.INVALID_REQUEST and len(refused.value.detail) < 100


def test_plain_json_is_read():
    assert parse_json(b'{"a": [1, -2.5, "\\ud83d\\ude00", null, true]}') == {"a": [1, -2.5, "\U0001f600", None, True]}


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("Hello \\ud83d", "Hello \ufffd"),
        ("\\uDE00 world", "\ufffd world"),
        ("\\ud83d\\ud83d\\uDe00", "\ufffd\U0001f600"),
        ("\\uDBFF\\uDFFF", "\U0010ffff"),
        ("\\\\ud83d", "\\ud83d"),  # an escaped backslash before plain letters
        ("\\\\\\ud83d", "\\\ufffd"),
        ("\\ud83d\\n", "\ufffd\n"),
    ],
)
def test_a_lone_surrogate_is_read_as_the_replacement_character(written, read):
    assert parse_json(f'{{"a": ["{written}"]}}'.encode()) == {"a": [read]}
    assert parse_json(f'{{"{written}": 1}}'.encode()) == {read: 1}


@pytest.mark.parametrize(
    "body", [b'{"\\ud800": 1, "\\ud801": 2}', b'{"a": "\\ud8"}', b'{"a": "\\UD83D"}', b'{"a": \\ud83d}', b'"\xed\xa0\xbd"']
)
def test_a_lone_surrogate_lets_no_other_error_through(body):
    with pytest.raises(FieldError):
        parse_json(body)
