"""Turns: where their images stand, and what becomes of conversations that no template can write as they are."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.conversation import conv_templates
from llava.messages import ROLES, Message, images_first, normalise_turns, prompt_spans, put_images_first, text_of_parts

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


def said(*turns):
    """Turns by the first letters of their roles."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [Message(roles[turn[0]], turn[2:]) for turn in turns]


@pytest.mark.parametrize(
    ("turns", "count", "normal"),
    [
        (["u:q"], 0, ["u:q"]),
        (["s:x", "u:q", "a:r", "u:t"], 0, ["s:x", "u:q", "a:r", "u:t"]),
        # nothing said
        (["u:q", "a:", "u:t"], 0, ["u:q\nt"]),
        (["u:q", "a:\n", "u:t"], 0, ["u:q\nt"]),
        (["u:", "a:r", "u:t"], 0, ["a:r", "u:t"]),
        (["s: ", "u:q"], 0, ["u:q"]),
        (["s:", "s:x", "u:", "u:q"], 0, ["s:x", "u:q"]),
        (["u:q", "u: "], 0, ["u:q"]),
        (["u:q", "a:"], 0, ["u:q"]),
        # in a row
        (["u:q", "u:t"], 0, ["u:q\nt"]),
        (["u:q", "a:r", "a:p", "u:t"], 0, ["u:q", "a:r\np", "u:t"]),
        (["s:x", "s:y", "u:q"], 0, ["s:x\ny", "u:q"]),
        # the assistant first and last
        (["a:r", "u:q"], 0, ["a:r", "u:q"]),
        (["u:q", "a:r"], 0, ["u:q", "a:r"]),
        (["s:x", "a:r", "u:q", "a:p"], 0, ["s:x", "a:r", "u:q", "a:p"]),
        # system turns behind others
        (["u:q", "a:r", "s:x", "u:t"], 0, ["u:q", "a:r", "u:x\nt"]),
        (["a:r", "s:x", "u:q"], 0, ["a:r", "u:x\nq"]),
        (["u:q", "s:x"], 0, ["u:q\nx"]),
        (["u:q", "a:r", "s:x"], 0, ["u:q", "a:r", "u:x"]),
        # images
        (["u:"], 2, ["u:<image>\n<image>\n"]),
        (["u:q"], 2, ["u:<image>\n<image>\nq"]),
        (["u:", "a:r", "u:q"], 1, ["a:r", "u:<image>\nq"]),
        (["u:<image>"], 1, ["u:<image>"]),
        (["u:q", "u:<image>"], 1, ["u:<image>\nq"]),
        (["u:<image>", "u:q"], 1, ["u:<image>\nq"]),
        (["u:<image>", "a:", "u:"], 1, ["u:<image>"]),
        (["u:q", "a:r", "a:", "s:"], 0, ["u:q", "a:r"]),
        (["u:q <image-placeholder>"], 1, ["u:<image>\nq"]),
        (["u:q <image>", "u:t <image>"], 2, ["u:<image>\nq\n<image>\nt"]),
        (["u:q <image>", "a:r", "u:t <image>"], 2, ["u:<image>\nq", "a:r", "u:<image>\nt"]),
    ],
)
def test_any_conversation_becomes_one_that_templates_can_write(turns, count, normal):
    assert normalise_turns(said(*turns), count) == said(*normal)
    assert normalise_turns(said(*normal), count) == said(*normal)


@pytest.mark.parametrize(
    ("turns", "count", "told"),
    [
        ([], 0, "There is no turn of the user's; give a question."),
        (["s:x"], 0, "There is no turn of the user's; give a question."),
        (["a:r", "s:x"], 1, "There is no turn of the user's; give a question."),
        (["u: "], 0, "Turn 0 is empty; give a question."),
        (["s:x", "u:", "a:r"], 0, "Turn 1 is empty; give a question."),
        (["u:q", "a:r", "u:\n"], 0, "Turn 2 is empty; give a question."),
        (["u:<image>q", "a:r", "u:", "a:"], 1, "Turn 2 is empty; give a question."),
        (["u:<image>q"], 0, "holds 1 <image> placeholders, but 0 images"),
        (["u:<image>q"], 2, "holds 1 <image> placeholders, but 2 images"),
        (["s:<image>", "u:q"], 1, "system turn holds an <image>"),
    ],
)
def test_what_cannot_be_answered_is_told(turns, count, told):
    with pytest.raises(ValueError, match=told):
        normalise_turns(said(*turns), count)


TEXTS = st.sampled_from(["", " \n", "w", "w\n\nw", "</s>w", "<s>", "USER: w ASSISTANT:"])
TEMPLATES = sorted(name for name, template in conv_templates.items() if "plain" not in name and not template.offset)
TURNS = st.lists(st.builds(Message, st.sampled_from(ROLES), TEXTS), max_size=8)


@settings(max_examples=150, deadline=None)
@given(turns=TURNS, num_images=st.integers(0, 2), template=st.sampled_from(TEMPLATES))
def test_whatever_is_sent_is_written_whole_or_refused(turns, num_images, template):
    try:
        normal = normalise_turns(turns, num_images)
    except ValueError:
        asked = [turn.role for turn in turns if turn.text.strip() or (num_images and turn.role == "user")]
        assert "user" not in asked or turns[-1].text.strip() == ""
        return
    assert normalise_turns(normal, num_images) == normal
    roles = [turn.role for turn in normal]
    assert roles.count("system") <= 1 and "system" not in roles[1:] and "user" in roles
    assert all(one != other for one, other in pairwise(roles))
    # every word is there, in order, as words; the template's own texts hold none of them
    spans = prompt_spans(turns, num_images, template)
    written = "".join(span.text for span in spans if span.is_text).split()
    assert "".join(written).endswith("".join("".join(turn.text for turn in turns).split()))
    assert sum(span.text == "<image>" for span in spans) == num_images
