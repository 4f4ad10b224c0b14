"""How long the programs take to start and how much memory that costs, and how many of our files one chat request enters.

    python scripts/benchmark/startup.py                                       # this checkout
    python scripts/benchmark/startup.py --before ../old --after .             # two checkouts, in turns
    python scripts/benchmark/startup.py --before ../old --after . --files

Services are started on 127.0.0.1 and timed from the start of the process to their first answer; of every program, `--help` is timed to its
end. Memory is the peak of the process until then, as Linux counts it. Each figure is the median of `--repeats` starts, after one that does
not count and leaves the files in the system's cache.

`--files` sends three chat requests, each about another image, through a controller to a worker with the micro model, and counts the files
of `llava/` of which each of the three runs a line, in either process, between the request and the end of its answer.
"""

from __future__ import annotations

import argparse
import base64
import functools
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HOST = "127.0.0.1"
NOWHERE = "http://127.0.0.1:9"
"""An address where nobody listens: what is measured does not wait for others."""
SERVICES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "controller": ("llava.serve.controller", (), "/health"),
    "web page": ("llava.serve.gradio_web_server", ("--controller", NOWHERE, "--no-log"), "/"),
    "SGLang bridge": ("llava.serve.sglang_worker", ("--backend", NOWHERE, "--model", "other"), "/health"),
}
"""Name to module, flags, and the path whose answer says that it is there."""
PROGRAMS = (
    *("llava.serve", "llava.serve.cli", "llava.serve.controller", "llava.serve.gradio_web_server", "llava.serve.model_worker"),
    *("llava.serve.sglang_worker", "llava.eval.run_llava", "llava.eval.model_vqa", "llava.eval.granularity_report"),
    *("llava.train.train", "llava.train.dataset", "llava.train.estimate", "llava.train.score_granularities"),
)
"""Modules whose `--help` is timed."""
START_SECONDS = 240.0
IMAGES = ("scene_beige.png", "scene_olive.png", "scene_pink.png")
QUESTION = "Which number does the sign show?"

TRACED = """
import runpy, signal, sys, threading
package, result, module = sys.argv[1:4]
entered, recording = set(), False

def local(frame, event, argument):
    if recording:
        entered.add(frame.f_code.co_filename)
    return local

def trace(frame, event, argument):
    return local(frame, event, argument) if frame.f_code.co_filename.startswith(package) else None

def turn(number, frame):
    global recording
    recording = not recording
    with open(result, "w") as file:
        file.write("recording" if recording else "\\n".join(["entered", *sorted(entered)]))
    entered.clear()

signal.signal(signal.SIGUSR1, turn)
threading.settrace(trace)
sys.settrace(trace)
sys.argv = [module, *sys.argv[4:]]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
"""Runs a module, and writes the files of a package whose lines run between one SIGUSR1 and the next."""


@dataclass(frozen=True)
class Start:
    """One start: seconds until ready or until the end, and the peak of the process's memory in bytes."""

    seconds: float
    peak_bytes: int


def environment(tree: Path) -> dict[str, str]:
    """Of a program that imports `llava` from a checkout."""
    return {**os.environ, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def start(tree: Path, arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start Python in a checkout, with both outputs in a file."""
    with log.open("wb") as output:
        return subprocess.Popen([sys.executable, *arguments], cwd=tree, env=environment(tree), stdout=output, stderr=output)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a service, if it has not ended by itself."""
    process.send_signal(signal.SIGTERM)
    process.wait(60)


def peak_bytes(process: subprocess.Popen[bytes]) -> int:
    """The most memory that a process has held so far; 0 where it has ended. (What `wait4` says is at least what the caller held.)"""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0]) if "VmHWM:" in status else 0


