"""What a worker sustains: crowd against one at a time, streaming against whole answers, and twice the load it can carry.

    python scripts/benchmark/serving.py throughput --output throughput.json
    python scripts/benchmark/serving.py overload --seconds 600 --output overload.json

Both start a worker of their own on 127.0.0.1, ask it the playground's questions over HTTP, compare every answer with the answer that
`Assistant.answer` gives to the same question alone, and stop it. `throughput` takes its two sides in turns in one run; `overload` first
measures the sustainable rate, the best of a few rounds, and then offers twice as many requests, whether or not earlier ones were answered.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import random
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
from tqdm import tqdm

from llava.images import load_image
from llava.inference import Assistant, Options
from llava.serve.api.paths import CHAT_PATH

QUESTIONS = Path(__file__).resolve().parents[2] / "playground" / "eval" / "test.jsonl"
WAIT_FOR_WORKER = 180.0
CALIBRATION_ROUNDS = 6
LONGEST_ANSWER = 2**24
"""Bytes of an answer with all of its stream's parts, which are read as one."""
BROKEN = 0
"""Counted in place of a status where a connection broke off without an answer."""


@dataclass(frozen=True)
class Ask:
    """One question, ready to send, with the answer it has when it is asked alone."""

    body: bytes
    streamed_body: bytes
    expected: str


@dataclass(frozen=True)
class Reply:
    """What came back: HTTP status, text, and seconds from sending to the last byte."""

    status: int
    text: str
    seconds: float
    retry_after: str | None


