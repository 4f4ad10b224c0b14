"""What attacks on the services cost, and what they cost everybody else: two checkouts side by side, in turns.

    python scripts/benchmark/attacks.py --before ../old --after . --output attacks.json
    python scripts/benchmark/attacks.py --before ../old --after . --ordinary 1000

Each attack runs against services of its own on 127.0.0.1, with the micro model, before and after; meanwhile somebody else asks short
questions. Printed for each: peak memory and CPU seconds of the attacked service, and how many of the others' questions were answered, by
which time. Each image file whose metadata is an attack is decoded in a process of its own, as each checkout decodes it: CPU seconds, memory
beyond what the process held before, and whether it was decoded or refused.

`--ordinary` asks so many well-meant questions of each checkout in turns instead, plain ones through a controller and ones about images at a
worker, and decodes the image files of the tests, the playground and one of each format, and gives the ratios of CPU times.

What is measured depends on Pillow, whose version is told: name a folder with another one first in PYTHONPATH to measure with that.
Needs about 6 GB of memory, of which the files take most. The attacked programs are run as they are in each checkout; flags that both know
are used alone.
"""

from __future__ import annotations

import argparse
import base64
import functools
import http.client
import itertools
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
from attack_images import HOSTILE, LARGE, well_meant
from PIL import __version__ as pillow_version

MODEL = "avg-llava-micro"
CHAT = "/v1/chat/completions"
LARGEST = 64_000_000
SEARCH_SECONDS = 180.0
MOST_MEMORY = 8 << 30
"""Bytes of address space of a process that decodes a hostile file; what would take more fails instead of taking this machine's."""

DECODE_ONE = """
import json, resource, sys, time
from pathlib import Path
from llava.images import ImageError, decode_image

def held(name):
    return int(Path("/proc/self/status").read_text().partition(name)[2].split()[0]) / 1024

resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
data = Path(sys.argv[1]).read_bytes()
decode_image(Path(sys.argv[2]).read_bytes())  # so that nothing is imported while the clock runs
Path("/proc/self/clear_refs").write_text("5")
before, begun = held("VmRSS:"), time.process_time()
try:
    decode_image(data)
    outcome = "decoded"
except ImageError:
    outcome = "refused"
except MemoryError:
    outcome = "out of memory"
print(json.dumps({"cpu_seconds": time.process_time() - begun, "memory_mb": held("VmHWM:") - before, "outcome": outcome}))
""".replace("MOST_MEMORY", str(MOST_MEMORY))
"""Of a checkout: decodes the file of the first argument, after that of the second; prints what it cost."""

DECODE_IN_TURNS = """
import sys, time
from pathlib import Path
from llava.images import decode_image

files = [Path(name).read_bytes() for name in sys.argv[1:]]
for _ in sys.stdin:
    begun = time.process_time()
    for data in files:
        decode_image(data)
    print(time.process_time() - begun, flush=True)
"""
"""Of a checkout: decodes all files of the arguments for each line that it reads, and prints the CPU seconds."""


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


@dataclass(frozen=True)
class FileCost:
    """Of decoding one file as one checkout does, beyond what the process cost before."""

    file: str
    megabytes: float
    checkout: str
    memory_mb: float
    cpu_seconds: float
    outcome: str


def question(text: str = "Who are you?", images: Sequence[bytes] = (), **more: object) -> dict[str, object]:
    """The body of a question about images."""
    # what an image is said to be is not looked at, its bytes are
    urls = [f"data:image/png;base64,{base64.b64encode(image).decode()}" for image in images]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls] + [{"type": "text", "text": text}]
    return {"model": MODEL, "max_tokens": 4, "messages": [{"role": "user", "content": parts if images else text}], **more}


def ask(port: int, key: str | None = None, seconds: float = 60.0, path: str = CHAT, body: object = None) -> int:
    """The status of one question; 0 where none came in time."""
    return reply(port, key, seconds, path, body)[0]


def reply(port: int, key: str | None = None, seconds: float = 60.0, path: str = CHAT, body: object = None) -> tuple[int, bytes]:
    """Status and body of the answer to one question; 0 where none came in time."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=seconds)
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    try:
        connection.request("POST", path, json.dumps(body or question()).encode(), headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except OSError:
        return 0, b""
    finally:
        connection.close()


def environment(checkout: Path) -> dict[str, str]:
    """Variables of a program of a checkout: its code comes first, then what PYTHONPATH already named."""
    path = os.pathsep.join([str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@contextmanager
def service(checkout: Path, module: str, *flags: str) -> Iterator[Service]:
    """A program, from when it answers to the end of the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", f"llava.serve.{module}", "--host", "127.0.0.1", "--port", str(port), "--log-level", "warning", *flags]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, cwd=checkout, env=environment(checkout), stdout=log, stderr=log)
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
    """Register a worker that sends no heartbeats."""
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
    cost = Cost(
        name,
        checkout.name,
        round(attacked.peak_mb()),
        round(attacked.cpu_seconds() - before, 1),
        len(found),
        sum(status == 200 for status, _ in found),
        round(max(seconds for _, seconds in found), 1),
    )
    print(cost, file=sys.stderr, flush=True)
    return cost


