"""A vLLM server of its own environment, for the length of a `with` block."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from llava.serve.split import leash
from tests.serve.ports import free_port

ROOT = Path(__file__).parents[2]
NAME = "avg-llava"
"""What the served model is called."""
SECONDS_TO_START = 600


class VllmServer:
    """`with VllmServer(environment, model, "--trust-request-mm-kwargs", log=path) as server: server.post(...)`.

    Args:
        environment: folder that scripts/setup_vllm.sh made. model: checkpoint folder. flags: of `vllm serve`.
        log: file for its output. variables: of its process. port: a free one where none is given.
    """

    def __init__(
        self, environment: Path, model: Path, *flags: str, log: Path, variables: Mapping[str, str] | None = None, port: int | None = None
    ) -> None:
        self.port, self.log = port or free_port(), log
        common = ["--served-model-name", NAME, "--dtype", "float32", "--max-model-len", "1024", "--host", "127.0.0.1"]
        self._command = [str(environment / "bin" / "vllm"), "serve", str(model), *common, "--port", str(self.port), *flags]
        self._variables = {
            **os.environ,
            "PYTHONPATH": str(ROOT),  # this checkout's plug-in, wherever the environment's own came from
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            **(variables or {}),
        }

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def post(self, path: str, body: Mapping[str, Any]) -> httpx.Response:
        """Send a body to the server."""
        return httpx.post(f"{self.url}{path}", json=dict(body), timeout=300)

    def chat(self, messages: Sequence[Mapping[str, Any]], **fields: Any) -> httpx.Response:
        """Ask for a greedy answer of up to 24 tokens, with their ids."""
        settings = {"model": NAME, "temperature": 0, "max_tokens": 24, "return_token_ids": True, **fields}
        return self.post("/v1/chat/completions", {"messages": list(messages), **settings})

    def is_well(self) -> bool:
        """Whether the server and its engine answer."""
        return httpx.get(f"{self.url}/health", timeout=60).status_code == 200

    def metric(self, name: str) -> float:
        """A number of `/metrics`, summed over its labels."""
        lines = httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name}{{", f"{name} ")))

    def __enter__(self) -> VllmServer:
        with self.log.open("wb") as output:
            # On a leash: it ends with all its processes when this one does, however that ends.
            leashed = [sys.executable, "-I", leash.__file__, *self._command]
            self._process = subprocess.Popen(
                leashed, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env=self._variables, cwd=self.log.parent
            )
        end = time.monotonic() + SECONDS_TO_START
        while time.monotonic() < end and self._process.poll() is None:
            try:
                if self.is_well():
                    return self
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
        self._stop()
        raise RuntimeError(f"vLLM did not start; the end of {self.log}:\n" + self.log.read_text(errors="replace")[-6000:])

    def kill(self) -> None:
        """End all of its processes at once, as a lost machine does."""
        [server] = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        os.killpg(int(server), signal.SIGKILL)
        self._process.wait(20)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()

    def _stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(leash.GRACE_SECONDS + 20)
