"""Questions in, answers out: formats, batches, shards, killed runs, and what is refused or recorded as failed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llava.eval.answer_file import share
from llava.eval.engines import Place, device_of
from llava.eval.journal import Journal
from llava.eval.model_vqa import build_parser, main
from llava.images import load_image
from llava.inference import MICRO_MODEL, Assistant, Options

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "playground" / "eval"
PLAYGROUND = [json.loads(line) for line in (PICTURES / "test.jsonl").read_text(encoding="utf-8").splitlines()[:12]]
MIXED: list[dict[str, Any]] = [
    *PLAYGROUND[:4],
    {"question_id": "words", "text": "What colour is the sky?"},
    {"question_id": "two", "image": [PLAYGROUND[0]["image"], PLAYGROUND[10]["image"]], "text": "What is the background colour?"},
    {**PLAYGROUND[10], "text": "<image>\n" + PLAYGROUND[10]["text"]},
]


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def flags(questions: Path, answers: Path, *more: object) -> list[str]:
    given = ["--question-file", questions, "--answers-file", answers, "--image-folder", PICTURES, "--device", "cpu", "--max-new-tokens", 8]
    return [str(word) for word in (*given, *more)]


def told(file: Path) -> list[tuple[Any, str, list[int]]]:
    """What must not depend on batches, processes and interruptions."""
    return [(line["question_id"], line["text"], line["metadata"]["granularity"]) for line in read(file)]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    return write(tmp_path / "questions.jsonl", PLAYGROUND)


@pytest.fixture(scope="module")
def alone() -> list[tuple[Any, str, list[int]]]:
    """The mixed rows, asked one by one."""
    assistant = Assistant.load(device="cpu")
    found = []
    for row in MIXED:
        names = [row["image"]] if isinstance(row.get("image"), str) else row.get("image", [])
        answer = assistant.answer([load_image(PICTURES / name) for name in names], row["text"], Options(max_new_tokens=8))
        found.append((row["question_id"], answer.text, [report.granularity for report in answer.reports]))
    return found


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_answers_are_those_of_single_questions(tmp_path: Path, alone: list[tuple[Any, str, list[int]]], batch_size: int) -> None:
    file = write(tmp_path / "mixed.jsonl", MIXED)
    assert main(flags(file, tmp_path / "out.jsonl", "--batch-size", batch_size)) == 0
    assert told(tmp_path / "out.jsonl") == alone


def test_a_line_is_llavas_with_cost_and_with_what_the_question_held(
    tmp_path: Path, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags(questions, tmp_path / "out.jsonl", "--vis-token-granularity", "16")) == 0
    line = read(tmp_path / "out.jsonl")[0]
    assert list(line)[:6] == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert {name: line[name] for name in ("prompt", "answer", "family")} == {
        "prompt": PLAYGROUND[0]["text"], "answer": PLAYGROUND[0]["answer"], "family": PLAYGROUND[0]["family"]
    }  # fmt: skip
    assert line["model_id"] == "avg-llava-micro"
    metadata = line["metadata"]
    assert metadata["granularity"] == [16] and metadata["logits"] == [None]
    assert 0 < metadata["visual_tokens"] < metadata["full_visual_tokens"] == 336
    assert metadata["milliseconds"]["generate"] > 0 and metadata["batch_size"] == 1
    assert "12 of 12 questions answered" in capsys.readouterr().out


def test_a_routers_logits_are_kept_in_order_of_the_pictures(tmp_path: Path) -> None:
    file = write(tmp_path / "two.jsonl", [MIXED[5]])
    assert main(flags(file, tmp_path / "out.jsonl", "--granularity-bias", "-9")) == 0
    metadata = read(tmp_path / "out.jsonl")[0]["metadata"]
    assert metadata["granularity"] == [4, 4] and [len(logits) for logits in metadata["logits"]] == [5, 5]


def test_flags_are_read_with_dashes_and_with_underscores() -> None:
    names = "model-path model-base image-folder question-file answers-file conv-mode num-chunks chunk-idx max-new-tokens batch-size device"
    values = {"num-chunks": "3", "chunk-idx": "2", "max-new-tokens": "7", "batch-size": "2"}
    given = {**{f"--{name}": values.get(name, "x") for name in names.split()}, "--temperature": "0.5", "--top_p": "0.9", "--num_beams": "2"}
    dashed = [word for pair in given.items() for word in pair]
    underscored = [word.replace("-", "_").replace("__", "--", 1) if word.startswith("--") else word for word in dashed]
    assert build_parser().parse_args(dashed) == build_parser().parse_args(underscored)
    assert build_parser().parse_args([*dashed, "--load-4bit"]).load_4bit and build_parser().parse_args([*dashed, "--load_8bit"]).load_8bit


# ---- what is refused before anything is loaded


def test_everything_wrong_with_a_file_is_said_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [
        json.dumps(PLAYGROUND[0]), "{", "[1]", json.dumps({"text": "?"}), "", json.dumps({"question_id": 1, "text": " <image> "}),
        json.dumps({"question_id": 2, "text": "Who?", "image": "none.png"}), json.dumps({"question_id": 3, "text": "Who?", "image": 5}),
        json.dumps({"question_id": 4, "text": "<image> or <image>?", "image": PLAYGROUND[0]["image"]}),
        json.dumps({"question_id": 5, "text": "Who?", "metadata": {}}),
    ]  # fmt: skip
    file = tmp_path / "bad.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setattr(Assistant, "load", lambda *args, **options: pytest.fail("the model was loaded"))
    assert main(flags(file, tmp_path / "out.jsonl")) == 1
    said = capsys.readouterr().err
    for number, words in (
        (2, "Expecting property name"), (3, "it is of type list"), (4, "question_id is missing"), (6, "expected a question"),
        (7, "no image"),
        (8, "image is 5"), (9, "holds 2 <image>, but the row names 1 image"), (10, "metadata would be overwritten"),
    ):  # fmt: skip
        assert any(line.strip().startswith(f"line {number}: ") and words in line for line in said.splitlines()), (number, said)
    assert "line 1:" not in said and "line 5:" not in said
    assert not (tmp_path / "out.jsonl.parts").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--batch-size", 0), "--batch-size is 0"),
        (("--batch-size", 2, "--temperature", 0.5), "a sampled answer depends on its batch"),
        (("--num-chunks", 2, "--chunk-idx", 2), "expected 0 to 1"),
        (("--num-chunks", 0), "--num-chunks 0"),
        (("--conv-mode", "nobody"), "template 'nobody' is unknown"),
        (("--max-new-tokens", 0), "max_new_tokens is 0"),
        (("--load-4bit", "--load-8bit"), "choose one"),
        (("--model-path", "/nowhere/at/all"), "neither a folder nor"),
        (("--vis-token-granularity", "5"), "The granularity is 5, but this model has"),
        (("--vis-token-granularity", "576"), "The granularity is 576, but this model has [4, 8, 16, 32, 64] tokens per view"),
        (("--granularity-bias", "nan"), "granularity_bias is nan, expected a finite number"),
        (("--max-visual-tokens", 0), "max_visual_tokens is 0"),
        (("--question-file", "none.jsonl"), "does not exist"),
    ],
)
def test_wrong_flags_are_one_error_and_no_answer(
    tmp_path: Path, questions: Path, capsys: pytest.CaptureFixture[str], more: tuple[object, ...], words: str
) -> None:
    assert main(flags(questions, tmp_path / "out.jsonl", *more)) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists() and not list(tmp_path.glob("out.jsonl.parts/part-*"))


def test_a_refused_start_does_not_keep_its_answers_file(
    tmp_path: Path, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags(questions, tmp_path / "out.jsonl", "--vis-token-granularity", "5")) == 1
    assert main(flags(questions, tmp_path / "out.jsonl", "--vis-token-granularity", "4")) == 0
    assert len(read(tmp_path / "out.jsonl")) == 12
    assert main(flags(questions, tmp_path / "out.jsonl", "--vis-token-granularity", "8")) == 1
    assert "belongs to another run: --granularity was 4, is 8. Choose" in capsys.readouterr().err


def test_a_bias_that_is_no_number_is_refused_before_anything_is_loaded(
    tmp_path: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Assistant, "load", lambda *args, **options: pytest.fail("the model was loaded"))
    assert main(flags(questions, tmp_path / "out.jsonl", "--granularity-bias", "inf")) == 1
    assert not (tmp_path / "out.jsonl.parts").exists()


def test_empty_answers_are_counted(
    tmp_path: Path, questions: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = Assistant.answer_batch

    def silent(self: Assistant, batch: Any, options: Any = None) -> Any:
        return [replace(answer, text="") if index < 2 else answer for index, answer in enumerate(whole(self, batch, options))]

    monkeypatch.setattr(Assistant, "answer_batch", silent)
    assert main(flags(questions, tmp_path / "out.jsonl", "--batch-size", 12)) == 0
    assert "; 2 of 12 answers are empty" in capsys.readouterr().out


def test_quantised_weights_without_their_library_end_with_one_sentence(
    tmp_path: Path, questions: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert main(flags(questions, tmp_path / "out.jsonl", "--load-4bit")) == 1
    assert 'pip install "bitsandbytes>=0.50,<0.51"' in capsys.readouterr().err


# ---- chunks and processes


def test_chunks_joined_are_the_whole(tmp_path: Path, questions: Path) -> None:
    assert [list(share(range(10), 4, part)) for part in range(4)] == [[0, 1], [2, 3, 4], [5, 6], [7, 8, 9]]
    assert main(flags(questions, tmp_path / "whole.jsonl", "--batch-size", 4)) == 0
    found = []
    for chunk in range(3):
        assert main(flags(questions, tmp_path / f"{chunk}.jsonl", "--num-chunks", 3, "--chunk-idx", chunk, "--batch-size", 4)) == 0
        found += told(tmp_path / f"{chunk}.jsonl")
    assert found == told(tmp_path / "whole.jsonl")


def test_an_empty_chunk_is_an_empty_file(tmp_path: Path) -> None:
    file = write(tmp_path / "one.jsonl", PLAYGROUND[:1])
    assert main(flags(file, tmp_path / "out.jsonl", "--num-chunks", 2, "--chunk-idx", 0)) == 0
    assert read(tmp_path / "out.jsonl") == []


def test_the_last_of_several_processes_joins_their_parts(tmp_path: Path, questions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(flags(questions, tmp_path / "whole.jsonl")) == 0
    for rank in (2, 0, 1):
        assert not (tmp_path / "out.jsonl").exists()
        for name, value in (("RANK", rank), ("WORLD_SIZE", 3), ("LOCAL_RANK", rank)):
            monkeypatch.setenv(name, str(value))
        assert main(flags(questions, tmp_path / "out.jsonl")) == 0
    assert told(tmp_path / "out.jsonl") == told(tmp_path / "whole.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [["torch.distributed.run", "--nproc_per_node"], ["accelerate.commands.launch", "--multi_gpu", "--num_processes"]]
)
def test_launchers_start_processes_that_share_the_questions(tmp_path: Path, questions: Path, launcher: list[str]) -> None:
    command = [sys.executable, "-m", *launcher, "2", "-m", "llava.eval.model_vqa", *flags(questions, tmp_path / "out.jsonl")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line["question_id"] for line in read(tmp_path / "out.jsonl")] == [row["question_id"] for row in PLAYGROUND]
    assert len(list((tmp_path / "out.jsonl.parts").glob("part-*"))) == 2


# ---- going on


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that reach the model."""
    texts: list[str] = []
    answer_batch = Assistant.answer_batch

    def noted(self: Assistant, batch: Any, options: Any = None) -> Any:
        texts.extend(question.messages for question in batch)
        return answer_batch(self, batch, options)

    monkeypatch.setattr(Assistant, "answer_batch", noted)
    return texts


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, asked: list[str]) -> None:
    rows = [{**PLAYGROUND[number % 12], "question_id": number} for number in range(60)]
    file = write(tmp_path / "questions.jsonl", rows)
    part = tmp_path / "out.jsonl.parts" / "part-00000.jsonl"
    command = [sys.executable, "-m", "llava.eval.model_vqa", *flags(file, tmp_path / "out.jsonl", "--batch-size", 2)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    end = time.monotonic() + 120
    while not (part.exists() and part.read_bytes().count(b"\n") >= 6):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out.jsonl").exists()
    finished = part.read_bytes().count(b"\n")
    with part.open("ab") as half:
        half.write(b'{"row": 59, "answer": {"question_id"')
    assert main(flags(file, tmp_path / "out.jsonl", "--batch-size", 3)) == 0
    assert len(asked) == 60 - finished
    assert [line["question_id"] for line in read(tmp_path / "out.jsonl")] == list(range(60))
    assert len(part.read_bytes().splitlines()) == 60
    before = (tmp_path / "out.jsonl").read_bytes()
    assert main(flags(file, tmp_path / "out.jsonl")) == 0  # all is done: nothing is loaded or asked
    assert len(asked) == 60 - finished and (tmp_path / "out.jsonl").read_bytes() == before


def test_a_run_may_go_on_with_another_number_of_processes(
    tmp_path: Path, questions: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", 3), ("WORLD_SIZE", 4)):
        monkeypatch.setenv(name, str(value))
    assert main(flags(questions, tmp_path / "out.jsonl")) == 0
    monkeypatch.delenv("RANK"), monkeypatch.delenv("WORLD_SIZE")
    with (tmp_path / "out.jsonl.parts" / "part-00003.jsonl").open("ab") as half:
        half.write(b'{"row": 0')  # another process's half line is passed over
    assert main(flags(questions, tmp_path / "out.jsonl")) == 0
    assert len(asked) == 12 and [line["question_id"] for line in read(tmp_path / "out.jsonl")] == [row["question_id"] for row in PLAYGROUND]


def test_another_runs_answers_are_not_mixed_in(tmp_path: Path, questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = shutil.copytree(MICRO_MODEL, tmp_path / "model")
    given = flags(questions, tmp_path / "out.jsonl", "--model-path", model)
    assert main(given) == 0
    assert main([*given, "--vis-token-granularity", "4"]) == 1
    assert "belongs to another run: --granularity was not given, is 4. Choose" in capsys.readouterr().err
    assert main([*given, "--num-chunks", "2"]) == 1
    assert "the chunk (--chunk-idx of --num-chunks) was '0 of 1', is '0 of 2'" in capsys.readouterr().err
    os.utime(model / "model.safetensors", (1, 1))
    assert main(given) == 1
    assert "--model-path was" in capsys.readouterr().err
    write(questions, PLAYGROUND[:11])
    assert main([*given, "--batch-size", "4"]) == 1
    assert "the SHA-256 of --question-file was" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "out.jsonl.parts")
    assert main(given) == 1
    assert "out.jsonl exists, but not" in capsys.readouterr().err
    (tmp_path / "out.jsonl").unlink()
    assert main(given) == 0


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 0)
    journal.begin({"a": 1}, {}, "Choose another.")
    journal.part.write_text('{"row": 0, "answer": {}}\n{"row"\n{"row": 2, "answer": {}}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"part-00000.jsonl is damaged in line 2"):
        journal.records()


@pytest.mark.parametrize("room", [0, 100, 2500])
def test_a_full_disk_is_said_and_the_same_command_goes_on(
    tmp_path: Path, questions: Path, asked: list[str], disk_of: Callable[[int | None], None], capsys: pytest.CaptureFixture[str], room: int
) -> None:
    """The last write takes a part of a line without an error, as the system does; that part is taken back."""
    disk_of(room)
    assert main(flags(questions, tmp_path / "out.jsonl")) == 1
    said = capsys.readouterr().err
    assert "error: no space for" in said and "No space left on device" in said and "other processes" not in said
    part = tmp_path / "out.jsonl.parts" / "part-00000.jsonl"
    kept = part.read_bytes()
    assert (kept == b"" or kept.endswith(b"\n")) and len(kept) <= room and not (tmp_path / "out.jsonl").exists()
    disk_of(None)
    before = len(asked)
    assert main(flags(questions, tmp_path / "out.jsonl")) == 0
    assert len(asked) - before == 12 - kept.count(b"\n") and len(read(tmp_path / "out.jsonl")) == 12
    assert main(flags(questions, tmp_path / "whole.jsonl")) == 0 and told(tmp_path / "out.jsonl") == told(tmp_path / "whole.jsonl")


def test_no_room_for_the_joined_answers_leaves_none_of_them(
    tmp_path: Path, questions: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, data: bytes) -> None:
        path.write_bytes(data[:100])
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with monkeypatch.context() as patch:
        patch.setattr("llava.durable.append_whole", full)
        assert main(flags(questions, tmp_path / "out.jsonl")) == 1
    assert f"error: no space for {tmp_path / 'out.jsonl'} (" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl.parts", "questions.jsonl"]
    assert main(flags(questions, tmp_path / "out.jsonl")) == 0 and len(asked) == 12 == len(read(tmp_path / "out.jsonl"))


def test_a_journal_that_loses_answers_is_not_other_processes_work(
    tmp_path: Path, questions: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add = Journal.add
    monkeypatch.setattr(Journal, "add", lambda self, records: add(self, records[1:]))
    assert main(flags(questions, tmp_path / "out.jsonl")) == 1
    assert "was changed by another program; the same command" in capsys.readouterr().err


def test_ctrl_c_is_one_line_and_the_same_command_goes_on(
    tmp_path: Path, questions: Path, monkeypatch: pytest.MonkeyPatch, interrupts: None, capsys: pytest.CaptureFixture[str]
) -> None:
    answer_batch = Assistant.answer_batch

    def stopping(self: Assistant, batch: Any, options: Any = None) -> Any:
        if batch[0].messages == PLAYGROUND[4]["text"]:
            signal.raise_signal(signal.SIGINT)
        return answer_batch(self, batch, options)

    with monkeypatch.context() as patch:
        patch.setattr(Assistant, "answer_batch", stopping)
        assert main(flags(questions, tmp_path / "out.jsonl")) == 130
    *_, last = capsys.readouterr().err.splitlines()
    assert last == f"interrupted: 4 of 12 answers are kept in {tmp_path / 'out.jsonl.parts'}; the same command resumes."
    assert main(flags(questions, tmp_path / "out.jsonl")) == 0 and len(read(tmp_path / "out.jsonl")) == 12


def test_half_a_character_comes_back_as_it_was_written(tmp_path: Path) -> None:
    """UTF-8 cannot hold it; JSON's escape can."""
    file = tmp_path / "half.jsonl"
    file.write_text(json.dumps({**PLAYGROUND[0], "note": "cut \ud83d", "more": "\U0001f600"}) + "\n", encoding="utf-8")
    assert main(flags(file, tmp_path / "out.jsonl")) == 0
    line = read(tmp_path / "out.jsonl")[0]
    assert (line["note"], line["more"]) == ("cut \ud83d", "\U0001f600")


def test_a_second_run_on_the_same_answers_is_refused(tmp_path: Path, questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Journal(tmp_path / "out.jsonl.parts", 0).alone():
        assert main(flags(questions, tmp_path / "out.jsonl")) == 1
    assert f"another process is at work on {tmp_path / 'out.jsonl.parts'}; wait for it or stop it" in capsys.readouterr().err
    assert main(flags(questions, tmp_path / "out.jsonl")) == 0


def test_a_damaged_description_is_one_sentence(tmp_path: Path, questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out.jsonl.parts").mkdir()
    (tmp_path / "out.jsonl.parts" / "run.json").write_text("{")
    assert main(flags(questions, tmp_path / "out.jsonl")) == 1
    assert "run.json is damaged; delete" in capsys.readouterr().err


# ---- failures


def test_a_crashed_question_is_recorded_counted_and_asked_again(
    tmp_path: Path, questions: Path, asked: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Assistant.answer_batch

    def crashing(self: Assistant, batch: Any, options: Any = None) -> Any:
        if any(question.messages == PLAYGROUND[5]["text"] for question in batch):
            raise FloatingPointError("non-finite logits")
        return whole(self, batch, options)

    with monkeypatch.context() as patch:
        patch.setattr(Assistant, "answer_batch", crashing)
        assert main(flags(questions, tmp_path / "out.jsonl", "--batch-size", 4)) == 1
    output = capsys.readouterr()
    failing = [row["question_id"] for row in PLAYGROUND if row["text"] == PLAYGROUND[5]["text"]]
    assert f"{len(failing)} of 12 questions failed" in output.err and f"{12 - len(failing)} of 12 questions answered" in output.out
    errors = read(tmp_path / "out.jsonl.errors.jsonl")
    assert [error["question_id"] for error in errors] == failing
    assert errors[0]["error"] == "FloatingPointError: non-finite logits" and errors[0]["prompt"] == PLAYGROUND[5]["text"]
    assert [line["question_id"] for line in read(tmp_path / "out.jsonl")] == [
        row["question_id"] for row in PLAYGROUND if row["question_id"] not in failing
    ]
    asked.clear()
    assert main(flags(questions, tmp_path / "out.jsonl", "--batch-size", 4)) == 0
    assert len(asked) == len(failing) and len(read(tmp_path / "out.jsonl")) == 12
    assert not (tmp_path / "out.jsonl.errors.jsonl").exists()


def test_a_broken_picture_is_its_own_questions_failure(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    shutil.copy(PICTURES / PLAYGROUND[0]["image"], tmp_path / "good.png")
    rows = [{"question_id": name, "image": f"{name}.png", "text": "What is the background colour?"} for name in ("good", "broken")]
    given = [
        "--question-file",
        write(tmp_path / "rows.jsonl", rows),
        "--answers-file",
        tmp_path / "out.jsonl",
    ]  # pictures lie beside the rows
    assert main([str(word) for word in (*given, "--batch-size", 2, "--device", "cpu", "--max-new-tokens", 4)]) == 1
    assert [line["question_id"] for line in read(tmp_path / "out.jsonl")] == ["good"]
    assert "not a readable image" in read(tmp_path / "out.jsonl.errors.jsonl")[0]["error"]


def test_a_failed_question_does_not_end_its_process_before_the_others(
    tmp_path: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher kills every process when one of them fails, so only the last one reports."""

    def fail(*args: Any, **options: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Assistant, "answer_batch", fail)
    monkeypatch.setenv("WORLD_SIZE", "2")
    codes = []
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        codes.append(main(flags(questions, tmp_path / "out.jsonl")))
    assert codes == [0, 1] and len(read(tmp_path / "out.jsonl.errors.jsonl")) == 12


def as_process(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    for name, value in (("RANK", rank), ("WORLD_SIZE", 2), ("LOCAL_RANK", rank)):
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_errors_of_an_earlier_run_are_not_this_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: tuple[int, int]) -> None:
    """A picture of the second process is broken, then mended: whoever comes first in the next run waits for that question."""
    rows = [{"question_id": index, "image": f"{index}.png", "text": "What is the background colour?"} for index in range(4)]
    for index in range(3):
        shutil.copy(PICTURES / PLAYGROUND[0]["image"], tmp_path / f"{index}.png")
    (tmp_path / "3.png").write_bytes(b"broken")
    out = tmp_path / "out.jsonl"
    given = ["--question-file", write(tmp_path / "rows.jsonl", rows), "--answers-file", out, "--device", "cpu", "--max-new-tokens", 4]

    def run_all() -> list[int]:
        codes = []
        for rank in order:
            as_process(monkeypatch, rank)
            codes.append(main([str(word) for word in given]))
        return codes

    for _ in range(2):  # broken in both runs: each reports it once, when nothing is left to ask
        assert sorted(run_all()) == [0, 1]
        assert [error["question_id"] for error in read(tmp_path / "out.jsonl.errors.jsonl")] == [3]
    shutil.copy(tmp_path / "0.png", tmp_path / "3.png")
    assert run_all() == [0, 0]
    assert [line["question_id"] for line in read(out)] == [0, 1, 2, 3] and not (tmp_path / "out.jsonl.errors.jsonl").exists()


def test_errors_of_a_killed_run_are_asked_again_before_they_count(
    tmp_path: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first process failed, the second was killed; then the first is at work again when the second is through."""

    def fail(*args: Any, **options: Any) -> Any:
        raise RuntimeError("out of memory")

    given, codes = flags(questions, tmp_path / "out.jsonl"), []
    as_process(monkeypatch, 0)
    with monkeypatch.context() as patch:
        patch.setattr(Assistant, "answer_batch", fail)
        assert main(given) == 0
    load = Assistant.load

    def load_while_the_other_runs(*args: Any, **options: Any) -> Assistant:
        monkeypatch.setattr(Assistant, "load", load)
        as_process(monkeypatch, 1)
        codes.append(main(given))
        return load(*args, **options)

    monkeypatch.setattr(Assistant, "load", load_while_the_other_runs)
    codes.append(main(given))
    assert codes == [0, 0] and len(read(tmp_path / "out.jsonl")) == 12


def test_each_process_takes_its_own_gpu() -> None:
    assert device_of("cuda", Place(5, 8, 1)) == "cuda:1"
    assert device_of("cuda", Place(0, 1, 0)) == "cuda" and device_of("cpu", Place(1, 2, 1)) == "cpu"