def stalled_registrations(name: str, checkout: Path) -> Cost:
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

        return measured(name, checkout, controller, attack)


def stalled_uploads(name: str, checkout: Path) -> Cost:
    """Eight uploads of 64 MB by one client with a key; others ask with the same key, from the same address."""
    with ExitStack() as stack:
        worker = stack.enter_context(service(checkout, "model_worker", "--api-key", "worker"))
        assert ask(worker.port, "worker") == 200

        def attack() -> list[tuple[int, float]]:
            stall(stack, worker.port, CHAT, 8, "worker")
            return others(worker.port, "worker")

        return measured(name, checkout, worker, attack)


def hung_worker(name: str, checkout: Path) -> Cost:
    """One of two workers is stopped; eight questions come at once, and each client waits a minute."""
    with ExitStack() as stack:
        controller = stack.enter_context(service(checkout, "controller"))
        workers = [stack.enter_context(service(checkout, "model_worker")) for _ in range(2)]
        for worker in workers:
            assert ask(worker.port) == 200
            join(controller, worker)
        os.kill(workers[1].process.pid, signal.SIGSTOP)
        return measured(name, checkout, controller, lambda: others(controller.port, None, 8, together=True))


def large_images(name: str, checkout: Path) -> Cost:
    """One request of large images at a worker; others ask about small ones, one after the other, until it is answered."""
    count, build = LARGE[name]
    attack_body = question(images=[build()] * count, granularity=4, max_tokens=2)
    plain_body = question("What is the background colour?", [playground_images(checkout)[0]])
    with service(checkout, "model_worker") as worker:
        assert ask(worker.port, body=plain_body) == 200

        def ask_until_answered() -> None:
            while ask(worker.port, seconds=300, body=attack_body) == 503:  # it came while somebody else's image was decoded
                pass

        def attack() -> list[tuple[int, float]]:
            found: list[tuple[int, float]] = []
            thread = threading.Thread(target=ask_until_answered)
            thread.start()
            while thread.is_alive():
                start = time.monotonic()
                found.append((ask(worker.port, body=plain_body), time.monotonic() - start))
                time.sleep(0.1)
            return found

        return measured(name, checkout, worker, attack)


def playground_images(checkout: Path) -> list[bytes]:
    """The files of the playground's images."""
    return [path.read_bytes() for path in sorted((checkout / "playground" / "images").glob("*.png"))]


ATTACKS: dict[str, Callable[[str, Path], Cost]] = {
    "stalled registrations, no key": stalled_registrations,
    "stalled uploads of one client": stalled_uploads,
    "hung worker": hung_worker,
    **dict.fromkeys(LARGE, large_images),
}


def hostile_files(checkouts: Sequence[Path], only: str) -> list[FileCost]:
    """What each hostile file in whose name this text stands costs a process of each checkout that decodes it."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image"
        for name in (name for name in HOSTILE if only in name):
            path.write_bytes(HOSTILE[name]())
            for checkout in checkouts:
                warm_up = next((checkout / "playground" / "images").glob("*.png"))
                command = [sys.executable, "-c", DECODE_ONE, str(path), str(warm_up)]
                done = subprocess.run(command, cwd=checkout, env=environment(checkout), stdout=subprocess.PIPE, check=True, timeout=600)
                cost = json.loads(done.stdout)
                found.append(FileCost(name, path.stat().st_size / 1e6, checkout.name, **cost))
                print(found[-1], file=sys.stderr, flush=True)
    return found


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def attack_table(costs: Sequence[Cost]) -> str:
    """Of attacks on services."""
    head = ("attack", "checkout", "peak memory, MB", "CPU, s", "others answered", "slowest, s")
    return markdown(
        head,
        [
            (each.attack, each.checkout, each.memory_mb, each.cpu_seconds, f"{each.answered} of {each.asked}", each.slowest_seconds)
            for each in costs
        ],
    )


def file_table(costs: Sequence[FileCost]) -> str:
    """Of files that are decoded."""
    head = ("file", "MB", "checkout", "CPU, s", "memory, MB", "outcome")
    return markdown(
        head,
        [
            (each.file, f"{each.megabytes:.1f}", each.checkout, f"{each.cpu_seconds:.2f}", f"{each.memory_mb:.0f}", each.outcome)
            for each in costs
        ],
    )


def in_turns(works: dict[str, Callable[[], float]], rounds: int) -> dict[str, object]:
    """Rounds of two checkouts in turns, each of which gives seconds: medians, and the ratio of the second to the first."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds):
        for name in list(works)[:: 1 if number % 2 else -1]:  # neither is always the first
            times[name].append(works[name]())
    medians = {name: statistics.median(each) for name, each in times.items()}
    before, after = medians.values()
    ratios = sorted(one / other for other, one in zip(*times.values(), strict=True))
    spread = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    return {"CPU milliseconds": {name: 1000 * each for name, each in medians.items()}, "ratio": after / before, "quartiles": spread}


