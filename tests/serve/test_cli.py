"""The terminal chat: what its commands do, in a pipe, and before a real (pseudo-)terminal where Ctrl-C is pressed."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from llava.inference import Answer, Message, Options
from llava.model.routing import RoutingReport
from llava.serve import cli, terminal

ROOT = Path(__file__).resolve().parents[2]
SCENE = ROOT / "playground" / "images" / "scene_pink.png"


class FakeStream:
    def __init__(self, pieces, answer):
        self.pieces, self.answer = pieces, answer

    def __iter__(self):
        for piece in self.pieces:
            if isinstance(piece, BaseException):
                raise piece
            yield piece


class FakeAssistant:
    """Says what it is told to, and notes what it was asked."""

    def __init__(self, pieces=("It is ", "red.")):
        self.pieces, self.calls = list(pieces), []
        levels = [SimpleNamespace(tokens=tokens) for tokens in (4, 16, 64)]
        self.model = SimpleNamespace(levels=levels, get_model=lambda: SimpleNamespace(router=object()))

    def stream(self, images, turns, options):
        self.calls.append((list(images), list(turns), options))
        reports = [RoutingReport(None, None, 16, 88, 336, {4: 24, 16: 88, 64: 336})] * len(images)
        text = "".join(piece for piece in self.pieces if isinstance(piece, str))
        return FakeStream(self.pieces, Answer(text, [1, 2], "stop", 40, reports, {"ttft": 12.0}))


@pytest.fixture
def chat():
    """A chat with the assistant that says it is red; what it writes and complains about is kept."""
    written, complaints = [], []
    made = terminal.Chat(FakeAssistant(), Options(), terminal.Terminal(False, False, written.append, complaints.append))
    made.written, made.complaints = written, complaints
    return made


def say(chat, *lines):
    rest = iter(lines)

    def read():
        line = next(rest, None)
        if line is None:
            raise EOFError
        if line is KeyboardInterrupt:
            raise KeyboardInterrupt
        return line

    return chat.run(read)


def test_pictures_and_turns_go_to_the_model(chat, tmp_path):
    Image.new("RGB", (20, 10)).save(tmp_path / "my picture.png")
    assert say(chat, f"/image {tmp_path}/my picture.png", "What colour?", "", "Sure?") == 0
    images, turns, _ = chat.assistant.calls[0]
    assert [image.size for image in images] == [(20, 10)] and turns == [Message("user", "<image>\nWhat colour?")]
    images, turns, _ = chat.assistant.calls[1]
    assert len(images) == 1 and [turn.text for turn in turns] == ["<image>\nWhat colour?", "It is red.", "Sure?"]
    assert "[granularity 16: 88 of 336 visual tokens, 74 % saved; 12 ms to the first word" in "".join(chat.written)


@pytest.mark.parametrize("written", ["{}", "'{}'", '"{}"', "escaped"])
def test_a_question_may_begin_with_the_paths_of_images(chat, tmp_path, monkeypatch, written):
    names = ["plain.png", "my picture.PNG", "what's (it).png"]
    for width, name in enumerate(names, start=10):
        Image.new("RGB", (width, 10)).save(tmp_path / name)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in names[: 2 if written == "'{}'" else 3]:
        path = f"{tmp_path}/{name}"
        typed = re.sub(r"([^\w./-])", r"\\\1", path) if written == "escaped" else written.format(path)
        say(chat, f"{typed} What's on it?", "/clear")
        images, turns, _ = chat.assistant.calls[-1]
        assert [image.width for image in images] == [10 + names.index(name)]
        assert turns == [Message("user", "<image>\nWhat's on it?")]
    say(chat, "~/plain.png", f"{tmp_path}/my picture.PNG {tmp_path}/plain.png Which is wider?")
    images, turns, _ = chat.assistant.calls[-1]
    assert [image.width for image in images] == [10, 11, 10] and turns[0].text.endswith("\nWhich is wider?")
    assert chat.complaints == []


def test_a_question_with_a_file_in_it_stays_a_question(chat, tmp_path, monkeypatch):
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    (tmp_path / "What").write_text("")
    (tmp_path / "b.png").write_text("no image")
    monkeypatch.chdir(tmp_path)
    say(chat, "What is in a.png?", "Is it in a.png", "nowhere.png What?")
    assert [call[0] for call in chat.assistant.calls] == [[], [], []] and chat.complaints == []
    say(chat, "b.png What?", "/help", "/nope.png What?")
    assert len(chat.assistant.calls) == 3 and len(chat.complaints) == 2
    assert "There is no command /nope.png; /help lists them, /image PATH adds an image." in chat.complaints[1]


def test_commands_change_the_routing(chat):
    say(chat, "/granularity 4,16", "one", "/granularity auto", "/budget 100", "two", "/budget off", "/granularity 64", "three")
    routing = [options.routing for _, _, options in chat.assistant.calls]
    assert [(each.granularity, each.max_visual_tokens) for each in routing] == [([4, 16], None), (None, 100), (64, None)]
    assert chat.complaints == []


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/granularity 5", "error: The granularity is 5, but this model has [4, 16, 64] tokens per view; choose from these."),
        ("/granularity 4,7", "error: The granularity is 4,7, but this model has"),
        ("/granularity many", "not auto, a number"),
        ("/budget lots", "expected a number"),
        ("/budget 0", "expected 1 or more"),
        ("/image", "needs the path"),
        ("/image nowhere.png", "no image file"),
        ("/nope", "no command /nope"),
        ("an <image> here", "/image instead"),
    ],
)
def test_what_cannot_be_done_is_said_and_the_chat_goes_on(chat, line, told):
    assert say(chat, line, "still there?") == 1
    assert len(chat.complaints) == 1 and told in chat.complaints[0]
    assert len(chat.assistant.calls) == 1


def test_history_and_clear(chat, tmp_path):
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    say(chat, f"/image {tmp_path}/a.png", "What colour?", "/history", "/clear", "/history", "Now?")
    text = "".join(chat.written)
    assert text.count("user: What colour?  [1 image]") == 1 and text.count("assistant: It is red.") == 1
    assert chat.assistant.calls[-1][:2] == ([], [Message("user", "Now?")])


def test_an_error_of_the_model_keeps_the_question_out_and_the_pictures_waiting(chat):
    chat.conversation.waiting = [Image.new("RGB", (5, 5))]
    chat.assistant.pieces = ["It ", ValueError("The prompt takes all positions.")]
    assert say(chat, "too long") == 1
    assert chat.conversation.turns == [] and len(chat.conversation.waiting) == 1


def test_ctrl_c_stops_the_answer_and_a_second_one_leaves(chat):
    chat.assistant.pieces = ["It is ", KeyboardInterrupt()]
    assert say(chat, "What colour?", "Go on", KeyboardInterrupt, "never asked") == 0
    assert [turn.text for turn in chat.conversation.turns][:2] == ["What colour?", "It is"]
    assert len(chat.assistant.calls) == 2 and "(stopped)" in "".join(chat.written)


def test_one_ctrl_c_at_the_prompt_does_not_leave(chat):
    say(chat, KeyboardInterrupt, "question", KeyboardInterrupt, KeyboardInterrupt, "never asked")
    assert len(chat.assistant.calls) == 1


def test_an_answer_cannot_steer_the_terminal(chat):
    chat.assistant.pieces = ["\x1b[2J\x07red\r\n"]
    say(chat, "What colour?")
    assert "\x1b" not in "".join(chat.written) and "[2Jred\n" in "".join(chat.written)


def test_llavas_flags_parse():
    args = cli.build_parser().parse_args("--model-path liuhaotian/llava --image-file a.png --load-4bit --temperature 0.2".split())
    assert args.load_4bit and args.image_file == ["a.png"] and args.temperature == 0.2


def test_a_picture_that_is_not_there_is_told_before_the_weights_are_read(monkeypatch, capsys):
    loads = []
    monkeypatch.setattr(terminal.Assistant, "load", lambda *args, **options: loads.append(args) or FakeAssistant())
    assert cli.main(["--image-file", str(SCENE), "nope.png"]) == 1
    assert "no image file at 'nope.png'" in capsys.readouterr().err and loads == []


def test_the_flag_and_the_complaint_about_it_have_one_name(monkeypatch, capsys):
    monkeypatch.setattr(terminal.Assistant, "load", lambda *args, **options: FakeAssistant())
    assert cli.main(["--granularity", "7"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: The granularity is 7, but this model has [4, 16, 64]") and "vis_token" not in told


def test_both_quantisations_end_with_one_sentence(capsys):
    assert cli.main(["--load-4bit", "--load-8bit"]) == 1
    assert "choose one" in capsys.readouterr().err


# --- the program itself, with the shipped model ---

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TERM": "xterm"}
COMMAND = [sys.executable, "-m", "llava.serve.cli", "--image-file", str(SCENE)]


def test_questions_come_from_any_input(monkeypatch, capsys):
    lines = "What number is on the sign?\n/granularity 4\nWhich colour does the large shape have?\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert cli.main(["--image-file", str(SCENE), "--device", "cpu"]) == 0
    written = capsys.readouterr().out
    first, second = (line for line in written.splitlines() if line.startswith("[granularity"))
    assert "558" in written and "granularity 4:" in second and "of 336 visual tokens" in first
    assert "\x1b" not in written


@pytest.mark.slow
def test_the_program_answers_through_a_pipe_and_tells_failures_by_its_status():
    lines = "What number is on the sign?\n/granularity 5\n"
    done = subprocess.run(COMMAND, input=lines, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert done.returncode == 1 and "558" in done.stdout and "choose from these" in done.stderr


SLOW_SPEAKER = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job, as tests may be, is started deaf to Ctrl-C
import sys, time
from types import SimpleNamespace
from llava.inference import Answer
from llava.serve import cli, terminal

class Speaker:
    model = SimpleNamespace(levels=[SimpleNamespace(tokens=4)], get_model=lambda: SimpleNamespace(router=object()))

    def stream(self, images, turns, options):
        def pieces():
            for index in range(1000 if "long" in turns[-1].text else 2):
                time.sleep(0.05)
                yield f"word{index} "
        stream = SimpleNamespace(answer=Answer("done", [1], "stop", 3, [], {"ttft": 50.0}))
        return type("Stream", (), {"__iter__": lambda self: pieces(), "answer": stream.answer})()

terminal.Assistant.load = lambda *args, **options: Speaker()
sys.exit(cli.main([]))
"""


