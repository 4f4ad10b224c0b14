"""What no question can be asked with is told before the first one, by the flag or field to change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from llava.eval.checks import TRIED, check_questions, check_routing
from llava.images import ImageError
from llava.inference import Assistant, Options, Question
from llava.messages import RoutingRequest

SMALL = Image.new("RGB", (64, 64), "red")
LARGE = Image.new("RGB", (256, 256), "red")


@pytest.fixture(scope="module")
def micro() -> Assistant:
    return Assistant.load(device="cpu")


def asked(*questions: Question | Exception) -> tuple[list[int], list[tuple[int, Callable[[], Question]]]]:
    """Questions by number, and the numbers of those that were opened."""
    opened: list[int] = []

    def load(index: int) -> Question:
        opened.append(index)
        found = questions[index]
        if isinstance(found, Exception):
            raise found
        return found

    return opened, [(index, lambda index=index: load(index)) for index in range(len(questions))]  # type: ignore[misc]


def test_one_question_that_can_be_asked_is_enough(micro: Assistant) -> None:
    budget = Options(routing=RoutingRequest(max_visual_tokens=20))  # the small image costs 10 at least, the large one 24
    opened, questions = asked(ImageError("broken"), Question([LARGE], "Which?"), Question([SMALL], "Which?"), Question([LARGE], "Which?"))
    check_questions(micro, questions, budget)
    assert opened == [0, 1, 2]


def test_images_that_cannot_be_opened_say_nothing_about_the_model(micro: Assistant) -> None:
    check_questions(micro, asked(ImageError("broken"), OSError("gone"))[1], Options(routing=RoutingRequest(max_visual_tokens=1)))


def test_after_a_hundred_refusals_no_more_are_opened(micro: Assistant) -> None:
    opened, questions = asked(*[Question([SMALL], "Which?")] * (TRIED + 5))
    with pytest.raises(ValueError, match="none of the first 100 questions with these options; 0: max_visual_tokens is 1, but"):
        check_questions(micro, questions, Options(routing=RoutingRequest(max_visual_tokens=1)))
    assert len(opened) == TRIED


def test_a_context_that_holds_no_prompt_is_a_matter_of_the_config(micro: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro.model.config.text, "max_position_embeddings", 40)
    with pytest.raises(ValueError, match=r"takes \d+ positions, 10 of them visual tokens, but the context has 40 \(max_position_emb"):
        check_questions(micro, asked(Question([SMALL], "Which? " * 9))[1], Options())


def test_a_template_that_is_not_there_is_a_matter_of_the_config(micro: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro.model.config, "conv_version", "v99")
    with pytest.raises(ValueError, match=r"template 'v99' is unknown.* \(conv_version in config.json, unless --conv-mode is given\)"):
        check_questions(micro, asked(Question([SMALL], "Which?"))[1], Options())
    check_questions(micro, asked(Question([SMALL], "Which?"))[1], Options(conv_mode="v1"))


def test_a_model_that_takes_no_images_is_named_as_that(micro: Assistant) -> None:
    with pytest.raises(ValueError, match="plain language model; give --model-path"):
        check_routing(Assistant(None, SimpleNamespace(), None), RoutingRequest())  # type: ignore[arg-type]
    blind = Assistant(micro.tokenizer, micro.model, None)
    with pytest.raises(ValueError, match="no vision tower .*; give --model-path"):
        check_questions(blind, asked(Question([SMALL], "Which?"))[1], Options())


@pytest.mark.parametrize("more", [("--max-visual-tokens", 5), ("--model-path", "SHORT"), ("--model-path", "TEMPLATE")])
def test_a_fault_of_flags_or_config_ends_a_run_before_its_first_question(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, more: tuple[str, Any]
) -> None:
    from llava.eval.model_vqa import main

    changes: dict[str, Any] = {"SHORT": {"max_position_embeddings": 40}, "TEMPLATE": {"conv_version": "v99"}}
    load = Assistant.load

    def changed(*args: Any, **options: Any) -> Assistant:
        assistant = load(device="cpu")
        for name, value in changes.get(str(more[1]), {}).items():
            config = assistant.model.config
            setattr(config.text if hasattr(config.text, name) else config, name, value)
        return assistant

    monkeypatch.setattr(Assistant, "load", changed)
    monkeypatch.setattr("llava.eval.engines.describe_model", lambda model: model)
    monkeypatch.setattr(Assistant, "answer_batch", lambda *args: pytest.fail("a question was asked"))
    SMALL.save(tmp_path / "a.png")
    (tmp_path / "q.jsonl").write_text('{"question_id": 1, "image": "a.png", "text": "What is the background colour?"}\n' * 3)
    given = ["--question-file", tmp_path / "q.jsonl", "--answers-file", tmp_path / "out.jsonl", "--device", "cpu", *more]
    assert main([str(word) for word in given]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: The model can answer none of the first 3 questions with these options; ")
    assert not (tmp_path / "out.jsonl").exists() and not (tmp_path / "out.jsonl.errors.jsonl").exists()
