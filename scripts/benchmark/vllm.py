"""The engines side by side: requests/s and the time to the first token of the embedded engine, of vLLM with the plug-in, and of the split.

    python scripts/benchmark/vllm.py --output vllm.md

Each engine is started on 127.0.0.1, asked the playground's questions over HTTP by 1, 16 and 64 clients that always have one question open,
at the finest and the coarsest level and as the router decides, and stopped; nothing else should run meanwhile. Answers are streamed. Each
cell is warmed up with a request per client, then measured for a while; what is unfinished at its end is cancelled and not counted. The
questions come in one order for all, 4,000 about 400 images, so images come back and every engine's caches are at work.

Models: the micro model that ships with us, and one of its geometry with a random language model of SmolLM2-135M's shape (`--models
large`), whose answers mean nothing and take as long as a trained one's. On two cores the whole takes about 12 minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import httpx

from llava.inference import micro_model_path
from llava.messages import Message, RoutingRequest, normalise_turns
from llava.openai_chat import chat_messages, image_url, processor_kwargs, routing_fields

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = ROOT / "playground" / "eval" / "test.jsonl"
NAME = "bench"
START_SECONDS = 600.0
WAYS = {"full": RoutingRequest(64), "coarsest": RoutingRequest(4), "adaptive": RoutingRequest()}
"""Column -> what is asked of the granularity."""
MODELS = {"micro": (16, 1.0, (1, 16, 64)), "large": (8, 2.0, (1, 16))}
"""Model -> longest answer in tokens, measured time in multiples of --seconds, and numbers of clients."""
LARGE = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
"""The language model of SmolLM2-135M, without its vocabulary."""


@dataclass(frozen=True)
class Engine:
    """How to start an engine, and in whose words to ask it.

    command: with MODEL, PORT, PYTHON (ours) and VLLM (the folder of vLLM's environment) to be filled in. ready: path that says so.
    """

    command: str
    ready: str
    is_vllm: bool = False


WORKER = "PYTHON -m llava.serve.model_worker --host 127.0.0.1 --port PORT --model-path MODEL --model-name bench --device cpu"
ENGINES = {
    "embedded": Engine(f"{WORKER} --max-batch-rows 64 --max-queue 256", "/ready"),
    "plug-in": Engine(
        "VLLM/bin/vllm serve MODEL --host 127.0.0.1 --port PORT --served-model-name bench --dtype float32 --max-model-len 1024 "
        "--max-num-seqs 64 --trust-request-mm-kwargs --enforce-eager",
        "/health",
        is_vllm=True,
    ),
    "split": Engine(f"{WORKER} --max-queue 256 --engine vllm --vllm-python VLLM/bin/python --vllm-args=--enforce-eager", "/ready"),
}


# ---- models


def large_model(folder: Path) -> Path:
    """A native folder of the micro model's tower and tokenizer with a random language model of `LARGE`."""
    import torch

    from llava.convert import main as convert
    from llava.model.native import AvgLlavaConfig, AvgLlavaForConditionalGeneration

    if convert([micro_model_path(), str(folder), "--to", "native"]) != 0:
        raise SystemExit("The micro model could not be converted; its message is above.")
    config = AvgLlavaConfig.from_pretrained(folder)
    for name, value in LARGE.items():
        setattr(config.text, name, value)
    config.text.head_dim = LARGE["hidden_size"] // LARGE["num_attention_heads"]
    torch.manual_seed(0)
    model = AvgLlavaForConditionalGeneration._from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    print(f"large: {sum(each.numel() for each in model.parameters()) / 1e6:.0f} million parameters", flush=True)
    return folder


# ---- engines


@contextmanager
def running(engine: Engine, model: Path, vllm: Path, log: Path) -> Iterator[str]:
    """The engine's address, once it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    filled = {"MODEL": str(model), "PORT": str(port), "PYTHON": sys.executable}
    command = [filled.get(word, word.replace("VLLM/", f"{vllm}/")) for word in engine.command.split()]
    variables = {"PYTHONPATH": str(ROOT), "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | variables, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url + engine.ready, process, log)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it left behind


def wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            if httpx.get(url, timeout=5, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.3)
    process.kill()
    raise SystemExit(f"{url} did not become ready; the end of its log:\n{log.read_text()[-3000:]}")


# ---- load


@lru_cache(maxsize=512)
def url_of(name: str) -> str:
    return image_url(QUESTIONS.parent / name)


def body_of(row: dict[str, Any], way: RoutingRequest, is_vllm: bool, max_tokens: int) -> dict[str, Any]:
    """A question as a streamed chat completion."""
    messages = chat_messages(normalise_turns([Message("user", row["text"])], 1), [url_of(row["image"])])
    wishes: dict[str, Any] = {"mm_processor_kwargs": processor_kwargs(way)} if is_vllm else routing_fields(way)
    return {"model": NAME, "messages": messages, "temperature": 0, "max_tokens": max_tokens, "stream": True, **wishes}


@dataclass
class Cell:
    """What one number of clients met: answers finished within the time, and the first token of each, in seconds."""

    seconds: float
    answers: int
    ttft: list[float]

    def __str__(self) -> str:
        if not self.answers:
            return f"none in {self.seconds:.0f} s"
        return f"{self.answers / self.seconds:.1f} / {1000 * statistics.median(self.ttft):,.0f}"


async def measure(url: str, bodies: Iterator[dict[str, Any]], clients: int, seconds: float) -> Cell:
    """Keep so many requests open for a while."""
    cell = Cell(seconds, 0, [])
    async with httpx.AsyncClient(base_url=url, timeout=300, trust_env=False, limits=httpx.Limits(max_connections=None)) as client:

        async def ask() -> float:
            start, first = time.monotonic(), 0.0
            async with client.stream("POST", "/v1/chat/completions", json=next(bodies)) as response:
                if response.status_code != 200:
                    raise SystemExit(f"status {response.status_code}: {(await response.aread())[:500].decode()}")
                async for line in response.aiter_lines():
                    if not first and '"content"' in line and '"content":""' not in line.replace(" ", ""):
                        first = time.monotonic() - start
            return first or time.monotonic() - start

        async def keep_asking() -> None:
            while True:
                ttft = await ask()
                cell.answers += 1
                cell.ttft.append(ttft)

        await asyncio.gather(*(ask() for _ in range(clients)))
        tasks = [asyncio.create_task(keep_asking()) for _ in range(clients)]
        done, pending = await asyncio.wait(tasks, timeout=seconds)
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for task in done:
            task.result()
    return cell


def table(model: str, cells: dict[tuple[str, str, int], Cell]) -> str:
    """Requests/s and median milliseconds to the first token, by engine and granularity."""
    counts = MODELS[model][2]
    heads = "".join(f" {count} client{'s' * (count > 1)} |" for count in counts)
    lines = [f"| {model}: requests/s / TTFT in ms | granularity |{heads}", "| --- | --- |" + " --- |" * len(counts)]
    for engine, way in dict.fromkeys((engine, way) for engine, way, _ in cells):
        lines.append(f"| {engine} | {way} |" + "".join(f" {cells[engine, way, count]} |" for count in counts))
    return "\n".join(lines)


def run(args: argparse.Namespace, scratch: Path) -> str:
    rows = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    random.Random(0).shuffle(rows)
    tables = []
    for model in args.models:
        folder = Path(micro_model_path()) if model == "micro" else large_model(scratch / model)
        max_tokens, factor, counts = MODELS[model]
        cells: dict[tuple[str, str, int], Cell] = {}
        for name in args.engines:
            engine = ENGINES[name]
            with running(engine, folder, args.vllm_env.absolute(), scratch / f"{model}-{name}.log") as url:
                for way, clients in itertools.product(WAYS, counts):
                    bodies = (body_of(row, WAYS[way], engine.is_vllm, max_tokens) for row in itertools.cycle(rows))
                    cell = cells[name, way, clients] = asyncio.run(measure(url, bodies, clients, args.seconds * factor))
                    print(f"{model}, {name}, {way}, {clients} clients: {cell}", flush=True)
        tables.append(table(model, cells))
    return "\n\n".join(tables) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-env", type=Path, default=Path(os.environ.get("VLLM_ENV", ROOT / ".venv-vllm")), metavar="FOLDER",
                        help="vLLM's environment, which scripts/setup_vllm.sh makes")  # fmt: skip
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--seconds", type=float, default=6.0, metavar="S", help="measured time of a cell; the large model's is twice that")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the tables in Markdown; they are printed, too")
    args = parser.parse_args(argv)
    if not (args.vllm_env / "bin" / "vllm").exists() and set(args.engines) != {"embedded"}:
        parser.error(f"there is no vLLM in {args.vllm_env}; bash scripts/setup_vllm.sh makes an environment, --vllm-env names another")
    with tempfile.TemporaryDirectory() as scratch:
        text = run(args, Path(scratch))
    print("\n" + text)
    if args.output:
        args.output.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
