"""What attacks on the services cost, and what they cost everybody else: two checkouts side by side, in turns.

    python scripts/benchmark/attacks.py --before ../old --after . --output attacks.json
    python scripts/benchmark/attacks.py --before ../old --after . --ordinary 1000

Each attack runs against services of its own on 127.0.0.1, with the micro model, before and after; meanwhile somebody else asks short
questions. Printed for each: peak memory and CPU seconds of the attacked service, and how many of the others' questions were answered, by
which time. `--ordinary` asks so many plain questions through a controller of each checkout in turns instead, and gives the ratio of times.
Needs about 1.5 GB of memory. The attacked programs are run as they are in each checkout; flags that both know are used alone.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

MODEL = "avg-llava-micro"
CHAT = "/v1/chat/completions"
LARGEST = 64_000_000
SEARCH_SECONDS = 180.0


@dataclass(frozen=True)
class Service:
    """A program of one checkout that runs."""

    process: subprocess.Popen[bytes]
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def peak_mb(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024

    def cpu_seconds(self) -> float:
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)


@dataclass(frozen=True)
class Cost:
    """Of one attack on one checkout: of the attacked service, and of the others' questions."""

    attack: str
    checkout: str
    memory_mb: float
    cpu_seconds: float
    asked: int
    answered: int
    slowest_seconds: float


def ask(port: int, key: str | None = None, seconds: float = 60.0, path: str = CHAT, body: object = None) -> int:
    """The status of one question; 0 where none came in time."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=seconds)
    asked = body or {"model": MODEL, "max_tokens": 4, "messages": [{"role": "user", "content": "Who are you?"}]}
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    try:
        connection.request("POST", path, json.dumps(asked).encode(), headers)
        answer = connection.getresponse()
        answer.read()
        return answer.status
    except OSError:
        return 0
    finally:
        connection.close()


@contextmanager
def service(checkout: Path, module: str, *flags: str) -> Iterator[Service]:
    """A program, from when it answers to the end of the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", f"llava.serve.{module}", "--host", "127.0.0.1", "--port", str(port), "--log-level", "warning", *flags]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, cwd=checkout, env=environment, stdout=log, stderr=log)
        running = Service(process, port)
        try:
            _wait_for(running)
            yield running
        finally:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()


def _wait_for(running: Service) -> None:
    end = time.monotonic() + SEARCH_SECONDS
    while time.monotonic() < end:
        if running.process.poll() is not None:
            raise RuntimeError(f"the program on port {running.port} ended with status {running.process.returncode}")
        with suppress(OSError):
            connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        time.sleep(0.2)
    raise RuntimeError(f"the program on port {running.port} did not answer")


def join(controller: Service, worker: Service, token: str | None = None) -> None:
    """Register a worker that sends no heart beats."""
    body = {"worker_name": worker.url, "check_heart_beat": False, "worker_status": {"model_names": [MODEL]}}
    status = ask(controller.port, path="/register_worker", body={**body, **({"token": token} if token else {})})
    assert status == 200, status


def stall(stack: ExitStack, port: int, path: str, count: int, key: str | None = None) -> None:
    """Send bodies of the largest size but for their last two bytes, and leave the connections open."""
    lines = [f"POST {path} HTTP/1.1", "Host: a", "Content-Type: application/json", f"Content-Length: {LARGEST}"]
    lines += [f"Authorization: Bearer {key}"] if key else []
    data = "\r\n".join([*lines, "", ""]).encode() + b'{"a":"' + b"a" * (LARGEST - 8)

    def send(sock: socket.socket) -> None:
        with suppress(OSError):
            sock.sendall(data)

    for _ in range(count):
        sock = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
        threading.Thread(target=send, args=(sock,), daemon=True).start()
    time.sleep(3)  # in which all of it is sent, or refused


def others(port: int, key: str | None, count: int = 20, together: bool = False) -> list[tuple[int, float]]:
    """Statuses of somebody else's questions and the seconds that they took; a refused one is not asked again."""
    found: list[tuple[int, float]] = []

    def one() -> None:
        start = time.monotonic()
        found.append((ask(port, key), time.monotonic() - start))

    threads = [threading.Thread(target=one) for _ in range(count)]
    for thread in threads:
        thread.start()
        if not together:
            thread.join()
    for thread in threads:
        thread.join()
    return found


def measured(name: str, checkout: Path, attacked: Service, attack: Callable[[], list[tuple[int, float]]]) -> Cost:
    """Run an attack, with what it costs."""
    before = attacked.cpu_seconds()
    found = attack()
    return Cost(
        name,
        checkout.name,
        round(attacked.peak_mb()),
        round(attacked.cpu_seconds() - before, 1),
        len(found),
        sum(status == 200 for status, _ in found),
        round(max(seconds for _, seconds in found), 1),
    )


