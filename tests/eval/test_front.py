"""The report by `--engine vllm`: decided here, answered by a server, and the same as by the embedded engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava.eval.front import ServedAssistant
from llava.eval.granularity_report import main
from llava.images import load_image
from llava.inference import Assistant, Options, Question
from llava.messages import RoutingRequest
from tests.eval.plugin_server import plugin_server

IMAGES = Path(__file__).resolve().parents[2] / "playground" / "eval" / "images"
QUESTION = "Which number does the sign show?"


@pytest.fixture(scope="module")
def micro() -> Assistant:
    return Assistant.load(device="cpu")


def report(output: Path, *more: object) -> int:
    flags = ["--task", "playground", "--limit", 6, "--granularities", "4,16", "--budgets", 48, "--biases=-1,1", "--examples", 1]
    return main([str(word) for word in (*flags, "--device", "cpu", "--output", output, *more)])


def test_the_report_is_that_of_the_embedded_engine(micro: Assistant, tmp_path: Path) -> None:
    assert report(tmp_path / "here", "--timing-samples", 0) == 0
    with plugin_server(micro) as server:
        assert report(tmp_path / "there", "--engine", "vllm", "--vllm", server.url) == 0
        wishes = [exchange.json["mm_processor_kwargs"] for exchange in server.requests]
    assert [wishes.count({"vis_token_granularity": level}) for level in (4, 16)] == [7, 6]  # the first is asked once more, as a check
    here, there = ([json.loads(line) for line in (tmp_path / run / "answers.jsonl").open()] for run in ("here", "there"))
    assert here[0]["made with"] == {**there[0]["made with"], "engine": None} and here[1:] == there[1:] and len(there) == 7
    first, second = (json.loads((tmp_path / run / "report.json").read_text()) for run in ("here", "there"))
    assert first["rows"] == second["rows"] and second["timing"] is None
    assert any(note.startswith("The answers are those of a vLLM server") for note in second["notes"])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--engine", "vllm"), "the engine vllm needs the address of a server"),
        (("--vllm", "http://localhost:8000"), "the embedded one takes none"),
        (("--engine", "vllm", "--vllm", "http://localhost:8000", "--timing-samples", 3), "--timing-samples is 3, but times are those"),
        (("--engine", "vllm", "--vllm", "http://localhost:8000", "--model-base", "x"), "--model-base is 'x'"),
    ],
)
def test_what_a_server_cannot_give_is_refused_first(
    more: tuple[object, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(tmp_path / "out", *more) == 1 and said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_server_of_another_model_is_noticed_at_the_first_question(
    micro: Assistant, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with plugin_server(micro, lambda body: {**body, "usage": {"prompt_tokens": 7, "completion_tokens": 1}}) as server:
        assert report(tmp_path / "out", "--engine", "vllm", "--vllm", server.url) == 1
    assert "read a prompt of 7 positions, expected" in capsys.readouterr().err and not (tmp_path / "out" / "answers.jsonl").exists()


def test_a_server_that_goes_ends_the_run(
    micro: Assistant, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llava.eval.chat_server.DELAYS", (0.0,))
    answered: list[int] = []

    def gone(body: dict[str, Any]) -> dict[str, Any]:
        answered.append(1)
        if len(answered) > 3:
            server.models = lambda exchange: exchange.die()
            raise OSError("gone")
        return body

    with plugin_server(micro, gone) as server:
        assert report(tmp_path / "out", "--engine", "vllm", "--vllm", server.url, "--batch-size", 2) == 1
    assert f"Nothing answers at {server.url}" in capsys.readouterr().err
    assert len(answered) < 12  # of 12 that are to be asked, twice each: the others are not tried in vain


def test_answers_are_the_assistants_and_no_layer_is_loaded(micro: Assistant) -> None:
    first, second = (load_image(path) for path in sorted(IMAGES.glob("*.png"))[:2])
    questions = [Question([first], QUESTION), Question([], "Hello"), Question([first, second], QUESTION)]
    options = Options(max_new_tokens=8, routing=RoutingRequest(bias=-0.5))
    expected = micro.answer_batch(questions, options)
    with plugin_server(micro) as server:
        served = ServedAssistant.connect(server.url, device="cpu")
        assert len(served.model.model.layers) == 0
        found = served.answer_batch(questions, options)
        assert served.answer([first], QUESTION, options).text == expected[0].text
        with pytest.raises(ValueError, match="cannot score"):
            served.log_likelihoods([], [])
        served.close()

    def known(answer: Any) -> tuple[Any, ...]:
        levels = [(each.granularity, each.num_visual_tokens, each.full_visual_tokens) for each in answer.reports]
        return answer.text, answer.finish_reason, answer.prompt_tokens, answer.num_new_tokens, levels

    assert [known(answer) for answer in found] == [known(answer) for answer in expected]
