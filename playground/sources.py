"""The two public sources the micro world borrows images from, and how they are divided among the splits.

* easy-VQA (package ``easy-vqa``): 64x64 images of one shape, with their own questions. Its training images are
  divided between train and validation, its test images serve test alone.
* the handwritten digits of scikit-learn: 1,797 real scans, divided by a fixed permutation.

No image and no scan belongs to two splits; everything here is read once and kept.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass
from functools import cache

import easy_vqa
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

SPLITS = ("train", "validation", "test")
POSTER_KINDS = ("circle", "rectangle", "triangle")
POSTER_COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
VALIDATION_POSTERS = 400
SCAN_SHARES = {"train": (0, 1397), "validation": (1397, 1547), "test": (1547, 1797)}
DIVISION_SEED = 20241002


@dataclass(frozen=True)
class PosterSource:
    """One easy-VQA image: its file, what it shows, and its own (question, answer) pairs."""

    key: str
    path: str
    kind: str
    colour: str
    questions: tuple[tuple[str, str], ...]


def _claimed_words(question: str, answer: str) -> set[str]:
    """The shape and colour words that a question and its answer together assert about the image."""
    words = set(question.rstrip("?").split())
    if answer not in ("yes", "no"):
        return words | {answer}
    negated = bool(words & {"not", "no"})
    return words if (answer == "yes") != negated else set()


def _read_half(half: str) -> list[PosterSource]:
    """All images of easy-VQA's ``half`` ("train" or "test") whose shape and colour its questions settle."""
    paths = getattr(easy_vqa, f"get_{half}_image_paths")()
    texts, answers, owners = getattr(easy_vqa, f"get_{half}_questions")()
    asked: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for text, answer, owner in zip(texts, answers, owners, strict=True):
        asked[owner].append((text, answer))
    sources = []
    for owner in sorted(paths):
        claimed = set().union(*(_claimed_words(text, answer) for text, answer in asked[owner]))
        kinds, colours = claimed & set(POSTER_KINDS), claimed & set(POSTER_COLOURS)
        if len(kinds) == 1 and len(colours) == 1:
            key = f"{half}/{owner}"
            sources.append(PosterSource(key, paths[owner], kinds.pop(), colours.pop(), tuple(asked[owner])))
    return sources


@cache
def posters(split: str) -> tuple[PosterSource, ...]:
    """The easy-VQA images of ``split`` (one of SPLITS)."""
    if split == "test":
        return tuple(_read_half("test"))
    pool = _read_half("train")
    random.Random(DIVISION_SEED).shuffle(pool)
    return tuple(pool[:VALIDATION_POSTERS] if split == "validation" else pool[VALIDATION_POSTERS:])


@cache
def poster_image(path: str) -> Image.Image:
    """The 64x64 RGB image at ``path``."""
    with Image.open(path) as image:
        return image.convert("RGB")


@cache
def _scans() -> tuple[np.ndarray, np.ndarray]:
    digits = load_digits()
    return (digits.images * (255 / 16)).astype(np.uint8), digits.target


@cache
def scan_indices(split: str) -> tuple[int, ...]:
    """Indices into scikit-learn's digits that belong to ``split``."""
    order = list(range(len(_scans()[1])))
    random.Random(DIVISION_SEED).shuffle(order)
    first, last = SCAN_SHARES[split]
    return tuple(sorted(order[first:last]))


def scan_digit(index: int) -> int:
    """The digit that scan ``index`` shows, 0 to 9."""
    return int(_scans()[1][index])


@cache
def scan_image(index: int) -> Image.Image:
    """Scan ``index`` as an 8x8 grey image, ink bright on black."""
    return Image.fromarray(_scans()[0][index])
