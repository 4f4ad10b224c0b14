"""Rules take the values of their set and no others; one sentence names all that break them."""

from __future__ import annotations

import math
from typing import Any

import pytest

from llava.rules import Anything, Choice, Either, Flag, Integer, ListOf, Mapped, Nothing, Number, Rule, Text, faults, optional, refuse


@pytest.mark.parametrize(
    ("rule", "taken", "refused"),
    [
        (Integer(1, 3), [1, 3], [0, 4, True, 2.0, "2", None]),
        (Number(0, 1), [0, 1, 0.5], [-0.1, 1.1, math.nan, math.inf, True, "0", 10**400]),
        (Number(0, 1, above=True), [1e-320, 1], [0, 0.0]),
        (Flag(), [True, False], [0, 1, None, "true"]),
        (Nothing(), [None], [0, ""]),
        (Text(), ["a"], ["", 1, None, "a" * 5000]),
        (Text(r"mlp\dx", "mlpNx"), ["mlp2x"], ["mlp2x ", "mlpx"]),
        (Choice(("a", "b")), ["a"], ["c", ["a"], None]),
        (ListOf(Integer(0, 9), 1, 2), [[1], (1, 2)], [[], [1, 2, 3], [10], "1", {0: 1}]),
        (Mapped(Integer(0, 9), 1), [{}, {"a": 1}], [{"a": 10}, {"a": 1, "b": 1}, []]),
        (Anything(), [{}, {"a": []}], [[], None]),
        (Either(Integer(0, 1), Text()), [0, "a"], [2, []]),
        (optional(Integer(0, 1)), [None, 0], [2]),
    ],
)
def test_a_rule_takes_its_set_alone(rule: Rule, taken: list[Any], refused: list[Any]) -> None:
    assert all(map(rule.accepts, taken)) and not any(map(rule.accepts, refused)) and rule.expected


def test_one_sentence_names_every_fault_and_no_whole_book() -> None:
    found = faults({"a": 9, "b": "x" * 1000, "unknown": object()}, {"a": Integer(0, 1), "b": Flag(), "absent": Flag()}, "part")
    with pytest.raises(ValueError) as caught:
        refuse("The file", found)
    text = str(caught.value)
    assert text.startswith("The file cannot work: part.a is 9, expected a whole number from 0 to 1; part.b is 'xxx") and len(text) < 250
    refuse("The file", [])
    with pytest.raises(ValueError, match=r"f7; and 2 more\.$"):
        refuse("It", [f"f{number}" for number in range(10)])
