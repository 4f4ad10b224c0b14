"""`--engine vllm` at an address: what a server is asked, how its failures are taken, and that memory does not grow with the file."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import sys
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llava.eval.chat_server import ChatServer, FailedError
from llava.eval.journal import Journal
from llava.eval.model_vqa import main
from llava.eval.one_by_one import Failure
from llava.eval.questions import questions_between
from llava.eval.served import in_window
from llava.messages import Options
from tests.serve.fake_backend import Exchange, FakeBackend

PICTURES = Path(__file__).parents[2] / "playground" / "eval"
ROWS: list[dict[str, Any]] = [
    {"question_id": index, "image": "images/test_000.png" if index % 3 else None, "text": f"Question {index}?", "answer": str(index)}
    for index in range(40)
]
MODELS = {"object": "list", "data": [{"id": "avg", "object": "model", "owned_by": "vllm", "root": "/models/avg"}]}


def text_of(exchange: Exchange) -> str:
    """The question that came."""
    content = exchange.json["messages"][-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def completion(text: str, image_tokens: int | None = 96, **more: Any) -> dict[str, Any]:
    details = {} if image_tokens is None else {"prompt_tokens_details": {"multimodal_tokens": {"image": image_tokens}}}
    usage = {"prompt_tokens": 120, "completion_tokens": 3, **details}
    return {"choices": [{"message": {"content": f" {text} "}, "finish_reason": "stop"}], "usage": usage, **more}


def hang_up(exchange: Exchange) -> None:
    exchange.handler.close_connection = True
    exchange.handler.connection.shutdown(socket.SHUT_RDWR)


def echo(exchange: Exchange) -> None:
    exchange.reply(completion(f"to {text_of(exchange)}"))


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava.eval.chat_server.DELAYS", (0.0, 0.0, 0.0))


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    image = next((PICTURES / "images").glob("*.png")) if (PICTURES / "images").is_dir() else next(PICTURES.rglob("*.png"))
    rows = [{**row, "image": str(image.relative_to(PICTURES)) if row["image"] else None} for row in ROWS]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def ask(questions: Path, backend: FakeBackend | str, *more: object) -> int:
    address = backend if isinstance(backend, str) else backend.url
    return main([str(word) for word in (*given(questions), "--vllm", address, *more)])


def given(questions: Path) -> list[object]:
    files = ["--question-file", questions, "--answers-file", questions.with_name("out.jsonl"), "--image-folder", PICTURES]
    return [*files, "--engine", "vllm"]


def answers(questions: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in questions.with_name("out.jsonl").read_text(encoding="utf-8").splitlines()]


def test_answers_come_in_order_with_what_the_server_says_of_their_cost(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeBackend(echo, models=MODELS) as backend:
        assert ask(questions, backend, "--granularity", "4,16", "--max-visual-tokens", 90, "--temperature", 0.5, "--seed", 3) == 0
        bodies = [exchange.json for exchange in backend.requests]
    assert [line["text"] for line in answers(questions)] == [f"to Question {index}?" for index in range(40)]
    assert all(body["mm_processor_kwargs"] == {"vis_token_granularity": [4, 16], "max_visual_tokens": 90} for body in bodies)
    assert {(body["model"], body["temperature"], body["seed"], body["max_tokens"]) for body in bodies} == {("avg", 0.5, 3, 512)}
    with_image = next(body for body in bodies if isinstance(body["messages"][0]["content"], list))
    image, text = with_image["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,") and text["text"].startswith("Question ")
    line = answers(questions)[1]
    assert line["model_id"] == "avg" and line["answer"] == "1" and line["metadata"]["granularity"] == [None]
    assert (line["metadata"]["visual_tokens"], line["metadata"]["full_visual_tokens"], line["metadata"]["prompt_tokens"]) == (96, None, 120)
    assert "40 of 40 questions answered" in capsys.readouterr().out


def test_our_own_services_are_asked_in_their_own_words_and_say_what_was_saved(
    questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = {"images": [{"logits": [0.5, 1.0]}], "milliseconds": {"ttft": 3.0}}

    def report(exchange: Exchange) -> None:
        body = completion("yes", None, avg_llava=ours)
        body["usage"] |= {"visual_tokens": 24, "full_visual_tokens": 96, "granularities": [4]}
        exchange.reply(body)

    with FakeBackend(report, models={"data": [{"id": "avg", "owned_by": "avg-llava"}]}) as backend:
        assert ask(questions, backend, "--granularity", 4) == 0
        assert all(exchange.json["granularity"] == 4 and "mm_processor_kwargs" not in exchange.json for exchange in backend.requests)
    metadata = answers(questions)[1]["metadata"]
    assert metadata["granularity"] == [4] and metadata["logits"] == [[0.5, 1.0]] and metadata["milliseconds"] == {"ttft": 3.0}
    assert "24.0 visual tokens per question, 75.0 % saved" in capsys.readouterr().out


def test_the_engine_is_kept_full_and_not_overfilled(questions: Path) -> None:
    inside, most, lock, full = Counter[str](), Counter[str](), threading.Lock(), threading.Event()

    def counting(exchange: Exchange) -> None:
        with lock:
            inside["now"] += 1
            most["at once"] = max(most["at once"], inside["now"])
            if inside["now"] == 8:
                full.set()
        if text_of(exchange) != "Question 0?":  # which is asked by itself first, to see whether it can be answered
            assert full.wait(20)
        with lock:
            inside["now"] -= 1
        echo(exchange)

    with FakeBackend(counting, models=MODELS) as backend:
        assert ask(questions, backend, "--batch-size", 8) == 0
    assert most["at once"] == 8 and len(answers(questions)) == 40


def test_what_may_pass_is_tried_again(questions: Path) -> None:
    tries = Counter[str]()

    def busy(exchange: Exchange) -> None:
        tries[text_of(exchange)] += 1
        if tries[text_of(exchange)] < 3:
            exchange.reply({"error": {"message": "full"}}, status=503, Retry_After="0")
        else:
            echo(exchange)

    with FakeBackend(busy, models=MODELS) as backend:
        assert ask(questions, backend) == 0
    assert tries.pop("Question 0?") == 4 and set(tries.values()) == {3}  # the first was asked once more, as its own check


def test_a_refused_question_fails_alone_and_the_same_command_asks_it_again(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refusing = True

    def picky(exchange: Exchange) -> None:
        if refusing and text_of(exchange) == "Question 7?":
            exchange.reply({"error": {"message": "the prompt is too long", "code": 400}}, status=400)
        else:
            echo(exchange)

    with FakeBackend(picky, models=MODELS) as backend:
        assert ask(questions, backend) == 1
        assert "1 of 40 questions failed" in capsys.readouterr().err
        (error,) = [json.loads(line) for line in questions.with_name("out.jsonl.errors.jsonl").read_text().splitlines()]
        assert error["question_id"] == 7 and error["error"] == "RefusedError: HTTP status 400: the prompt is too long"
        refusing, before = False, len(backend.requests)
        assert ask(questions, backend) == 0
        assert len(backend.requests) == before + 2 and len(answers(questions)) == 40


@pytest.mark.parametrize(
    ("status", "message", "said"),
    [
        (400, "no kwargs", "can answer none of the first 40 questions with these options; 0: HTTP status 400: no kw"),
        (401, "no key", "refuses /v1/chat/completions; HTTP status 401: no key"),
        (500, "broken", "fails at the first question: 4 attempts over 0 s failed; the last: HTTP status 500: broken"),
    ],
)
def test_a_server_that_answers_nothing_is_one_sentence_and_keeps_nothing(
    questions: Path, capsys: pytest.CaptureFixture[str], status: int, message: str, said: str
) -> None:
    with FakeBackend(lambda exchange: exchange.reply({"error": {"message": message}}, status=status), models=MODELS) as backend:
        assert ask(questions, backend, "--granularity", 16) == 1
    assert said in capsys.readouterr().err and not list(questions.parent.glob("out.jsonl.parts/part-*"))


def test_a_lost_server_ends_the_run_and_the_same_command_goes_on_elsewhere(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answered: list[str] = []

    def dying(exchange: Exchange) -> None:
        if len(answered) >= 15:
            exchange.server.models = hang_up
            hang_up(exchange)
            return
        echo(exchange)
        answered.append(text_of(exchange))

    with FakeBackend(dying, models=MODELS) as backend:
        assert ask(questions, backend, "--batch-size", 2) == 1
    assert "Nothing answers at" in capsys.readouterr().err and not questions.with_name("out.jsonl").exists()
    with FakeBackend(echo, models=MODELS) as backend:
        assert ask(questions, backend) == 0
        assert 25 <= len(backend.requests) <= 29  # those that were not answered, the check, and what was in flight
    assert [line["question_id"] for line in answers(questions)] == list(range(40))


def test_a_server_that_has_come_to_fail_at_everything_ends_the_run(
    questions: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llava.eval.served.TRIED", 5)
    asked: list[str] = []

    def souring(exchange: Exchange) -> None:
        asked.append(text_of(exchange))
        echo(exchange) if len(asked) <= 10 else exchange.reply({"error": "sour"}, status=400)

    with FakeBackend(souring, models=MODELS) as backend:
        assert ask(questions, backend, "--batch-size", 2) == 1
    assert re.search("The last [56] questions failed at", capsys.readouterr().err) and len(asked) < 25


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--vllm", "localhost"), "--vllm is 'localhost', expected the address of a server"),
        (("--vllm", "http://[::1"), "--vllm is 'http://[::1', expected the address of a server"),
        (("--vllm", "http://"), "--vllm is 'http://', expected the address of a server"),
        (("--num-beams", 2), "--num-beams is 2, but vLLM has no beams"),
        (("--conv-mode", "v1"), "--conv-mode is v1, but a server writes its model's own template"),
        (("--load-4bit",), "--load-4bit is given, but with --engine vllm it is vLLM that loads the model"),
        (("--model-path", "other"), "has no model 'other'; give --model-path one of avg."),
        (("--engine", "embedded"), "--engine embedded asks no server"),
    ],
)
def test_flags_that_a_server_cannot_serve(questions: Path, capsys: pytest.CaptureFixture[str], more: tuple[object, ...], said: str) -> None:
    with FakeBackend(echo, models=MODELS) as backend:
        assert ask(questions, backend, *more) == 1
        assert not backend.requests
    assert said in capsys.readouterr().err


def test_nobody_there_and_somebody_else_there(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeBackend(echo, models={"hello": 1}) as backend:
        assert ask(questions, backend) == 1
    assert "does not answer as an OpenAI-compatible server does" in capsys.readouterr().err
    assert ask(questions, backend.url) == 1
    assert f"Nothing answers at {backend.url} (4 attempts" in capsys.readouterr().err


def test_without_an_address_vllm_has_to_be_here(
    questions: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert main([str(word) for word in given(questions)]) == 1
    assert "vllm is not installed here; give --vllm the address of a server" in capsys.readouterr().err


# ---- memory


def test_no_more_is_taken_than_is_in_flight_and_a_failure_is_a_value() -> None:
    taken: list[int] = []

    def source() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    async def work(number: int) -> int:
        await asyncio.sleep(0)
        if number == 3:
            raise ValueError("three")
        return -number

    loop, done = asyncio.new_event_loop(), 0
    for outcomes in in_window(work, source(), 16, loop):
        assert len(taken) - done <= 16
        for number, outcome in outcomes:
            assert outcome == -number or (number == 3 and isinstance(outcome, Failure) and outcome.reason == "ValueError: three")
        done += len(outcomes)
    assert done == 1000
    loop.close()


def test_a_caller_that_stops_cancels_what_is_in_flight() -> None:
    cancelled: list[int] = []

    async def work(number: int) -> int:
        try:
            await asyncio.sleep(0 if number == 0 else 60)
        except asyncio.CancelledError:
            cancelled.append(number)
            raise
        return number

    loop = asyncio.new_event_loop()
    answers = in_window(work, range(4), 4, loop)
    assert next(answers) == [(0, 0)]
    answers.close()  # type: ignore[attr-defined]
    loop.close()
    assert cancelled == [1, 2, 3]


def test_questions_and_outcomes_take_a_few_bytes_each(tmp_path: Path) -> None:
    """Whole rows in memory would take some 25 MB here."""
    size, long = 20_000, "x" * 400
    file = tmp_path / "rows.jsonl"
    with file.open("w", encoding="utf-8") as opened:
        opened.writelines(json.dumps({"question_id": index, "text": f"{index}? {long}"}) + "\n" for index in range(size))
    journal = Journal(tmp_path)
    with journal.part.open("w", encoding="utf-8") as part:
        part.writelines(json.dumps({"row": index, "answer": {"text": long + str(index)}}) + "\n" for index in reversed(range(size)))
    tracemalloc.start()
    outcomes = journal.outcomes()
    read = sum(outcomes.answered(row.index) for row in questions_between(file, range(10, size)))
    last = outcomes.read(size - 1)["answer"]["text"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert read == size - 10 and last.endswith("x19999")
    assert peak < 20 * size + 8 * 2**20  # and the window of the reader of JSON


@pytest.mark.parametrize(
    "broken",
    [
        {"choices": [], "usage": {}},
        {"choices": [{"message": {"content": ["yes"]}, "finish_reason": "stop"}], "usage": completion("")["usage"]},
        completion("yes") | {"usage": "none"},
        completion("yes") | {"usage": {"prompt_tokens": float("inf"), "completion_tokens": 1}},
        completion("yes") | {"usage": {"prompt_tokens": 1, "completion_tokens": 1, "visual_tokens": "many"}},
        completion("yes") | {"usage": {"prompt_tokens": 1, "completion_tokens": 1, "granularities": "many"}},
        completion("yes", avg_llava={"images": [{"logits": [float("nan")]}]}),
        completion("yes", avg_llava={"milliseconds": {"ttft": float("nan")}}),
        completion("yes", avg_llava=[1]),
    ],
)
def test_an_answer_of_another_form_fails_its_question_alone(broken: dict[str, Any], questions: Path) -> None:
    def odd(exchange: Exchange) -> None:
        exchange.reply(broken) if text_of(exchange) in ("Question 0?", "Question 7?") else echo(exchange)

    with FakeBackend(odd, models=MODELS) as backend:
        assert ask(questions, backend) == 1
    errors = questions.with_name("out.jsonl.errors.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(answers(questions)) == 38 and [json.loads(line)["question_id"] for line in errors] == [0, 7]
    assert all("answered something other than a chat completion" in line for line in errors)


def test_a_server_that_trickles_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def asked() -> None:
        server = ChatServer(backend.url, seconds=0.5)
        await server.connect()
        try:
            await server.ask([{"role": "user", "content": "?"}], 0, Options())
        finally:
            await server.close()

    def trickling(exchange: Exchange) -> None:
        exchange.begin_stream()
        for _ in range(100):
            exchange.event({"choices": []})
            time.sleep(0.1)

    monkeypatch.setattr("llava.eval.chat_server.DELAYS", ())
    with FakeBackend(trickling, models=MODELS) as backend, pytest.raises(FailedError, match="TimeoutError"):
        asyncio.run(asyncio.wait_for(asked(), 8))
