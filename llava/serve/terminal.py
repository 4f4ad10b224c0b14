"""A chat in the terminal; the model runs in this process. `llava.serve.cli` is its program."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter

from PIL import Image

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.flags import granularity_argument, options_of
from llava.images import ImageError, load_images
from llava.inference import Answer, Assistant, Options
from llava.messages import Message, RoutingRequest
from llava.model.routing import allowed_levels

HELP = """\
/image PATH [PATH ...]     images for the next question (files, or http(s) addresses);
                           a question may also begin with the paths of image files
/granularity auto|N|N,M    let the router choose, fix the tokens per view, or limit the choice
/budget N|off              visual tokens of all images together
/history                   what was said
/clear                     forget it, images too
/help                      this list
/exit                      leave; so does the end of the input
Ctrl-C stops an answer; at an empty prompt, a second one leaves."""

PROMPT = "> "
MAX_PATH = 1000
"""Characters of a line in which a path is looked for."""
IMAGE_SUFFIXES = frozenset(Image.registered_extensions())


@dataclass
class TerminalChat:
    """What was said. waiting: images for the next question. images: those of the turns, in order."""

    turns: list[Message] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)
    waiting: list[Image.Image] = field(default_factory=list)

    def asked(self, question: str) -> tuple[list[Message], list[Image.Image]]:
        """Turns and images with a new question at the end; nothing is kept yet."""
        places = (DEFAULT_IMAGE_TOKEN + "\n") * len(self.waiting)
        return [*self.turns, Message("user", places + question)], [*self.images, *self.waiting]

    def keep(self, question: str, answer: str) -> None:
        """Make a question and its answer part of the conversation."""
        turns, images = self.asked(question)
        self.turns, self.images, self.waiting = [*turns, Message("assistant", answer)], images, []


@dataclass
class Terminal:
    """Where the chat reads and writes. interactive: a person types; colour: marks what is beside the point."""

    interactive: bool
    colour: bool
    write: Callable[[str], None]
    complain: Callable[[str], None]

    def dim(self, text: str) -> str:
        return f"\x1b[2m{text}\x1b[0m" if self.colour else text


class Chat:
    """One chat: reads lines, answers questions, obeys commands.

    Args:
        assistant: the loaded model. options: how to answer; commands change the routing. terminal: where to.
    """

    def __init__(self, assistant: Assistant, options: Options, terminal: Terminal) -> None:
        self.assistant, self.options, self.terminal = assistant, options, terminal
        self.conversation = TerminalChat()
        self.failures = 0
        self.interrupted = False
        self.over = False
        self.commands: dict[str, Callable[[str], None]] = {
            "image": self._image,
            "granularity": self._granularity,
            "budget": self._budget,
            "history": self._history,
            "clear": self._clear,
            "help": lambda _: self._say(HELP),
            "exit": self._exit,
        }

    def run(self, read_line: Callable[[], str]) -> int:
        """Go on until the input ends or the user leaves.

        Args:
            read_line: gives the next line; raises EOFError at the end.

        Returns:
            0; 1 where questions came through a pipe and one of them failed.
        """
        while not self.over:
            try:
                line = read_line()
            except EOFError:
                break
            except KeyboardInterrupt:
                self._interrupted_prompt()
                continue
            self.interrupted = False
            self.take(line.strip())
        return 1 if self.failures and not self.terminal.interactive else 0

    def take(self, line: str) -> None:
        """Obey a command, or answer a question; what cannot be done is said, and the chat goes on."""
        try:
            files, line = leading_files(line) if not self._is_command(line) else ([], line)
            if files:
                self.add_images(load_files(files))
            if line.startswith("/"):
                self._command(line[1:])
            elif line:
                self._answer(line)
        except (ValueError, OSError, FloatingPointError) as error:
            self.failures += 1
            budget = self.options.routing.max_visual_tokens
            asked = bool(line) and not line.startswith("/") and not isinstance(error, ImageError)
            hint = f" (The budget is {budget}, the granularity {self._wanted()}; /budget and /granularity change them.)"
            self.terminal.complain(f"error: {error}{hint if asked and budget is not None else ''}")

    def _is_command(self, line: str) -> bool:
        return line.startswith("/") and line[1:].partition(" ")[0] in self.commands

    def _interrupted_prompt(self) -> None:
        self.over = self.interrupted
        self.interrupted = True
        self._say("" if self.over else "\n" + self.terminal.dim("Ctrl-C again, or /exit, leaves."))

    def _command(self, text: str) -> None:
        name, _, rest = text.partition(" ")
        if name not in self.commands:
            raise ValueError(f"There is no command /{printable(name)[:40]}; /help lists them, /image PATH adds an image.")
        self.commands[name](rest.strip())

    def _answer(self, question: str) -> None:
        if DEFAULT_IMAGE_TOKEN in question:
            raise ValueError(f"The question holds {DEFAULT_IMAGE_TOKEN}; add images with /image instead.")
        turns, images = self.conversation.asked(question)
        stream, said, start = self.assistant.stream(images, turns, self.options), "", perf_counter()
        try:
            for piece in stream:
                said += piece
                self.terminal.write(printable(piece))
        except KeyboardInterrupt:
            self.interrupted = True
            self._say("\n" + self.terminal.dim("(stopped)"))
            if said.strip():
                self.conversation.keep(question, said.strip())
            return
        self._say("")
        self.conversation.keep(question, stream.answer.text)
        self._say(self.terminal.dim(cost_line(stream.answer, 1000 * (perf_counter() - start))))

    def _say(self, text: str) -> None:
        self.terminal.write(text + "\n")

    def _image(self, rest: str) -> None:
        if not rest:
            raise ValueError("/image needs the path of an image.")
        self.add_images(load_files([rest] if os.path.isfile(rest) else rest.split()))

    def add_images(self, loaded: Sequence[Image.Image]) -> None:
        """Take images for the next question."""
        self.conversation.waiting += loaded
        sizes = ", ".join(f"{image.width} x {image.height}" for image in loaded)
        self._say(self.terminal.dim(f"{image_count(len(self.conversation.waiting))} for the next question ({sizes} added)"))

    def _granularity(self, rest: str) -> None:
        try:
            wanted = granularity_argument(rest or "auto")
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"{error}.") from error
        self._route(replace(self.options.routing, granularity=wanted))
        self._say(self.terminal.dim(f"granularity {self._wanted()}, of {self._levels()}"))

    def _budget(self, rest: str) -> None:
        if rest != "off" and not rest.isdecimal():
            raise ValueError(f"/budget is {printable(rest)[:40]!r}, expected a number of visual tokens, or off.")
        self._route(replace(self.options.routing, max_visual_tokens=None if rest == "off" else int(rest)))
        self._say(self.terminal.dim(f"budget {rest}"))

    def _wanted(self) -> str:
        wanted = self.options.routing.granularity
        return "auto" if wanted is None else str(wanted) if isinstance(wanted, int) else ",".join(map(str, wanted))

    def _route(self, routing: RoutingRequest) -> None:
        finest = self._levels()[-1]
        if isinstance(routing.granularity, int) and routing.granularity > finest:
            self._say(self.terminal.dim(f"{routing.granularity} is more than this model has; its finest is taken"))
            routing = replace(routing, granularity=finest)
        self._check_granularity(routing.granularity)
        allowed_levels(self._levels(), routing, self.assistant.model.get_model().router is not None)
        self.options = replace(self.options, routing=routing)

    def _check_granularity(self, wanted: int | Sequence[int] | None) -> None:
        """As `allowed_levels`, but under the name that the flag and the command have here."""
        named = () if wanted is None else (wanted,) if isinstance(wanted, int) else tuple(wanted)
        if not set(named) <= set(self._levels()):
            given = ",".join(map(str, named))
            raise ValueError(f"The granularity is {given}, but this model has {self._levels()} tokens per view; choose from these.")

    def _levels(self) -> list[int]:
        return [level.tokens for level in self.assistant.model.levels]

    def _history(self, rest: str) -> None:
        for turn in self.conversation.turns:
            places = turn.text.count(DEFAULT_IMAGE_TOKEN)
            text = turn.text.replace(DEFAULT_IMAGE_TOKEN + "\n", "")
            self._say(f"{turn.role}: {printable(text) or '(nothing)'}" + (f"  [{image_count(places)}]" if places else ""))
        if self.conversation.waiting:
            self._say(self.terminal.dim(f"{image_count(len(self.conversation.waiting))} for the next question"))

    def _clear(self, rest: str) -> None:
        self.conversation = TerminalChat()
        self._say(self.terminal.dim("forgotten"))

    def _exit(self, rest: str) -> None:
        self.over = True


def load_files(names: Sequence[str]) -> list[Image.Image]:
    """Load files and web addresses.

    Raises:
        ValueError: an image that cannot be used.
    """
    return load_images([os.path.expanduser(name) for name in names], allow_remote=True)


def leading_files(line: str) -> tuple[list[str], str]:
    """The image files that a line begins with, and the rest of it: whoever drops files into a terminal gets their paths typed.

    A path may be quoted, or have its spaces escaped, as terminals do it, or be written as it is.
    """
    files = []
    while (found := _leading_file(line)) is not None:
        files.append(found[0])
        line = found[1]
    return files, line


def _leading_file(line: str) -> tuple[str, str] | None:
    """The longest beginning of a line that names an image file, and the rest."""
    ends = [match.start() for match in re.finditer(r"(?=\s)|$", line[:MAX_PATH])]
    for end in reversed(ends):
        if Path(line[:end].rstrip("'\"")).suffix.lower() not in IMAGE_SUFFIXES:
            continue
        for name in _as_typed(line[:end]):
            if os.path.isfile(os.path.expanduser(name)):
                return name, line[end:].strip()
    return None


def _as_typed(text: str) -> list[str]:
    """What a text may mean as one path: itself, and what a shell would read."""
    try:
        arguments = shlex.split(text)
    except ValueError:  # an apostrophe that closes nothing
        return [text]
    return [text, *arguments] if len(arguments) == 1 else [text]


def image_count(count: int) -> str:
    """`1 image`, `2 images`."""
    return f"{count} image{'' if count == 1 else 's'}"


def printable(text: str) -> str:
    """A text without control characters: a model's answer must not steer the terminal."""
    return "".join(character for character in text if character.isprintable() or character in "\n\t")