def run_to_end(tree: Path, arguments: Sequence[str], log: Path) -> Start:
    """Time a program to its end, which has to be a good one."""
    peak, began = 0, time.perf_counter()
    process = start(tree, arguments, log)
    while not is_gone(process):
        peak = max(peak, peak_bytes(process))
        time.sleep(0.002)
    seconds = time.perf_counter() - began
    if process.wait():
        raise SystemExit(f"{tree}: python {' '.join(arguments)} ended with {process.returncode}: {log.read_text()[-2000:]}")
    return Start(seconds, peak)


def run_until_ready(tree: Path, module: str, flags: Sequence[str], path: str, log: Path) -> Start:
    """Time a service to its first answer, and end it."""
    port = free_port()
    began = time.perf_counter()
    process = start(tree, ["-m", module, "--host", HOST, "--port", str(port), *flags], log)
    try:
        wait_for_answer(process, port, path, log)
        return Start(time.perf_counter() - began, peak_bytes(process))
    finally:
        stop(process)


def wait_for_answer(process: subprocess.Popen[bytes], port: int, path: str, log: Path) -> None:
    """Until a path answers 200."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if is_gone(process):
            raise SystemExit(f"{process.args} ended: {log.read_text()[-2000:]}")
        try:
            if request(port, "GET", path)[0] == 200:
                return
        except (OSError, http.client.HTTPException):
            pass
        time.sleep(0.01)
    raise SystemExit(f"{process.args} did not answer {path} within {START_SECONDS:.0f} s: {log.read_text()[-2000:]}")


def is_gone(process: subprocess.Popen[bytes]) -> bool:
    """Whether a process has ended; it stays to be waited for, so that its number is not given to another one."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def request(port: int, method: str, path: str, value: Any = None) -> tuple[int, bytes]:
    """One request on a connection of its own: status and body."""
    connection = http.client.HTTPConnection(HOST, port, timeout=60)
    try:
        body = None if value is None else json.dumps(value)
        connection.request(method, path, body, {} if body is None else {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


# ---- start-up


def measures(log: Path) -> dict[str, Callable[[Path], Start]]:
    """What is measured, by the name of its row; each takes a checkout."""
    services = {
        name: functools.partial(run_until_ready, module=module, flags=flags, path=path, log=log)
        for name, (module, flags, path) in SERVICES.items()
    }
    helps = {
        f"`python -m {module} --help`": functools.partial(run_to_end, arguments=["-m", module, "--help"], log=log) for module in PROGRAMS
    }
    return {**services, **helps}


def measure_starts(trees: dict[str, Path], repeats: int, log: Path) -> dict[str, dict[str, list[Start]]]:
    """Starts by row and checkout, the checkouts in turns; the first of each is not counted."""
    found: dict[str, dict[str, list[Start]]] = {}
    for row, measure in measures(log).items():
        found[row] = {name: [] for name in trees}
        for repeat in range(repeats + 1):
            for name, tree in trees.items():
                taken = measure(tree)
                if repeat:
                    found[row][name].append(taken)
        print(table({row: found[row]}).splitlines()[-1], file=sys.stderr)
    return found


def table(found: dict[str, dict[str, list[Start]]]) -> str:
    """The medians as Markdown."""
    names = list(next(iter(found.values())))
    heads = [f"{name}, {unit}" for unit in ("s", "MiB") for name in names]
    lines = ["| | " + " | ".join(heads) + " |", "| --- " * (1 + len(heads)) + "|"]
    for row, sides in found.items():
        seconds = [f"{statistics.median(each.seconds for each in sides[name]):.2f}" for name in names]
        memory = [f"{statistics.median(each.peak_bytes for each in sides[name]) / 2**20:.0f}" for name in names]
        lines.append(f"| {row} | " + " | ".join([*seconds, *memory]) + " |")
    return "\n".join(lines)


# ---- files


@contextmanager
def traced(tree: Path, module: str, flags: Sequence[str], path: str, folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], int, Path]]:
    """A service that counts its files: its process, its port, and the file that it writes them to."""
    port, result, log = free_port(), folder / f"{module}.entered", folder / f"{module}.log"
    arguments = ["-c", TRACED, f"{tree / 'llava'}{os.sep}", str(result), module, "--host", HOST, "--port", str(port), *flags]
    process = start(tree, arguments, log)
    try:
        wait_for_answer(process, port, path, log)
        yield process, port, result
    finally:
        stop(process)


