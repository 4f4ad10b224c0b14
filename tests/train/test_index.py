"""The index: the rows as they stand in the file, built once whoever comes, refused when the file is none of rows."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pickle
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import pyarrow as pa
import pytest

import llava.json_rows as json_rows
import llava.train.index as index_module
from llava.durable import NoSpaceError
from llava.train.derived_files import HIDDEN_FOLDER, derived_file
from llava.train.index import build_index, open_index
from llava.train.mixture import open_rows

ROOT = Path(__file__).parents[2]
TURNS = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A bus."}]
ROWS: list[dict[str, Any]] = [
    {"id": "a", "image": "b.png", "conversations": TURNS, "family": {"of": ["any", 1.5, None]}},
    {"id": 2, "image": ["b.png", "a.png"], "conversations": TURNS * 2},
    {"conversations": TURNS[1:], "note": 'quotes " and \\ and ]},\n and \N{SNOWMAN} \ud800'},
    {"id": "d", "image": ["b.png"], "conversations": TURNS},
]


def written(path: Path, rows: list[Any], **options: Any) -> Path:
    """Rows as JSON or JSONL, by the file's ending."""
    lines = path.suffix == ".jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n" if lines else json.dumps(rows, **options))
    return path


@pytest.mark.parametrize(
    ("name", "options"), [("a.jsonl", {}), ("a.json", {}), ("b.json", {"indent": 2}), ("c.json", {"separators": (",", ":")})]
)
def test_rows_are_what_json_reads(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    source = written(tmp_path / name, ROWS, **options)
    index = open_index(source)
    assert list(index) == ROWS and index[1:3] == ROWS[1:3] and index[-1] == ROWS[-1] and len(index) == 4
    assert index.words.tolist() == [6, 12, 2, 6] and index.has_image.tolist() == [True, True, False, True]
    assert index.image_groups[0] == index.image_groups[3] != index.image_groups[1] and index.image_groups[2] == -1
    assert index.sha256 == hashlib.sha256(source.read_bytes()).hexdigest()
    assert list(pickle.loads(pickle.dumps(index))) == ROWS
    with pytest.raises(IndexError):
        index[4]


def test_a_window_that_moves_cuts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a few bytes cut every value, number and character somewhere; batches of a few rows end somewhere."""
    monkeypatch.setattr(index_module, "_BATCH_ROWS", 2)
    rows = [{"id": number, "conversations": [{"value": "ä" * number}]} for number in range(30)]
    source = tmp_path / "a.json"
    source.write_text(json.dumps(rows, ensure_ascii=False, indent=1))
    for size in (1, 2, 3, 7):
        monkeypatch.setattr(json_rows, "CHUNK_BYTES", size)
        assert list(open_index(source, tmp_path / str(size))) == rows


def test_the_index_is_an_ordinary_arrow_stream(tmp_path: Path) -> None:
    index = open_index(written(tmp_path / "a.jsonl", ROWS[:2]))
    table = pa.ipc.open_stream(index.path).read_all()
    assert [json.loads(text) for text in table["row"].to_pylist()] == ROWS[:2] and table["words"].to_pylist() == [6, 12]


def test_the_name_decides_nothing(tmp_path: Path) -> None:
    """A list called JSONL, rows per line called JSON, rows side by side, over several lines, and files put behind each other."""
    texts = [json.dumps(row) for row in ROWS]
    written_as = {
        "LIST.JSONL": json.dumps(ROWS), "lines.json": "\n".join(texts), "SIDE.JSON": "".join(texts),
        "spread.jsonl": "\r\n".join(json.dumps(row, indent=1) for row in ROWS),
        "lists.json": json.dumps(ROWS[:3]) + "\ufeff" + json.dumps(ROWS[3:]),
    }  # fmt: skip
    for name, text in written_as.items():
        (tmp_path / name).write_text("\ufeff" + text, encoding="utf-8", newline="")
        assert list(open_rows(tmp_path / name)) == ROWS, name


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", r"starts with '\{' \(line 1: the value ends before it is complete"),
        ("a.json", "", "holds no rows"),
        ("a.json", "[]", "holds no rows"),
        ("a.jsonl", "\n\n", "holds no rows"),
        ("a.json", "[1, 2]", "starts with '1', expected rows"),
        ("a.jsonl", "rows", r"starts with 'rows' \(line 1: not valid JSON .*, expected rows such as .* one per line"),
        ("a.json", '[{"id": 1}, {"id": }]', "after 1 rows"),
        ("a.json", '[{"id": 1} {"id": 2}]', r"line 1, after 1 rows: the row is followed by '\{'"),
        ("a.json", '[{"id": 1}', "after 1 rows: the list ends before it is complete"),
        ("a.json", '[{"id": 1}] x', "followed by 'x'"),
        ("a.json", '[{"id": 1},]', "after 1 rows"),
        ("a.json", "[" * 100_000, "after 0 rows"),
    ],
)
def test_what_is_no_file_of_rows(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        open_index(tmp_path / name)
    assert not list((tmp_path / HIDDEN_FOLDER).glob("*.arrow"))
    with pytest.raises(ValueError, match="there is no file"):
        open_index(tmp_path / "none.json")


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    for name in ("a.json", "a.jsonl"):
        (tmp_path / name).write_bytes(b'[{"id": "\xff"}]' if name == "a.json" else b'{"id": 1}\n{"id": "\xff"}\n')
        with pytest.raises(ValueError, match=r"line [12] of .*a\.jsonl? is not UTF-8 .*save it as UTF-8"):
            open_index(tmp_path / name)


def test_a_broken_line_waits_until_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\ufeff{"conversations": []}\n\n{"id": \n[1]\n{"conversations": [3], "image": 5}\n', encoding="utf-8")
    index = open_index(tmp_path / "a.jsonl")
    assert len(index) == 4 and index.words.tolist() == [0, 0, 0, 0] and index.has_image.tolist() == [False, False, False, True]
    with pytest.raises(ValueError, match="line 3 cannot be read: the value ends before it is complete"):
        index[1]
    assert index[2] == [1]


def test_a_row_without_end_is_refused_before_memory_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "MAX_ROW_CHARACTERS", 1000)
    monkeypatch.setattr(json_rows, "CHUNK_BYTES", 100)
    for name in ("a.json", "a.jsonl"):
        (tmp_path / name).write_text(('["' if name == "a.json" else '{"id": "') + "x" * 5000)
        with pytest.raises(ValueError, match="line 1 of .* starts a value of over 1,000 characters"):
            open_index(tmp_path / name)


def test_a_changed_file_has_another_index(tmp_path: Path) -> None:
    source = written(tmp_path / "a.jsonl", ROWS[:1])
    first = open_index(source)
    assert open_index(source).path == first.path and first.path.parent == tmp_path / HIDDEN_FOLDER
    written(source, ROWS[:2])
    assert len(open_index(source)) == 2 and len(first) == 1


def test_where_the_index_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    source = written(tmp_path / "a.jsonl", ROWS)
    assert open_index(source, tmp_path / "named").path.parent == tmp_path / "named"
    assert not (tmp_path / "named" / ".gitignore").exists()
    (tmp_path / HIDDEN_FOLDER).write_text("in the way")
    assert open_index(source).path.parent == tmp_path / "home" / "avg-llava" / "index"
    with pytest.raises(ValueError, match="name another folder with --index_cache"):
        open_index(source, tmp_path / HIDDEN_FOLDER)


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    source = written(tmp_path / "a.jsonl", ROWS)

    def build(source: Path, target: Path) -> None:
        target.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        derived_file(source, "rows", None, build)
    assert {path.suffix for path in (tmp_path / HIDDEN_FOLDER).iterdir()} <= {".lock", ""}

    def grow(source: Path, target: Path) -> None:
        build_index(source, target)
        source.write_text(source.read_text() * 2)

    with pytest.raises(ValueError, match="changed while it was being indexed"):
        derived_file(source, "rows", None, grow)
    path = open_index(source).path
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="broken|incomplete"):
        open_index(source)


def test_a_full_disk_is_a_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    source = written(tmp_path / "a.jsonl", ROWS * 100)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(NoSpaceError, match=r"no space for .*a\.jsonl\..*\.rows\.arrow \("):
            open_index(source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / HIDDEN_FOLDER).glob("*.arrow")) and not list((tmp_path / HIDDEN_FOLDER).glob(".unfinished*"))
    assert list(open_index(source)) == ROWS * 100


def _opened(source: Path, log: Path) -> None:
    def build(source: Path, target: Path) -> None:
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.3)
        build_index(source, target)

    path = derived_file(source, "rows", None, build)
    assert len(index_module.RowIndex(path, source)) == len(ROWS)


def test_of_several_processes_one_builds(tmp_path: Path) -> None:
    source = written(tmp_path / "a.jsonl", ROWS)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_opened, args=(source, tmp_path / "log")) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len((tmp_path / "log").read_text().split()) == 1


def test_waiting_ends_with_a_sentence(tmp_path: Path) -> None:
    source = written(tmp_path / "a.jsonl", ROWS)
    path = open_index(source).path
    path.unlink()
    with filelock.FileLock(f"{path}.lock"), pytest.raises(TimeoutError, match="another process has been indexing .* for 0 s"):
        open_index(source, wait_seconds=0.2)


MEASURE = """
import json, random, sys, time
import psutil
from llava.train.data import ConversationDataset
from llava.train.mixture import open_rows
process = psutil.Process()
open_rows(sys.argv[1])[0]  # what the libraries themselves take when first used is no cost of the index
before = process.memory_info().rss
start = time.perf_counter()
rows = open_rows(sys.argv[2])
seconds = time.perf_counter() - start
opened = process.memory_info().rss - before
lengths = ConversationDataset(rows, None).modality_lengths
drawn = random.Random(0)
peak = 0
for number in range(5000):
    rows[drawn.randrange(len(rows))]
    peak = max(peak, process.memory_info().rss - before)
print(json.dumps({"rows": len(lengths), "seconds": seconds, "opened_mb": opened / 2**20, "used_mb": peak / 2**20}))
"""


def measured(source: Path, tmp_path: Path) -> dict[str, float]:
    """Seconds and memory of opening and using an index, in a process of its own."""
    small = written(tmp_path / "small.jsonl", ROWS)
    open_index(small)
    command = [sys.executable, "-c", MEASURE, str(small), str(source)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def synthetic(tmp_path: Path) -> Callable[[int], Path]:
    """A file of many rows of about 0.7 kB, a tenth of them without an image."""

    def make(count: int) -> Path:
        source = tmp_path / "synthetic.json"
        text = "what colour is the house behind the tree on the left " * 2
        turns = [{"from": speaker, "value": text} for speaker in ("human", "gpt") * 2]
        texts = [json.dumps({"conversations": turns})[1:], json.dumps({"image": "coco/0.jpg", "conversations": turns})[1:]]
        with source.open("w") as file:
            for number in range(count):
                file.write(("[" if number == 0 else ",\n") + f'{{"id": "row-{number:07d}", ' + texts[number % 10 > 0])
            file.write("]")
        return source

    return make


def test_opening_costs_little(synthetic: Callable[[int], Path], tmp_path: Path) -> None:
    source = synthetic(20_000)
    open_index(source)
    found = measured(source, tmp_path)
    assert found["rows"] == 20_000 and found["seconds"] < 2 and found["used_mb"] < 100


@pytest.mark.slow
def test_a_million_rows(synthetic: Callable[[int], Path], tmp_path: Path) -> None:
    """Opens in under 2 s and costs a process under 200 MB, also while rows are read in random order."""
    source = synthetic(1_000_000)
    start = time.perf_counter()
    open_index(source)
    found = measured(source, tmp_path) | {"build_seconds": time.perf_counter() - start}
    print(found)
    assert found["rows"] == 1_000_000 and found["seconds"] < 2 and found["opened_mb"] < 200 and found["used_mb"] < 200
