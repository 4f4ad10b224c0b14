"""The benchmark of start-up, on a checkout of a few lines: it times to the first answer, and counts the files that a request enters."""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")

SERVICE = """
import argparse, http.server
from llava import entered, imported
imported.work()

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/ask":
            entered.work()
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args):
        pass

parser = argparse.ArgumentParser()
parser.add_argument("--host")
parser.add_argument("--port", type=int)
args = parser.parse_args()
http.server.ThreadingHTTPServer((args.host, args.port), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def startup() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "benchmark" / "startup.py"
    spec = importlib.util.spec_from_file_location("startup", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["startup"] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A package of a service and two modules, one of which only starting runs."""
    package = tmp_path / "checkout" / "llava"
    package.mkdir(parents=True)
    for name, text in {"__init__": "", "entered": "def work(): pass", "imported": "def work(): pass", "service": SERVICE}.items():
        (package / f"{name}.py").write_text(text)
    return package.parent


def test_a_service_is_timed_to_its_first_answer_and_ended(startup: ModuleType, checkout: Path, tmp_path: Path) -> None:
    began = time.perf_counter()
    taken = startup.run_until_ready(checkout, "llava.service", (), "/", tmp_path / "log")
    assert 0 < taken.seconds < time.perf_counter() - began
    assert 2**22 < taken.peak_bytes < 2**30


def test_a_program_that_fails_is_no_figure(startup: ModuleType, checkout: Path, tmp_path: Path) -> None:
    good = startup.run_to_end(checkout, ["-c", "import time; held = b'x' * 300_000_000; time.sleep(0.2)"], tmp_path / "log")
    assert good.peak_bytes > 250_000_000
    with pytest.raises(SystemExit, match="no such program"):
        startup.run_to_end(checkout, ["-c", "raise SystemExit('no such program')"], tmp_path / "log")


def test_files_count_that_a_request_enters_in_whichever_thread(startup: ModuleType, checkout: Path, tmp_path: Path) -> None:
    with startup.traced(checkout, "llava.service", (), "/", tmp_path) as (process, port, result):
        seen = []
        for path in ("/ask", "/"):
            startup.turn(process, result, "recording")
            startup.request(port, "GET", path)
            seen.append({Path(line).name for line in startup.turn(process, result, "entered")})
    assert seen == [{"service.py", "entered.py"}, {"service.py"}]


def test_the_table_has_the_medians_of_each_checkout(startup: ModuleType) -> None:
    starts = [startup.Start(seconds, mebibytes * 2**20) for seconds, mebibytes in ((1.0, 30), (9.0, 10), (2.0, 20))]
    assert startup.table({"row": {"before": starts, "after": starts[:1]}}).splitlines() == [
        "| | before, s | after, s | before, MiB | after, MiB |",
        "| --- | --- | --- | --- | --- |",
        "| row | 2.00 | 1.00 | 20 | 30 |",
    ]