class Screen:
    """A program before a pseudo-terminal."""

    def __init__(self, command):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execvpe(command[0], command, ENVIRONMENT)
        self.unread = ""

    def until(self, text, seconds=90.0):
        """Read on until a text has appeared; gives what came up to it."""
        end = time.monotonic() + seconds
        while text not in self.unread:
            assert time.monotonic() < end, f"{text!r} did not appear in {self.unread!r}"
            if select.select([self.fd], [], [], 0.1)[0]:
                self.unread += os.read(self.fd, 65536).decode(errors="replace")
        before, _, self.unread = self.unread.partition(text)
        return before

    def type(self, text):
        os.write(self.fd, text.encode())

    def interrupt_until(self, text, patience=15.0):
        """Press Ctrl-C until a text appears, as a person would.

        input() loses one that comes between two of readline's waits for a key, until the next key; Ctrl-C twice counts as one then.
        """
        for _ in range(5):
            self.type("\x03")
            with contextlib.suppress(AssertionError):
                return self.until(text, patience)
        return self.until(text, patience)

    def interrupted_status(self, presses=6, patience=15.0):
        """Press Ctrl-C until the program ends; gives its exit status."""
        for _ in range(presses):
            self.type("\x03")
            end = time.monotonic() + patience
            while time.monotonic() < end:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    os.close(self.fd)
                    return os.waitstatus_to_exitcode(status)
                time.sleep(0.05)
        os.kill(self.pid, signal.SIGKILL)
        raise AssertionError("the program did not end")