def turn(process: subprocess.Popen[bytes], result: Path, expected: str) -> list[str]:
    """Begin or end the counting; the lines that the process writes, the first of which is the expected one."""
    process.send_signal(signal.SIGUSR1)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        lines = result.read_text().splitlines() if result.exists() else []
        if lines and lines[0] == expected:
            time.sleep(0.02)  # what was written in several pieces is whole
            return result.read_text().splitlines()[1:]
        time.sleep(0.01)
    raise SystemExit(f"{process.args[3:] if isinstance(process.args, list) else process.args} does not count.")


def entered_files(tree: Path, folder: Path) -> dict[str, set[str]]:
    """The files that each of three chat requests enters, in the controller and in the worker."""
    tree = tree.resolve()
    with traced(tree, "llava.serve.controller", (), "/health", folder) as controller:
        address = f"http://{HOST}:{controller[1]}"
        with traced(tree, "llava.serve.model_worker", ("--controller", address, "--device", "cpu"), "/ready", folder) as worker:
            wait_for_answer(controller[0], controller[1], "/ready", folder / "llava.serve.controller.log")
            found: dict[str, set[str]] = {}
            for image in IMAGES:
                encoded = base64.b64encode((ROOT / "playground" / "images" / image).read_bytes()).decode()
                for process, _, result in (controller, worker):
                    turn(process, result, "recording")
                ask(controller[1], encoded)
                for name, (process, _, result) in (("controller", controller), ("worker", worker)):
                    files = {str(Path(line).relative_to(tree)) for line in turn(process, result, "entered")}
                    found[name] = found.get(name, files) & files
    return found


def ask(port: int, encoded: str) -> None:
    """One chat request about an image."""
    content = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}, {"type": "text", "text": QUESTION}]
    body = {"model": "avg-llava-micro", "messages": [{"role": "user", "content": content}], "max_tokens": 16}
    status, answer = request(port, "POST", "/v1/chat/completions", body)
    if status != 200:
        raise SystemExit(f"The request was answered with {status}: {answer.decode(errors='replace')[:500]}")


def file_table(found: dict[str, dict[str, set[str]]]) -> str:
    """Numbers of files as Markdown."""
    lines = ["| files of `llava/` that one chat request enters | controller | worker | both together |", "| --- | --- | --- | --- |"]
    for name, sides in found.items():
        numbers = [len(files) for files in (*sides.values(), set().union(*sides.values()))]
        lines.append(f"| {name} | " + " | ".join(map(str, numbers)) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--before", type=Path, metavar="TREE", help="a checkout to compare with")
    parser.add_argument("--after", type=Path, metavar="TREE", default=ROOT, help="the checkout to measure (default: this one)")
    parser.add_argument("--repeats", type=int, default=3, help="counted starts of each (default: %(default)s)")
    parser.add_argument("--files", action="store_true", help="count the files that a chat request enters instead")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write every start, or the names of the files, as JSON")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats is {args.repeats}, expected 1 or more")
    trees = {name: tree.resolve() for name, tree in (("before", args.before), ("after", args.after)) if tree is not None}
    with tempfile.TemporaryDirectory() as folder:
        if args.files:
            entered = {name: entered_files(tree, Path(folder)) for name, tree in trees.items()}
            written: Any = {name: {side: sorted(files) for side, files in sides.items()} for name, sides in entered.items()}
            print(file_table(entered))
        else:
            starts = measure_starts(trees, args.repeats, Path(folder) / "log.txt")
            written = {row: {name: [asdict(each) for each in taken] for name, taken in sides.items()} for row, sides in starts.items()}
            print(table(starts))
    if args.output is not None:
        args.output.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
