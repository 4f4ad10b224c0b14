"""API keys: comparing them, and reading them from a file."""

from __future__ import annotations

import hmac

import pytest

from llava.serve.http.keys import KeySet, read_secrets


def test_all_keys_are_compared_in_constant_time_whichever_fits(monkeypatch):
    compared = []

    def recording(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return hmac_compare(one, other)

    hmac_compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", recording)
    ring = KeySet(("first", "second-much-longer", "third"))
    for given in ("Bearer first", "Bearer third", "Bearer x", "Bearer " + "y" * 9999, "", None):
        compared.clear()
        ring.accepts(given)
        assert compared == [(32, 32)] * 3  # digests of one length: neither the key's length nor its start matters


@pytest.mark.parametrize("key", ["", "a b", "é", "a\n"])
def test_keys_that_no_header_can_carry_are_refused(key):
    with pytest.raises(ValueError, match="API key 2"):
        KeySet(("good", key))


def test_key_files(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# ours\none\n\n two \n")
    assert read_secrets(["zero"], str(file)) == ("zero", "one", "two")
    assert read_secrets(["zero"], None) == ("zero",)
    file.write_text("# none\n")
    with pytest.raises(ValueError, match="holds no key"):
        read_secrets([], str(file))
    with pytest.raises(ValueError, match="cannot be read"):
        read_secrets([], str(tmp_path))