def cost_line(answer: Answer, total: float) -> str:
    """Granularity, tokens and milliseconds of one answer.

    Args:
        total: milliseconds in all.
    """
    time = f"{answer.milliseconds['ttft']:.0f} ms to the first word, {total:.0f} ms in all"
    if not answer.reports:
        return f"[{time}]"
    levels = ", ".join(str(report.granularity) for report in answer.reports)
    spent = sum(report.num_visual_tokens for report in answer.reports)
    full = sum(report.full_visual_tokens for report in answer.reports)
    return f"[granularity {levels}: {spent} of {full} visual tokens, {100 * (1 - spent / full):.0f} % saved; {time}]"


def make_chat(args: argparse.Namespace, terminal: Terminal) -> Chat:
    """Load the first images, and then the model that the flags name: a missing image is reported before the weights are read.

    Raises:
        ValueError: flags, a checkpoint or an image that cannot work. OSError: files that cannot be read.
    """
    if args.load_8bit and args.load_4bit:
        raise ValueError("--load-8bit and --load-4bit are both given; choose one.")
    options = options_of(args)
    first = load_files(args.image_file)
    assistant = Assistant.load(args.model_path, args.model_base, load_8bit=args.load_8bit, load_4bit=args.load_4bit, device=args.device)
    chat = Chat(assistant, options, terminal)
    chat._route(options.routing)
    if first:
        chat.add_images(first)
    return chat


def open_terminal() -> Terminal:
    """Standard input and output."""

    def write(text: str) -> None:
        print(text, end="", flush=True)

    def complain(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return Terminal(sys.stdin.isatty(), colour, write, complain)


def run_chat(args: argparse.Namespace) -> int:
    """Chat until the input ends or the user leaves; 0, or 1 where questions came through a pipe and one of them failed.

    Raises:
        ValueError: flags, a checkpoint or an image that cannot work. OSError: files that cannot be read.
    """
    terminal = open_terminal()
    chat = make_chat(args, terminal)
    if terminal.interactive:
        import readline  # noqa: F401 - gives input() its editing keys and its history

        terminal.write(terminal.dim("Type a question, or /help.") + "\n")
    return chat.run(lambda: input(PROMPT if terminal.interactive else ""))
