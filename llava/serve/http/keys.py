"""API keys and tokens: where they are read from, and how they are compared."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from pathlib import Path


class KeySet:
    """API keys, compared in constant time: timing reveals neither how much of a key a guess has right nor which key it resembles.

    Args:
        keys: empty means that no key is required.

    Raises:
        ValueError: an empty key, or one that a header cannot carry.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        for number, key in enumerate(keys, start=1):
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise ValueError(f"API key {number} is empty or holds spaces or other than ASCII characters; choose letters and digits.")
        self._digests = [_digest(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def find(self, authorization: str | None) -> int | None:
        """The index of the key in a value of the Authorization header, or `None`."""
        scheme, _, given = (authorization or "").partition(" ")
        digest = _digest(given.strip())
        found = [hmac.compare_digest(digest, known) for known in self._digests]  # all of them, whichever matches
        return found.index(True) if any(found) and scheme.lower() == "bearer" else None

    def accepts(self, authorization: str | None) -> bool:
        """Whether a value of the Authorization header holds one of the keys."""
        return self.find(authorization) is not None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def read_secrets(values: Sequence[str], file: str | None) -> tuple[str, ...]:
    """Keys from the command line and from a file with one per line; empty lines and lines that start with `#` are skipped.

    Raises:
        ValueError: a file that cannot be read or holds no key.
    """
    if file is None:
        return tuple(values)
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The key file {file!r} cannot be read; check its path and rights.") from error
    found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not found:
        raise ValueError(f"The key file {file!r} holds no key; write one per line.")
    return (*values, *found)
