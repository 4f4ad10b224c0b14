"""What a stored value may be: types and ranges as data, and one sentence for all that break them.

A rule knows JSON values alone; which field has which rule is declared beside the fields, in `config.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

SHOWN_CHARACTERS = 60
"""A wrong value is shown up to this length; files may hold a whole book."""


class Rule(Protocol):
    """A set of values."""

    @property
    def expected(self) -> str:
        """The set in words, as they follow "expected"."""

    def accepts(self, value: Any) -> bool:
        """Whether a value belongs to it."""


@dataclass(frozen=True)
class Integer:
    """A whole number from `low` to `high`, both included."""

    low: int = 0
    high: int = 2**31 - 1

    @property
    def expected(self) -> str:
        return f"a whole number from {self.low} to {self.high}"

    def accepts(self, value: Any) -> bool:
        return type(value) is int and self.low <= value <= self.high


@dataclass(frozen=True)
class Number:
    """A finite number from `low` to `high`, both included; `above` leaves the lower end out."""

    low: float = 0.0
    high: float = 1.0
    above: bool = False

    @property
    def expected(self) -> str:
        return f"a number {'above' if self.above else 'from'} {self.low:g} {'and up ' if self.above else ''}to {self.high:g}"

    def accepts(self, value: Any) -> bool:
        is_number = type(value) in (int, float) and not (type(value) is float and not math.isfinite(value))
        return is_number and self.low <= value <= self.high and not (self.above and value == self.low)


@dataclass(frozen=True)
class Flag:
    """true or false."""

    expected: str = "true or false"

    def accepts(self, value: Any) -> bool:
        return type(value) is bool


@dataclass(frozen=True)
class Nothing:
    """null."""

    expected: str = "null"

    def accepts(self, value: Any) -> bool:
        return value is None


@dataclass(frozen=True)
class Text:
    """A text of `shortest` characters or more; with `pattern`, one that it matches, which `form` puts in words."""

    pattern: str = ""
    form: str = "a text"
    longest: int = 4096
    shortest: int = 1

    @property
    def expected(self) -> str:
        return self.form

    def accepts(self, value: Any) -> bool:
        fits = isinstance(value, str) and self.shortest <= len(value) <= self.longest
        return fits and (not self.pattern or re.fullmatch(self.pattern, value) is not None)


@dataclass(frozen=True)
class Choice:
    """One of some texts."""

    choices: tuple[str, ...]

    @property
    def expected(self) -> str:
        return f"one of {', '.join(self.choices)}"

    def accepts(self, value: Any) -> bool:
        return isinstance(value, str) and value in self.choices


@dataclass(frozen=True)
class ListOf:
    """A list of `shortest` to `longest` values of one rule."""

    item: Rule
    shortest: int = 0
    longest: int = 4096

    @property
    def expected(self) -> str:
        count = f"{self.shortest}" if self.shortest == self.longest else f"{self.shortest} to {self.longest}"
        return f"a list of {count} values, each {self.item.expected}"

    def accepts(self, value: Any) -> bool:
        return isinstance(value, (list, tuple)) and self.shortest <= len(value) <= self.longest and all(map(self.item.accepts, value))


@dataclass(frozen=True)
class Either:
    """What one of two rules takes."""

    one: Rule
    other: Rule

    @property
    def expected(self) -> str:
        return f"{self.one.expected}, or {self.other.expected}"

    def accepts(self, value: Any) -> bool:
        return self.one.accepts(value) or self.other.accepts(value)


@dataclass(frozen=True)
class Mapped:
    """An object whose values all follow one rule, whatever their names."""

    value: Rule
    longest: int = 65536

    @property
    def expected(self) -> str:
        return f"an object of up to {self.longest} values, each {self.value.expected}"

    def accepts(self, value: Any) -> bool:
        return isinstance(value, Mapping) and len(value) <= self.longest and all(map(self.value.accepts, value.values()))


@dataclass(frozen=True)
class Anything:
    """Any object; its fields are judged where they are read."""

    expected: str = "an object"

    def accepts(self, value: Any) -> bool:
        return isinstance(value, Mapping)


def optional(rule: Rule) -> Either:
    """The rule, or null."""
    return Either(rule, Nothing())


def faults(values: Mapping[str, Any], rules: Mapping[str, Rule], inside: str = "") -> list[str]:
    """One clause for each value that breaks its rule; a value without a rule, and a rule without a value, are no fault.

    Args:
        inside: what the values are part of, as in `vision_config`; it goes before their names.
    """
    prefix = f"{inside}." if inside else ""
    return [
        f"{prefix}{name} is {shown(values[name])}, expected {rule.expected}"
        for name, rule in rules.items()
        if name in values and not rule.accepts(values[name])
    ]


def shown(value: Any) -> str:
    """A value as an error quotes it."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def refuse(what: Any, found: list[str]) -> None:
    """Raise one `ValueError` that names every fault of `what`; nothing where there is none."""
    if found:
        more = f"; and {len(found) - 8} more" if len(found) > 8 else ""
        raise ValueError(f"{what} cannot work: {'; '.join(found[:8])}{more}.")
