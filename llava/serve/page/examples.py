"""Questions to start with, about the images that ship with the repository."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.serve.page.sessions import ChatImage, read_image

FOLDER = Path(__file__).resolve().parents[3] / "playground" / "images"
FAMILIES = ("shape_colour", "number", "pole")
"""One question per image: of a coarse, a fine and a middling granularity."""


@dataclass(frozen=True)
class Example:
    """A question about an image."""

    question: str
    image: ChatImage
    path: Path

    def message(self) -> Any:
        """As Gradio's chatbot shows it while it is empty."""
        return {"text": self.question, "icon": str(self.path)}


def load_examples(folder: Path = FOLDER) -> list[Example]:
    """The examples; none where the package was installed without the repository around it."""
    listing = folder / "samples.json"
    if not listing.is_file():
        return []
    scenes = json.loads(listing.read_text(encoding="utf-8"))
    examples = []
    for scene, family in zip(scenes, FAMILIES, strict=False):
        question = next(question["text"] for question in scene["questions"] if question["family"] == family)
        path = folder / scene["image"]
        examples.append(Example(question, read_image(path.read_bytes()), path))
    return examples
