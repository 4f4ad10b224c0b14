"""The offline pass where things go wrong: full disks, damage, others' files, a second run, Ctrl-C. What it computes: test_train.py."""

from __future__ import annotations

import logging
import re
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import llava.train.scores as scoring
from llava.durable import NoSpaceError, held_alone
from llava.interrupts import INTERRUPTED
from llava.train.data import ConversationDataset
from llava.train.flags import ScoreArguments
from llava.train.rows import BadSampleError
from llava.train.score_granularities import main
from llava.train.scores import GranularityScores, score

ORACLE = Path(__file__).parents[1] / "oracle"


def arguments(folder: Path, **changes: Any) -> ScoreArguments:
    given = {
        "model_name_or_path": str(ORACLE / "checkpoint"), "data_path": str(ORACLE / "train_data.json"),
        "image_folder": str(ORACLE / "images"), "output_file": str(folder / "scores.parquet"),
        "index_cache": str(folder / "index"), "version": "v1", "batch_size": 2, "part_rows": 2, "device": "cpu",
        "num_workers": 0, **changes,
    }  # fmt: skip
    return ScoreArguments(**given)


@pytest.fixture(scope="module", autouse=True)
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Model and rows are loaded once for all tests of this file."""
    found = scoring._prepare(arguments(tmp_path_factory.mktemp("prepared")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "_prepare", lambda args: found)
        yield found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, prepared: Any) -> Path:
    return score(arguments(tmp_path_factory.mktemp("whole")))


def same(one: Path, two: Path) -> bool:
    """Whether two files of scores say the same; rows without labels have nan."""
    tables = [pq.read_table(file) for file in (one, two)]
    return str(tables[0].to_pylist()) == str(tables[1].to_pylist()) and tables[0].schema.equals(tables[1].schema, check_metadata=True)


def test_workers_read_ahead(whole: Path, tmp_path: Path) -> None:
    assert same(score(arguments(tmp_path, num_workers=2)), whole)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_row_is_one_sentence_whoever_reads_it(workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch gives what a worker raises that process's traceback as its text."""

    def broken(self: ConversationDataset, index: int) -> Any:
        try:
            raise FileNotFoundError("no such file")
        except FileNotFoundError as error:
            raise BadSampleError(f"row {index} of rows.json: there is no image a.png.") from error

    monkeypatch.setattr(ConversationDataset, "read", broken)
    with pytest.raises(SystemExit) as caught:
        scoring.run(arguments(tmp_path, num_workers=workers))
    assert re.fullmatch(r"scoring stopped: row \d+ of rows\.json: there is no image a\.png\.", str(caught.value))


