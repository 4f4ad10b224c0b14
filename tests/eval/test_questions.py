"""The file format of questions: what it may hold, and all that is wrong with a file at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava.eval.questions import NO_FAMILY, Row, read_questions, scored_fields


def write(folder: Path, *lines: str | dict[str, Any]) -> Path:
    (folder / "a.png").touch()
    file = folder / "questions.jsonl"
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), encoding="utf-8")
    return file


def test_rows_hold_their_place_pictures_and_other_fields(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        {"question_id": 7, "image": "a.png", "text": "Which?", "level": [1]},
        "",
        {"question_id": "b", "image": ["a.png", "a.png"], "text": "<image> or <image>?"},
        {"question_id": 0, "text": "Who?\u2028You?"},
    )
    assert read_questions(file, tmp_path) == [
        Row(0, 7, "Which?", ("a.png",), {"level": [1]}),
        Row(1, "b", "<image> or <image>?", ("a.png", "a.png"), {}),
        Row(2, 0, "Who?\u2028You?", (), {}),
    ]


def test_expected_answers_are_texts_as_they_are_written(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        '{"question_id": 1, "text": "?", "answer": 12.50}',
        '{"question_id": 2, "text": "?", "answer": "red", "family": "colour"}',
        '{"question_id": 3, "text": "?", "answer": 3, "family": 7}',
        '{"question_id": 4, "text": "?", "answer": "x", "family": null}',
    )
    found = [(row.extra["answer"], row.extra["family"]) for row in read_questions(file, tmp_path, scored_fields)]
    assert found == [("12.50", NO_FAMILY), ("red", "colour"), ("3", "7"), ("x", NO_FAMILY)]


def test_every_problem_of_a_line_is_said(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        {"question_id": 1, "image": "gone.png", "text": "Which?", "answer": True},
        {"text": "Which?", "answer": "x", "family": []},
        {"question_id": 3, "image": "a.png", "text": "Which?", "answer": "x"},
    )
    with pytest.raises(ValueError) as caught:
        read_questions(file, tmp_path, scored_fields)
    assert str(caught.value).splitlines() == [
        f"{file} has mistakes:",
        "  line 1: answer is True, expected one text or number",
        f"  line 1: there is no image {tmp_path / 'gone.png'}",
        "  line 2: question_id is missing",
        "  line 2: family is [], expected a name, or no such field",
    ]


def test_a_long_list_of_problems_ends_with_their_number(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="line 20: .*\n  and 30 more$"):
        read_questions(write(tmp_path, *({"question_id": number} for number in range(50))), tmp_path)
    with pytest.raises(ValueError, match="it holds no question"):
        read_questions(write(tmp_path), tmp_path)


def test_bytes_that_are_no_text_are_named_with_their_line(tmp_path: Path) -> None:
    file = write(tmp_path, {"question_id": 1, "text": "Which?"})
    with file.open("ab") as more:
        more.write(b'{"question_id": 2, "text": "\xff"}\n')
    with pytest.raises(ValueError, match="line 2 of .*questions.jsonl is not UTF-8 .*; save it as UTF-8"):
        read_questions(file, tmp_path)


QUESTIONS = [{"question_id": 1, "text": "Which?", "answer": 12.5}, {"question_id": 2, "text": "Who?", "answer": "x"}]


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff" + "\n".join(map(json.dumps, QUESTIONS)),
        "".join(map(json.dumps, QUESTIONS)),
        "\r\n".join(json.dumps(question, indent=2) for question in QUESTIONS),
        json.dumps(QUESTIONS, indent=1),
    ],
    ids=["byte order mark", "side by side", "over several lines", "a list"],
)
def test_however_the_objects_stand_they_are_the_questions(tmp_path: Path, text: str) -> None:
    (tmp_path / "mine.JSON").write_bytes(text.encode())
    rows = read_questions(tmp_path / "mine.JSON", tmp_path, scored_fields)
    assert [(row.index, row.question_id, row.text, row.extra["answer"]) for row in rows] == [(0, 1, "Which?", "12.5"), (1, 2, "Who?", "x")]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("NaN", "NaN is not a number in JSON; write null or a finite number"),
        ("[1, -Infinity]", "-Infinity is not a number in JSON"),
        ("1e999", "1e999 is not a number in JSON"),
        ("[" * 100_000 + "]" * 100_000, "is nested too deeply; flatten it"),
    ],
)
def test_what_could_not_be_written_again_is_one_sentence(tmp_path: Path, value: str, words: str) -> None:
    file = write(tmp_path, QUESTIONS[0], f'{{"question_id": 2, "text": "Who?", "weight": {value}}}')
    with pytest.raises(ValueError) as caught:
        read_questions(file, tmp_path)
    _, *lines = str(caught.value).splitlines()
    assert len(lines) == 1 and lines[0].startswith("  line 2: ") and words in lines[0] and len(lines[0]) < 200


def test_files_and_folders_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        read_questions(tmp_path / "none.jsonl", tmp_path)
    with pytest.raises(ValueError, match="image folder .*none does not exist"):
        read_questions(write(tmp_path, {"question_id": 1, "text": "Which?"}), tmp_path / "none")