def load_asks(args: argparse.Namespace, seed: int = 0) -> list[Ask]:
    """Questions about some images, answered one by one in this process first."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for line in QUESTIONS.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows.setdefault(row["image"], []).append(row)
    chosen = [row for name in list(rows)[: args.pictures] for row in rows[name][: args.questions_per_picture]]
    random.Random(seed).shuffle(chosen)
    assistant = Assistant.load(args.model_path)
    options = Options(max_new_tokens=max(16, args.answer_tokens), min_new_tokens=args.answer_tokens)
    asks = []
    for row in tqdm(chosen, desc="answers one by one", unit="question"):
        path = QUESTIONS.parent / row["image"]
        expected = assistant.answer([load_image(path)], row["text"], options).text
        body = request_body(path.read_bytes(), row["text"], options)
        asks.append(Ask(json.dumps(body).encode(), json.dumps(body | {"stream": True}).encode(), expected))
    return asks


def request_body(image: bytes, text: str, options: Options) -> dict[str, Any]:
    """A chat completion about one image, greedy."""
    url = "data:image/png;base64," + base64.b64encode(image).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    length = {"max_tokens": options.max_new_tokens, "min_tokens": options.min_new_tokens}
    return {"model": "bench", "messages": [{"role": "user", "content": content}], "temperature": 0, **length}


@contextmanager
def running_worker(model_path: str | None, flags: Sequence[str], log: Path) -> Iterator[tuple[str, psutil.Process]]:
    """A worker on a free port of 127.0.0.1: its URL and its process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "llava.serve.model_worker", "--host", "127.0.0.1", "--port", str(port), "--model-name", "bench"]
    command += [*(["--model-path", model_path] if model_path else []), *flags]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(url, process, log)
        yield url, psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + WAIT_FOR_WORKER
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"The worker ended with code {process.returncode}; see {log}.")
        try:
            if httpx.get(url + "/ready", timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise SystemExit(f"The worker was not ready within {WAIT_FOR_WORKER:.0f} seconds; see {log}.")


class Connection:
    """One kept-alive HTTP/1.1 connection that posts prepared bodies and takes the time until the last byte of the answer.

    A load generator shares the machine with the server that it measures, and a whole client library takes about as much of it per request
    as the server's own HTTP side; this takes a tenth of that.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.host, self.port = str(parts.hostname), int(parts.port or 80)
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, ask: Ask, streaming: bool = False) -> Reply:
        """Ask once; a connection that the server closed in the meantime is opened again first."""
        if self.streams is None or self.streams[0].at_eof():
            self.streams = await asyncio.open_connection(self.host, self.port, limit=LONGEST_ANSWER)
        reader, writer = self.streams
        sent = ask.streamed_body if streaming else ask.body
        head = (
            f"POST {CHAT_PATH} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(sent)}\r\n\r\n"
        )
        start = time.perf_counter()
        writer.write(head.encode() + sent)
        status_line, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
        chunked = headers.get("transfer-encoding") == "chunked"
        body = await (reader.readuntil(b"\r\n0\r\n\r\n") if chunked else reader.readexactly(int(headers["content-length"])))
        seconds = time.perf_counter() - start
        if headers.get("connection", "").lower() == "close":
            self.close()
        status = int(status_line.split()[1])
        text = "" if status != 200 else streamed_text(body) if chunked else json.loads(body)["choices"][0]["message"]["content"]
        return Reply(status, text, seconds, headers.get("retry-after"))

    def close(self) -> None:
        if self.streams is not None:
            self.streams[1].close()
        self.streams = None


def streamed_text(body: bytes) -> str:
    """The answer in a stream of server-sent events."""
    events = [json.loads(line[6:]) for line in map(bytes.strip, body.split(b"\n")) if line.startswith(b"data: {")]
    return "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])


@dataclass(frozen=True)
class Phase:
    """Some clients that asked one question after the other until none was left."""

    clients: int
    requests_per_second: float
    waits: list[list[float]]
    wrong: int

    @property
    def fairness(self) -> float:
        """The longest mean wait of a client, over the mean of all."""
        means = [statistics.mean(waits) for waits in self.waits if waits]
        return max(means) / statistics.mean(means)

    def summary(self) -> dict[str, float]:
        flat = [wait for waits in self.waits for wait in waits]
        return {
            "requests per second": self.requests_per_second,
            "mean wait ms": 1000 * statistics.mean(flat),
            "longest wait ms": 1000 * max(flat),
            "slowest client over mean": self.fairness,
            "wrong answers": self.wrong,
        }


async def crowd(url: str, asks: Sequence[Ask], clients: int) -> Phase:
    """Let `clients` ask all questions between them, each waiting for its answer before the next."""
    left = list(asks)
    waits: list[list[float]] = [[] for _ in range(clients)]
    wrong = 0

    async def client(own: list[float]) -> None:
        nonlocal wrong
        connection = Connection(url)
        while left:
            ask = left.pop()
            reply = await connection.post(ask)
            own.append(reply.seconds)
            wrong += reply.status != 200 or reply.text != ask.expected
        connection.close()

    start = time.perf_counter()
    await asyncio.gather(*(client(own) for own in waits))
    return Phase(clients, len(asks) / (time.perf_counter() - start), waits, wrong)


async def streaming_cost(url: str, asks: Sequence[Ask]) -> dict[str, float]:
    """Every question asked whole and streamed, one right after the other, the order changing: what streaming adds to the total time."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    wrong = 0
    connection = Connection(url)
    for number, ask in enumerate(asks):
        for streaming in (False, True) if number % 2 else (True, False):
            reply = await connection.post(ask, streaming)
            seconds[streaming].append(reply.seconds)
            wrong += reply.text != ask.expected
    connection.close()
    whole, streamed = (statistics.median(seconds[streaming]) for streaming in (False, True))
    pairs = [after / before for before, after in zip(seconds[False], seconds[True], strict=True)]
    return {"whole ms": 1000 * whole, "streamed ms": 1000 * streamed, "adds": statistics.median(pairs) - 1, "wrong answers": wrong}


def throughput(args: argparse.Namespace) -> dict[str, Any]:
    """One at a time and a crowd, in turns; then whole answers and streamed ones, in turns."""
    asks = load_asks(args)
    flags = ["--max-batch-rows", str(args.clients), *args.worker_flags]
    sides: dict[str, list[Phase]] = {"one at a time": [], "crowd": []}
    with running_worker(args.model_path, flags, args.output.with_suffix(".log")) as (url, _):
        asyncio.run(crowd(url, asks, args.clients))  # warm: both sides find the same images in the worker's cache
        for _ in tqdm(range(args.rounds), desc="rounds"):
            sides["one at a time"].append(asyncio.run(crowd(url, asks, 1)))
            sides["crowd"].append(asyncio.run(crowd(url, asks, args.clients)))
        streaming = asyncio.run(streaming_cost(url, asks))
    rate = {name: statistics.median(phase.requests_per_second for phase in phases) for name, phases in sides.items()}
    return {
        "questions": len(asks),
        "pictures": args.pictures,
        "least tokens of an answer": args.answer_tokens,
        "clients": args.clients,
        "rounds": args.rounds,
        "sides": {name: [phase.summary() for phase in phases] for name, phases in sides.items()},
        "crowd over one at a time": rate["crowd"] / rate["one at a time"],
        "streaming": streaming,
    }


def overload(args: argparse.Namespace) -> dict[str, Any]:
    """Offer twice the sustainable rate for a while and watch memory, refusals and answers."""
    asks = load_asks(args)
    with running_worker(args.model_path, args.worker_flags, args.output.with_suffix(".log")) as (url, process):
        asyncio.run(crowd(url, asks, args.clients))
        # A machine whose speed varies would be offered less than twice what it carries if a slow moment were the measure.
        sustained = max(asyncio.run(crowd(url, asks, args.clients)).requests_per_second for _ in range(CALIBRATION_ROUNDS))
        replies, memory = asyncio.run(_offer(url, asks, 2 * sustained, args.seconds, process))
        after = asyncio.run(crowd(url, asks, 4))
    refused = [reply for _, reply in replies if reply.status == 503]
    answered = [(ask, reply) for ask, reply in replies if reply.status == 200]
    refusals = sorted(1000 * reply.seconds for reply in refused) or [0.0]
    third = len(memory) // 3
    middle, last = statistics.mean(memory[third : 2 * third]), statistics.mean(memory[2 * third :])
    return {
        "seconds": args.seconds,
        "sustained requests per second": sustained,
        "offered requests per second": len(replies) / args.seconds,
        "answered requests per second": len(answered) / args.seconds,
        "statuses": dict(Counter(str(reply.status) for _, reply in replies)),
        "wrong answers": sum(reply.text != ask.expected for ask, reply in answered),
        "refusals without Retry-After": sum(reply.retry_after is None for reply in refused),
        "refusal ms, by percent": {share: refusals[int((len(refusals) - 1) * share / 100)] for share in (50, 95, 99, 100)},
        "mean answer ms": 1000 * statistics.mean(reply.seconds for _, reply in answered),
        "memory MiB, middle third": middle,
        "memory MiB, last third": last,
        "memory, last over middle": last / middle,
        "memory MiB": [round(value, 1) for value in memory[:: max(1, len(memory) // 60)]],
        "wrong answers afterwards": after.wrong,
    }


async def _offer(
    url: str, asks: Sequence[Ask], rate: float, seconds: float, process: psutil.Process
) -> tuple[list[tuple[Ask, Reply]], list[float]]:
    """Arrivals at a steady rate, whether or not earlier ones were answered, and the worker's resident memory in MiB once a second."""
    replies: list[tuple[Ask, Reply]] = []
    memory: list[float] = []
    idle: list[Connection] = []

    async def one(ask: Ask) -> None:
        connection = idle.pop() if idle else Connection(url)
        try:
            replies.append((ask, await connection.post(ask)))
            idle.append(connection)
        except (OSError, asyncio.IncompleteReadError):
            replies.append((ask, Reply(BROKEN, "", 0.0, None)))
            connection.close()

    tasks: set[asyncio.Task[None]] = set()
    start = time.perf_counter()
    bar = tqdm(total=int(seconds), desc="overload", unit="s")
    for number in range(int(rate * seconds)):
        await asyncio.sleep(max(0.0, start + number / rate - time.perf_counter()))
        task = asyncio.create_task(one(asks[number % len(asks)]))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        if time.perf_counter() - start > len(memory) + 1:
            memory.append(process.memory_info().rss / 2**20)
            bar.update()
    await asyncio.gather(*tasks)
    bar.close()
    return replies, memory


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("task", choices=("throughput", "overload"))
    parser.add_argument("--model-path", help="checkpoint; the micro model when missing")
    parser.add_argument("--pictures", type=int, default=32, help="different images asked about")
    parser.add_argument("--questions-per-picture", type=int, default=10)
    parser.add_argument("--answer-tokens", type=int, default=0, help="least length of each answer; 0 lets the model end it (default)")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=600, help="length of the overload")
    parser.add_argument("--output", type=Path, required=True, help="JSON file; the worker's log lies beside it")
    parser.add_argument("--worker-flags", type=shlex.split, default=[], help='more flags for the worker: "--max-batch-rows 8"')
    args = parser.parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    outcome = {"throughput": throughput, "overload": overload}[args.task](args)
    args.output.write_text(json.dumps(outcome, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in outcome.items() if name != "memory MiB"}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
