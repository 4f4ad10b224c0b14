"""An app on a real socket of this machine, in a thread of the test's own process."""

from __future__ import annotations

import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from fastapi import FastAPI

from llava.serve.http.server import DrainingServer, make_server


class RunningApp:
    """`with RunningApp(app) as running: httpx.get(running.url)`: serves on 127.0.0.1, on a free port, until the block ends."""

    def __init__(self, app: FastAPI, drain_seconds: float = 5.0, port: int = 0) -> None:
        self.app = app
        self.server: DrainingServer = make_server(app, "127.0.0.1", port, log_level="warning", drain_seconds=drain_seconds)
        self._thread = threading.Thread(target=self.server.run, daemon=True)

    @property
    def port(self) -> int:
        return int(self.server.servers[0].sockets[0].getsockname()[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> RunningApp:
        self._thread.start()
        wait_until(lambda: self.server.started or not self._thread.is_alive())
        if not self.server.started:
            raise RuntimeError("The server did not start; see its log.")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.server.should_exit = True
        self._thread.join(10)


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait for something that another thread brings about; AssertionError when it does not come.

    The time is for machines with much else to do: it bounds how long a failure takes, not how fast anything is.
    """
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError("What was waited for did not come about.")
        time.sleep(0.005)


def forget_peak_memory() -> None:
    """Let the peak of this process's memory start again from what it holds now.

    Only Linux can; elsewhere the peak stays, and growth shows beyond it alone.
    """
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """The most memory that this process has held since it began or `forget_peak_memory`, in bytes."""
    if sys.platform == "linux":
        return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
