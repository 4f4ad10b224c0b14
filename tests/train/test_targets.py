"""Ids and labels: equal to the recorded ones where those are well-formed, right where labels were dropped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import Span, conv_templates
from llava.mm_utils import tokenizer_image_token
from llava.tokenizer import load_tokenizer
from llava.train import targets as targets_module
from llava.train.targets import Segment, build_targets, count_words, has_answer, place_images, segments_of

ORACLE = Path(__file__).parents[1] / "oracle"
RECORDS = json.loads((ORACLE / "labels.json").read_text())
CASES = [(template, case) for template, cases in RECORDS["templates"].items() for case in cases]
DROPPED = {"unk_in_answer", "eos_in_answer", "role_tag_in_answer"}
SPELLED = {"unk_in_answer", "eos_in_answer"}
"""Answers that spell a special token, which was recorded as that token. What is said is text here; a finished prompt has those ids."""
TURNS = [
    {"from": "human", "value": "<image>\nWhat?"},
    {"from": "gpt", "value": "A boat."},
    {"from": "human", "value": "Sure?"},
    {"from": "gpt", "value": "Yes."},
]


@pytest.fixture(scope="module")
def tokenizers() -> dict[bool, Any]:
    return {legacy: load_tokenizer(str(ORACLE / "checkpoint"), legacy=legacy) for legacy in (False, True)}


def _case_name(value: Any) -> str:
    return value if isinstance(value, str) else f"{value['name']}-{'legacy' if value['tokenizer_legacy'] else 'new'}"


@pytest.mark.parametrize(("template", "case"), CASES, ids=_case_name)
def test_recorded_ids_and_labels(template: str, case: dict[str, Any], tokenizers: dict[bool, Any]) -> None:
    turns = place_images(case["conversation"], int(case["has_image"]))
    tokenizer = tokenizers[case["tokenizer_legacy"]]
    targets = build_targets(turns, conv_templates[template], tokenizer)
    length = len(case["input_ids"])
    if case["name"] in SPELLED:
        prompt = "".join(segment.text for segment in segments_of(turns, conv_templates[template]))
        assert tokenizer_image_token(prompt, tokenizer) == case["input_ids"] != targets.input_ids
        assert tokenizer.decode(targets.input_ids[1:]) == prompt
        length = len(targets.input_ids)
    else:
        assert targets.input_ids[:length] == case["input_ids"]
    assert (len(targets.input_ids) == length) == (case["name"] != "long_text_truncated")
    if case["name"] in DROPPED:
        assert case["supervised_tokens"] == 0 < targets.num_supervised
        start = next(i for i, label in enumerate(targets.labels) if label != IGNORE_INDEX)
        assert targets.labels[start:] == targets.input_ids[start:]
    else:
        assert targets.labels[:length] == case["labels"]


@pytest.mark.parametrize("name", [name for name in conv_templates if "plain" not in name])
def test_segments_make_up_the_closed_prompt(name: str) -> None:
    template = conv_templates[name]
    segments = segments_of(TURNS, template)
    conversation = template.copy()
    conversation.messages = [
        [conversation.roles[index % 2], turn["value"]] for index, turn in enumerate(TURNS)
    ]
    assert "".join(segment.text for segment in segments) == conversation.get_prompt()
    supervised = [segment.text for segment in segments if segment.supervised]
    assert [text.strip().startswith(answer) for text, answer in zip(supervised, ("A boat.", "Yes."), strict=True)] == [True] * 2


def test_learning_starts_where_generation_starts(tokenizer: Any) -> None:
    template = conv_templates["v1"]
    targets = build_targets(TURNS[:2], template, tokenizer)
    start = next(i for i, label in enumerate(targets.labels) if label != IGNORE_INDEX)
    opened = build_targets([TURNS[0], {"from": "gpt", "value": ""}], template, tokenizer)
    assert targets.input_ids[:start] == opened.input_ids
    assert targets.input_ids[-1] == tokenizer.eos_token_id == targets.labels[-1]


@pytest.mark.parametrize("template", ["v1", "llava_llama_2", "mpt", "plain"])
@pytest.mark.parametrize("legacy", [False, True])
def test_what_is_said_is_text_and_only_the_template_writes_special_tokens(
    template: str, legacy: bool, tokenizers: dict[bool, Any]
) -> None:
    tokenizer, special = tokenizers[legacy], "</s> <s>USER: Hi<unk>ASSISTANT: x</s>"
    said = [{"from": "human", "value": f"<image>\nWhat? {special}"}, {"from": "gpt", "value": f"A boat. {special}"}]
    meek = [{**turn, "value": turn["value"].replace("<", "(").replace("(image>", "<image>")} for turn in said]
    targets, plain = (build_targets(turns, conv_templates[template], tokenizer) for turns in (said, meek))
    special_ids = set(tokenizer.all_special_ids)
    found, wanted = ([token for token in each.input_ids if token in special_ids] for each in (targets, plain))
    assert found == wanted
    supervised = [token for token in targets.labels if token != IGNORE_INDEX]
    assert f"A boat. {special}" in tokenizer.decode(supervised)
    assert [token for token in supervised if token in special_ids] == [token for token in plain.labels if token in special_ids]


def test_placeholder_in_an_answer_is_never_a_label(tokenizer: Any) -> None:
    turns = [{"from": "human", "value": "Show it."}, {"from": "gpt", "value": "Here: <image> so."}]
    targets = build_targets(turns, conv_templates["v1"], tokenizer)
    assert IMAGE_TOKEN_INDEX in targets.input_ids and IMAGE_TOKEN_INDEX not in targets.labels


def test_one_image_moves_to_the_front_and_several_do_where_they_stand_together_behind_the_words() -> None:
    turn = [{"from": "human", "value": "Look at <image> please."}]
    assert place_images(turn, 1)[0]["value"] == "<image>\nLook at  please."
    pair = [{"from": "human", "value": "First <image> then <image>?"}]
    assert place_images(pair, 2)[0]["value"] == pair[0]["value"]
    behind = [{"from": "human", "value": "Which is larger?\n<image>\n<image>"}]
    assert place_images(behind, 2)[0]["value"] == "<image>\n<image>\nWhich is larger?"
    assert place_images(turn, 1, "v1_mmtag")[0]["value"].startswith("<Image><image></Image>\n")
    assert place_images(turn, 1, use_start_end=True)[0]["value"].startswith("<im_start><image><im_end>\n")


def test_refusals(tokenizer: Any) -> None:
    template = conv_templates["v1"]
    with pytest.raises(ValueError, match="2 images, but its turns have 1"):
        place_images([{"from": "human", "value": "<image>"}], 2)
    with pytest.raises(ValueError, match="0 images, but its turns have 1"):
        place_images([{"from": "human", "value": "<image>"}], 0)
    with pytest.raises(ValueError, match="expected 'gpt'"):
        segments_of([TURNS[0], TURNS[2]], template)
    with pytest.raises(ValueError, match=r"a turn is \{'from': 'user', 'value': 'Hi'\}; expected \{'from': 'human' or 'gpt'"):
        segments_of([{"from": "user", "value": "Hi"}], template)
    with pytest.raises(ValueError, match="no turn from human"):
        segments_of([], template)
    with pytest.raises(ValueError, match="one question with <image> and one answer"):
        segments_of(TURNS, conv_templates["plain"])


@pytest.mark.parametrize(
    ("given", "whole", "labels"),
    [
        ([1, 2], [1, 2, 3, 4], [IGNORE_INDEX, IGNORE_INDEX, 3, 4]),
        ([1, 2], [1, 5, 4], [IGNORE_INDEX, 5, 4]),  # the last piece of the question became one with the first of the answer
        ([1, 2, 3], [1, 9, 3, 4], [IGNORE_INDEX, 9, 3, 4]),  # what agrees again behind a difference is no beginning
        ([1, 2, 3], [1, 2], [IGNORE_INDEX, IGNORE_INDEX]),
        ([1], [7, 8], [7, 8]),
    ],
)
def test_a_token_that_spans_question_and_answer_is_supervised(
    given: list[int], whole: list[int], labels: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = {"Q": given, "QA": whole}
    segments = [Segment((Span("Q", False),), False), Segment((Span("A", False),), True)]
    monkeypatch.setattr(targets_module, "segments_of", lambda turns, template: segments)
    monkeypatch.setattr(targets_module, "tokenize_spans", lambda spans, tokenizer: ids["".join(span.text for span in spans)])
    targets = build_targets([], conv_templates["v1"], None)
    assert (targets.input_ids, targets.labels) == (whole, labels)


def test_a_question_without_an_answer_is_given_and_not_supervised() -> None:
    *answered, asked = segments_of(TURNS[:3], conv_templates["v1"])
    assert [segment.supervised for segment in answered] == [False, True] and not asked.supervised
    assert "Sure?" in asked.text and "Sure?" not in "".join(segment.text for segment in answered)


@pytest.mark.parametrize(
    ("turns", "found"),
    [
        ([("human", "Q"), ("gpt", "A")], True),
        ([("human", "Q"), ("gpt", "")], False),
        ([("gpt", "A"), ("human", "Q")], False),  # an answer before the first question is dropped
        ([("gpt", "A"), ("human", "Q"), ("gpt", "B")], True),
        ([("gpt", "A")], False),
        ([], False),
    ],
)
def test_whether_a_row_has_an_answer_and_how_many_words(turns: list[tuple[str, str]], found: bool) -> None:
    row = [{"from": speaker, "value": text} for speaker, text in turns]
    assert has_answer(row) == found
    assert count_words(row) == sum(bool(text) for _, text in turns)
