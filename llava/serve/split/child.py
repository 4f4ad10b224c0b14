"""A vLLM of our own: started, its output logged, started again when it ends, and ended with us."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shlex
import shutil
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import llava
from llava.serve.split import leash

logger = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds before a server that ended is started again: the first, doubled each time up to the second."""
FAILED_STARTS = 5
"""Starts in a row that end before the server was ready; then it is given up."""
_LINE_BYTES = 4096
"""Of a line of its output that are logged."""


def vllm_python(given: str | None) -> str:
    """The Python of vLLM's environment: the given one, else that of `scripts/setup_vllm.sh`.

    Raises:
        ValueError: there is none.
    """
    folder = os.environ.get("VLLM_ENV") or str(Path(llava.__file__).parents[1] / ".venv-vllm")
    found = shutil.which(given or str(Path(folder) / "bin" / "python"))
    if found is None:
        raise ValueError(
            f"There is no Python of vLLM's at {given or folder!r}; run scripts/setup_vllm.sh, name one with --vllm-python, or a running "
            "vLLM with --vllm."
        )
    return found


@dataclass(frozen=True)
class ServerCommand:
    """How a vLLM is started that takes rows for images.

    python: of vLLM's environment. model: checkpoint folder or hub id. name: that it serves the model under. dtype: of the weights and rows.
    context_length: positions of a prompt and its answer. concurrency: requests at once. extra: further flags, which win over these.
    """

    python: str
    model: str
    name: str
    dtype: str
    context_length: int
    concurrency: int
    extra: str = ""
    port: int = field(default_factory=lambda: _free_port())
    api_key: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)

    @property
    def url(self) -> str:
        """A private address: tensors are loaded there, so nobody else may reach it."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def arguments(self) -> list[str]:
        """The command line.

        Raises:
            ValueError: the further flags are no command line.
        """
        return [
            *(self.python, "-m", "vllm.entrypoints.openai.api_server", "--model", self.model, "--served-model-name", self.name),
            *("--host", "127.0.0.1", "--port", str(self.port), "--dtype", self.dtype, "--max-model-len", str(self.context_length)),
            *("--max-num-seqs", str(self.concurrency), "--enable-mm-embeds", "--limit-mm-per-prompt", '{"image": 0}'),
            "--disable-uvicorn-access-log",
            *shlex.split(self.extra),
        ]

    @property
    def environment(self) -> dict[str, str]:
        """The key travels here, where the process list does not show it."""
        return {**os.environ, "VLLM_API_KEY": self.api_key, "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


class ChildServer:
    """Keeps a server running.

    Args:
        command, environment: of its process. on_end: called when it has ended, before it is started again.
    """

    def __init__(self, command: Sequence[str], environment: dict[str, str], on_end: Callable[[], None] = lambda: None) -> None:
        self.command, self.environment, self.on_end = list(command), environment, on_end
        self.process: asyncio.subprocess.Process | None = None
        self.gave_up = False
        self._failed_starts = 0

    def was_ready(self) -> None:
        """The server has answered; what ends after this was no failed start."""
        self._failed_starts = 0

    async def run(self) -> None:
        """Keep it running until this is cancelled, which ends it, or until it is given up."""
        try:
            while self._failed_starts < FAILED_STARTS:
                self._failed_starts += 1  # until it says that it is ready
                status = await self._run_once()
                self.on_end()
                pause = min(FIRST_PAUSE * 2 ** max(0, self._failed_starts - 1), LONGEST_PAUSE)
                logger.error("the vLLM ended with status %s; it is started again in %.0f s", status, pause)
                await asyncio.sleep(pause)
            self.gave_up = True
            logger.critical("the vLLM ended %d times before it was ready; it is given up: see its output above", FAILED_STARTS)
        finally:
            await self._end()

    async def _run_once(self) -> int | None:
        """Start it, log what it says, and return its exit status; `None` where it cannot be started."""
        logger.info("starting %s", shlex.join(self.command))
        # The leash alone has the pipe's other end: it closes when this process ends, in whatever way.
        whole = [sys.executable, "-I", str(Path(leash.__file__)), *self.command]
        self.process = await asyncio.create_subprocess_exec(
            *whole,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=self.environment,
            start_new_session=True,  # Ctrl-C at the terminal is ours to handle
        )
        assert self.process.stdout is not None
        while line := await self._line(self.process.stdout):
            logger.info("vllm | %s", line[:_LINE_BYTES].decode(errors="replace").rstrip())
        return await self.process.wait()

    async def _line(self, output: asyncio.StreamReader) -> bytes:
        try:
            return await output.readline()
        except ValueError:  # longer than the reader's buffer, which it has dropped
            return b"(a line too long to be logged)"

    async def _end(self) -> None:
        """Close the leash and wait until all is gone."""
        process = self.process
        if process is None or process.returncode is not None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            await asyncio.wait_for(process.communicate(), leash.GRACE_SECONDS + 5)
        except asyncio.TimeoutError:
            process.kill()
        await process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
