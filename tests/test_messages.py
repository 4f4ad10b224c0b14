"""Turns: where their images stand."""

from __future__ import annotations

import pytest

from llava.messages import images_first, put_images_first, text_of_parts

IMG = "<image>"


@pytest.mark.parametrize(
    ("parts", "ordered"),
    [
        (["a", IMG], [IMG, "a"]),
        ([IMG, "a"], [IMG, "a"]),
        (["a", IMG, IMG], [IMG, IMG, "a"]),
        (["a", "b", IMG], [IMG, "a", "b"]),
        (["a", IMG, "\n", IMG, " "], [IMG, IMG, "a"]),
        (["", IMG, "a"], [IMG, "a"]),
        (["a", IMG, "b"], ["a", IMG, "b"]),
        (["a", IMG, "b", IMG], ["a", IMG, "b", IMG]),
        ([IMG, "a", IMG], [IMG, "a", IMG]),
        ([IMG, "a", IMG, "b"], [IMG, "a", IMG, "b"]),
        (["see <image> there", IMG], ["see <image> there", IMG]),
        ([IMG, IMG], [IMG, IMG]),
        ([" ", IMG], [IMG]),
        (["a", "", "b"], ["a", "", "b"]),
        ([""], [""]),
        ([], []),
    ],
)
def test_images_that_stand_together_come_first_and_others_keep_their_places(parts, ordered):
    assert images_first(parts) == ordered
    assert text_of_parts(parts) == "\n".join(ordered)
    assert put_images_first(text_of_parts(parts)) == text_of_parts(parts)


@pytest.mark.parametrize(
    ("text", "ordered"),
    [
        ("a?\n<image>", "<image>\na?"),
        ("a?<image>", "<image>\na?"),
        ("a? \n\n <image>\n", "<image>\na?"),
        ("a\nb <image> <image>", "<image>\n<image>\na\nb"),
        # nothing moves, nothing changes
        ("<image>a?", "<image>a?"),
        (" <image> <image> Which is red? ", " <image> <image> Which is red? "),
        ("Which of <image> and <image>", "Which of <image> and <image>"),
        ("Look at <image> please.", "Look at <image> please."),
        ("<image>\n", "<image>\n"),
        (" \n", " \n"),
        ("", ""),
    ],
)
def test_a_text_is_ordered_by_its_placeholders(text, ordered):
    assert put_images_first(text) == ordered
    assert put_images_first(ordered) == ordered