def test_before_a_terminal_ctrl_c_stops_the_answer_and_then_leaves():
    screen = Screen([sys.executable, "-c", SLOW_SPEAKER])
    screen.until("> ")
    screen.type("short\n")
    screen.until("word1")
    assert "\x1b[2m[" in screen.until("in all]")
    screen.until("> ")
    screen.type("long\n")
    screen.until("word2")
    screen.type("\x03")
    screen.until("(stopped)")
    screen.until("> ")
    screen.type("short\n")  # it goes on
    screen.until("in all]")
    screen.until("> ")
    screen.type("half a question")
    screen.until("half a question")
    screen.interrupt_until("leaves.")
    screen.until("> ")
    assert screen.interrupted_status() == 0


def test_more_than_the_finest_is_the_finest_and_said_once(chat, caplog):
    say(chat, "/granularity 99", "one", "two")
    assert [options.routing.granularity for _, _, options in chat.assistant.calls] == [64, 64]
    text = "".join(chat.written)
    assert text.count("99 is more than this model has; its finest is taken") == 1 and "granularity 64, of [4, 16, 64]" in text
    assert caplog.records == [] and chat.complaints == []


def test_a_question_that_fails_under_a_budget_names_both_ways_out(chat):
    chat.assistant.pieces = [ValueError("max_visual_tokens is 5, raise the budget.")]
    say(chat, "/granularity 4,16", "/budget 5", "What colour?")
    assert "(The budget is 5, the granularity 4,16; /budget and /granularity change them.)" in chat.complaints[0]


def test_pictures_are_counted_in_words(chat, tmp_path):
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    say(chat, f"/image {tmp_path}/a.png", f"/image {tmp_path}/a.png")
    text = "".join(chat.written)
    assert "1 image for the next question (20 x 10 added)" in text and "2 images for the next question" in text