def test_rows_about_one_image_are_read_together_and_it_is_opened_once(prepared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, dataset, collator = prepared
    rows = [row for row in dataset.rows if "image" in row]
    names = sorted(row["image"] for row in rows)[:2]
    talk = [row["conversations"] for row in rows]
    listed = [{"conversations": turns, "image": name} for name in names for turns in talk] + [dataset.rows[2]]
    several = ConversationDataset(listed, dataset.reader)
    opened: list[str] = []
    load = type(dataset.reader.images).load
    monkeypatch.setattr(type(dataset.reader.images), "load", lambda self, name: opened.append(name) or load(self, name))
    together = scoring.score_part(model, several, range(len(listed)), 2, collator)
    assert opened == names
    alone = [scoring.score_part(model, several, [number], 2, collator) for number in range(len(listed))]
    assert together["row"].to_pylist() == list(range(len(listed)))
    for number, line in enumerate(alone):
        found, expected = together.slice(number, 1).to_pylist()[0], line.to_pylist()[0]
        assert found.pop("losses") == pytest.approx(expected.pop("losses"), rel=1e-4, nan_ok=True) and found == expected


def test_batches_of_a_part() -> None:
    groups = [-1, -1, 3, 3, 3, 5, 7, 8, 8]
    assert scoring.batches_of_part(range(9), groups, 2) == [[2, 3, 4], [7, 8], [0, 1], [5, 6]]
    assert [len(batch) for batch in scoring.batches_of_part(range(130), [4] * 130, 2)] == [64, 64, 2]


@pytest.mark.parametrize("at", ["a part", "the joined file"])
def test_a_full_disk_keeps_whole_parts(at: str, whole: Path, tmp_path: Path) -> None:
    score(arguments(tmp_path / "measured"))
    part, joined = 3000, (tmp_path / "measured" / "scores.parquet").stat().st_size
    args = arguments(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ({"a part": min(part, joined) // 2, "the joined file": joined - 1}[at], before[1]))
    try:
        with pytest.raises(NoSpaceError, match=rf"no space for .*{'part-00000' if at == 'a part' else 'scores.parquet'}.* \("):
            score(args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    parts = tmp_path / "scores.parquet.parts"
    assert not Path(args.output_file).exists() and not list(parts.glob(".unfinished-*"))
    assert len(list(parts.iterdir())) == (0 if at == "a part" else 4)
    assert same(score(args), whole) and not parts.exists()


def flip(file: Path, place: float = 0.5) -> None:
    data = bytearray(file.read_bytes())
    data[int(len(data) * place)] ^= 0xFF
    file.write_bytes(data)


def test_damaged_scores_are_refused(whole: Path, tmp_path: Path) -> None:
    metadata = {key.decode(): value.decode() for key, value in pq.read_schema(whole).metadata.items() if key != b"ARROW:schema"}
    levels = [int(level) for level in metadata["granularities"].split(",")]
    refused = 0
    for place in (0.05, 0.1, 0.2, 0.3):  # within the pages: of the footer Arrow keeps no checksum
        copy = tmp_path / "copy.parquet"
        copy.write_bytes(whole.read_bytes())
        GranularityScores.load(copy, metadata["model"], metadata["data"], levels)
        flip(copy, place)
        try:
            GranularityScores.load(copy, metadata["model"], metadata["data"], levels)
        except ValueError as error:
            assert "copy.parquet is damaged, or not a file of scores; delete it" in str(error)
            refused += 1
    assert refused >= 3


def test_what_is_in_the_way_is_not_replaced(whole: Path, tmp_path: Path) -> None:
    args = arguments(tmp_path)
    output = Path(args.output_file)
    output.write_text("a text of the user's")
    with pytest.raises(ValueError, match=r"scores.parquet is damaged, or not a file of scores; delete it"):
        score(args)
    table = pq.read_table(whole)
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, b"data": b"other"}), output)
    with pytest.raises(ValueError, match=r"holds scores for another data than this run's; delete it, or choose another --output_file"):
        score(args)
    parts = tmp_path / "scores.parquet.parts"
    parts.mkdir()
    output.rename(parts / "part-00001-of-00004.parquet")
    with pytest.raises(ValueError, match=r"part-00001-of-00004.parquet holds scores for another data"):
        score(args)
    (parts / "part-00001-of-00004.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"part-00001-of-00004.parquet is damaged"):
        score(args)
    (parts / "part-00001-of-00004.parquet").unlink()
    assert same(score(args), whole)


def test_a_second_pass_at_the_same_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(tmp_path)
    with held_alone(tmp_path / ".scores.parquet.rank-0.lock", "it"):
        with pytest.raises(ValueError, match=r"another process is at work on the scores .*scores.parquet; wait"):
            score(args)
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        score(args)  # another process of the same pass
    assert len(list((tmp_path / "scores.parquet.parts").iterdir())) == 2


@pytest.mark.parametrize(("rank", "world_size", "own"), [(0, 3, [0, 3]), (1, 3, [1]), (2, 3, [2]), (1, 2, [1, 3])])
def test_a_process_scores_its_own_parts_alone(
    rank: int, world_size: int, own: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepared: Any
) -> None:
    args = arguments(tmp_path)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    score(args)
    files = sorted((tmp_path / "scores.parquet.parts").iterdir())
    assert [file.name for file in files] == [f"part-{number:05d}-of-00004.parquet" for number in own]
    parts = scoring.parts_of_rows(prepared[1].rows, args.part_rows)
    assert [pq.read_table(file)["row"].to_pylist() for file in files] == [parts[number] for number in own]


def test_ctrl_c_says_which_parts_are_kept(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = arguments(tmp_path)
    original: Callable[..., Any] = scoring.score_part
    done: list[int] = []

    def pressed(*rest: Any) -> Any:
        done.append(1)
        if len(done) == 3:
            signal.raise_signal(signal.SIGINT)
        return original(*rest)

    flags = [part for name, value in vars(args).items() if value is not None for part in (f"--{name}", str(value))]
    monkeypatch.setattr(scoring, "score_part", pressed)
    monkeypatch.setattr(sys, "argv", ["score_granularities", *flags])
    monkeypatch.setattr(logging.getLogger("llava"), "propagate", True)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        status = main()
    finally:
        signal.signal(signal.SIGINT, handler)
    lines = capsys.readouterr().err
    assert status == INTERRUPTED and "Traceback" not in lines
    assert f"interrupted: 2 finished parts are kept in {tmp_path / 'scores.parquet.parts'}; the same command resumes from there.\n" in lines
    monkeypatch.setattr(scoring, "score_part", original)
    assert same(score(args), whole)