def ordinary(checkouts: Sequence[Path], count: int, round_size: int = 50) -> dict[str, object]:
    """Well-meant questions of both checkouts, one after the other, in turns of some: plain ones through a controller, then about images."""
    images = itertools.cycle(playground_images(checkouts[-1]))
    bodies = [question("What number is on the sign?", [next(images)]) for _ in range(round_size)]
    answers: dict[str, set[str]] = {}
    with ExitStack() as stack:
        plain, with_images = {}, {}
        for checkout in checkouts:
            controller = stack.enter_context(service(checkout, "controller"))
            worker = stack.enter_context(service(checkout, "model_worker"))
            join(controller, worker)
            answers[checkout.name] = set()
            plain[checkout.name] = functools.partial(_round, (controller, worker), [question()] * round_size, set())
            with_images[checkout.name] = functools.partial(_round, (worker,), bodies, answers[checkout.name])
            for warm_up in (plain, with_images):
                warm_up[checkout.name]()
        result: dict[str, object] = {"plain questions": in_turns(plain, count // round_size)}
        result["questions about images"] = in_turns(with_images, count // round_size)
    before, after = answers.values()
    return {**result, "same answers": before == after, "decoding": decoding(checkouts, count // round_size)}


def _round(services: Sequence[Service], bodies: Sequence[object], answers: set[str]) -> float:
    """CPU seconds that the services need for one of these questions, which the first of them is asked; notes the answers."""
    begun = sum(each.cpu_seconds() for each in services)
    replies = [reply(services[0].port, body=body) for body in bodies]
    assert all(status == 200 for status, _ in replies)
    answers.update(f"{number}: {json.loads(data)['choices'][0]['message']['content']}" for number, (_, data) in enumerate(replies))
    return (sum(each.cpu_seconds() for each in services) - begun) / len(bodies)


def decoding(checkouts: Sequence[Path], rounds: int) -> dict[str, object]:
    """CPU seconds of decoding all well-meant files, in processes of both checkouts in turns."""
    with ExitStack() as stack:
        files = well_meant(checkouts[-1], Path(stack.enter_context(tempfile.TemporaryDirectory())))
        works = {}
        for checkout in checkouts:
            command = [sys.executable, "-c", DECODE_IN_TURNS, *map(str, files)]
            streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            child = stack.enter_context(subprocess.Popen(command, cwd=checkout, env=environment(checkout), text=True, bufsize=1, **streams))
            works[checkout.name] = functools.partial(_decode_round, child)
            works[checkout.name]()
        result = in_turns(works, rounds)
    return {"files": len(files), **result}


def _decode_round(child: subprocess.Popen[str]) -> float:
    assert child.stdin and child.stdout
    child.stdin.write("\n")
    return float(child.stdout.readline())


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="a checkout; its folder's name is what the table calls it")
    parser.add_argument("--after", type=Path, required=True, help="another one")
    parser.add_argument("--ordinary", type=int, metavar="N", help="ask so many well-meant questions of each kind instead")
    parser.add_argument("--only", default="", metavar="TEXT", help="leave out attacks and files in whose name this text does not stand")
    parser.add_argument("--output", type=Path, help="also write what was measured to this file, as JSON")
    args = parser.parse_args()
    checkouts = [args.before.resolve(), args.after.resolve()]
    result: dict[str, object] = {"pillow": pillow_version}
    if args.ordinary:
        result |= ordinary(checkouts, args.ordinary)
        print(json.dumps(result, indent=2))
    else:
        print(f"Pillow {pillow_version}\n", flush=True)
        files = hostile_files(checkouts, args.only)
        print(file_table(files) + "\n" if files else "", flush=True)
        costs = [attack(name, checkout) for name, attack in ATTACKS.items() if args.only in name for checkout in checkouts]
        print(attack_table(costs) if costs else "")
        result |= {"attacks": [asdict(cost) for cost in costs], "files": [asdict(cost) for cost in files]}
    if args.output:
        args.output.write_text(json.dumps(result, indent=2), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
