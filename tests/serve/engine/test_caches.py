"""Encoded pictures are kept within bytes, and never mistaken for one another."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from llava.serve.engine import caches
from llava.serve.engine.caches import TensorCache, image_key, prefix_key


def features(value: float, rows: int = 4) -> torch.Tensor:
    return torch.full((1, rows, 2), value, dtype=torch.float32)  # 8 bytes a row


def test_the_longest_unused_leaves_first():
    cache = TensorCache(100)
    cache.put("a", features(1))
    cache.put("b", features(2))
    cache.put("c", features(3))
    assert cache.get("a") is not None  # now "b" is the longest unused
    cache.put("d", features(4))
    assert "b" not in cache and all(key in cache for key in "acd")
    assert cache.bytes == 96 and len(cache) == 3
    assert cache.get("b") is None
    assert (cache.hits, cache.misses) == (1, 1)
    cache.clear()
    assert (len(cache), cache.bytes) == (0, 0)


def test_what_does_not_fit_is_not_kept():
    cache = TensorCache(40)
    cache.put("large", features(1, rows=6))
    assert "large" not in cache
    nothing = TensorCache(0)
    nothing.put("a", features(1))
    assert "a" not in nothing and (len(nothing), nothing.bytes) == (0, 0)
    with pytest.raises(ValueError, match="-5 bytes"):
        TensorCache(-5)


def test_an_entry_does_not_keep_its_batch_alive():
    cache = TensorCache(1000)
    batch = torch.zeros(50, 4, 2)
    cache.put("a", batch[:1])
    kept = cache.get("a")
    assert kept is not None and kept[0].untyped_storage().nbytes() == 32


def test_a_key_holds_pixels_mode_size_and_revision():
    base = Image.new("RGB", (4, 6), "red")
    other = [
        image_key(Image.new("RGB", (6, 4), "red"), "one"),  # the same bytes in another shape
        image_key(Image.new("RGB", (4, 6), "blue"), "one"),
        image_key(base.convert("L"), "one"),
        image_key(base, "two"),
        image_key(Image.frombytes("L", (12, 6), base.tobytes()), "one"),  # the same bytes in another mode
    ]
    keys = {image_key(base, "one"), *other}
    assert len(keys) == 6
    assert image_key(base.copy(), "one") == image_key(base, "one")


@pytest.mark.parametrize("pixels", [1, 4, 9, 23, 24])
def test_a_key_does_not_depend_on_how_many_pixels_are_looked_at_at_a_time(pixels, monkeypatch):
    image = Image.effect_noise((4, 6), 90).convert("RGB")
    whole = image_key(image, "one")
    monkeypatch.setattr(caches, "_HASHED_PIXELS", pixels)
    assert image_key(image, "one") == whole


def test_a_look_counts_nothing_and_keeps_nothing_from_leaving():
    cache = TensorCache(100)
    first, second = torch.zeros(10), torch.ones(10)
    cache.put("a", first)
    cache.put("b", second)
    assert cache.peek("a") is not None and cache.peek("c") is None and (cache.hits, cache.misses) == (0, 0)
    cache.put("c", first)
    assert "a" not in cache


def test_the_key_of_a_beginning_holds_ids_pictures_granularities_and_revision():
    base = prefix_key([1, 2, -200, 3], [("a", 36)], "one")
    others = {
        prefix_key([1, 2, -200, 3], [("a", 72)], "one"),
        prefix_key([1, 2, -200, 3], [("b", 36)], "one"),
        prefix_key([1, 2, -200], [("a", 36)], "one"),
        prefix_key([12, -200, 3], [("a", 36)], "one"),
        prefix_key([1, 2, -200, 3], [("a", 36)], "two"),
        prefix_key([1, 2, -200, 3], [("a", 36), ("a", 36)], "one"),
    }
    assert base not in others and len(others) == 6
    assert prefix_key([1, 2, -200, 3], [("a", 36)], "one") == base