def stalled_registrations(checkout: Path) -> Cost:
    """Eight registrations of 64 MB without key or token that stop two bytes before their end, at a controller with both."""
    with ExitStack() as stack:
        worker = stack.enter_context(service(checkout, "model_worker", "--api-key", "worker"))
        flags = ("--api-key", "client", "--worker-token", "token", "--worker-api-key", "worker")
        controller = stack.enter_context(service(checkout, "controller", *flags))
        join(controller, worker, "token")
        assert ask(controller.port, "client") == 200

        def attack() -> list[tuple[int, float]]:
            stall(stack, controller.port, "/register_worker", 8)
            return others(controller.port, "client")

        return measured("stalled registrations, no key", checkout, controller, attack)


def stalled_uploads(checkout: Path) -> Cost:
    """Eight uploads of 64 MB by one client with a key; others ask with the same key, from the same address."""
    with ExitStack() as stack:
        worker = stack.enter_context(service(checkout, "model_worker", "--api-key", "worker"))
        assert ask(worker.port, "worker") == 200

        def attack() -> list[tuple[int, float]]:
            stall(stack, worker.port, CHAT, 8, "worker")
            return others(worker.port, "worker")

        return measured("stalled uploads of one client", checkout, worker, attack)


def hung_worker(checkout: Path) -> Cost:
    """One of two workers is stopped; eight questions come at once, and each client waits a minute."""
    with ExitStack() as stack:
        controller = stack.enter_context(service(checkout, "controller"))
        workers = [stack.enter_context(service(checkout, "model_worker")) for _ in range(2)]
        for worker in workers:
            assert ask(worker.port) == 200
            join(controller, worker)
        os.kill(workers[1].process.pid, signal.SIGSTOP)
        return measured("hung worker", checkout, controller, lambda: others(controller.port, None, 8, together=True))


ATTACKS = (stalled_registrations, stalled_uploads, hung_worker)


def table(costs: Sequence[Cost]) -> str:
    """The costs as lines of Markdown."""
    head = "| attack | checkout | peak memory, MB | CPU, s | others answered | slowest, s |\n| --- | --- | --- | --- | --- | --- |"
    lines = [
        f"| {cost.attack} | {cost.checkout} | {cost.memory_mb:g} | {cost.cpu_seconds:g} | {cost.answered} of {cost.asked} "
        f"| {cost.slowest_seconds:g} |"
        for cost in costs
    ]
    return "\n".join([head, *lines])


def ordinary(checkouts: Sequence[Path], count: int, round_size: int = 50) -> dict[str, object]:
    """Plain questions through a controller and a worker of each checkout, one after the other, in turns of some."""
    times: dict[str, list[float]] = {checkout.name: [] for checkout in checkouts}
    with ExitStack() as stack:
        ports = {}
        for checkout in checkouts:
            controller = stack.enter_context(service(checkout, "controller"))
            join(controller, stack.enter_context(service(checkout, "model_worker")))
            ports[checkout.name] = controller.port
            assert all(ask(controller.port) == 200 for _ in range(20))
        for number in range(count // round_size):
            for name in list(ports)[:: 1 if number % 2 else -1]:  # neither is always the first
                start = time.perf_counter()
                assert all(ask(ports[name]) == 200 for _ in range(round_size))
                times[name].append((time.perf_counter() - start) / round_size)
    medians = {name: statistics.median(each) for name, each in times.items()}
    before, after = medians.values()
    ratios = [one / other for other, one in zip(*times.values(), strict=True)]
    spread = sorted(ratios)[len(ratios) // 4], sorted(ratios)[-1 - len(ratios) // 4]
    return {"milliseconds": {name: 1000 * each for name, each in medians.items()}, "ratio": after / before, "quartiles": spread}


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--before", type=Path, required=True, help="a checkout; its folder's name is what the table calls it")
    parser.add_argument("--after", type=Path, required=True, help="another one")
    parser.add_argument("--ordinary", type=int, metavar="N", help="ask so many plain questions of each instead")
    parser.add_argument("--output", type=Path, help="also write what was measured to this file, as JSON")
    args = parser.parse_args()
    checkouts = [args.before.resolve(), args.after.resolve()]
    if args.ordinary:
        result: object = ordinary(checkouts, args.ordinary)
        print(json.dumps(result, indent=2))
    else:
        costs = [attack(checkout) for attack in ATTACKS for checkout in checkouts]
        print(table(costs))
        result = [asdict(cost) for cost in costs]
    if args.output:
        args.output.write_text(json.dumps(result, indent=2), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
