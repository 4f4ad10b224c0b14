"""The data writer: LLaVA rows, unique ids, small pictures; the committed evaluation split."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from playground import make_data, world

EVAL = Path(world.__file__).parent / "eval"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_data.write_training_data(argparse.Namespace(
        output=folder, miniatures=8, pairs=4, scenes=6, stage4=2, validation=2, test=2, seed=0))
    return folder


def read_json(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_llava_conversations_with_one_picture(written: Path) -> None:
    for name in ("stage1", "instruct", "stage4"):
        for row in read_json(written / f"{name}.json"):
            turns = row["conversations"]
            assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
            assert "".join(turn["value"] for turn in turns).count("<image>") == 1
            assert turns[0]["value"].startswith("<image>")
            assert (written / row["image"]).is_file()


def test_ids_are_unique_across_files(written: Path) -> None:
    ids = [row["id"] for name in ("stage1", "instruct", "stage4")
           for row in read_json(written / f"{name}.json")]
    questions = [row["question_id"] for name in ("validation", "test") for row in read_lines(written / f"{name}.jsonl")]
    assert len(set(ids)) == len(ids) and len(set(questions)) == len(questions)


def test_stage4_rows_ask_one_question_of_a_named_family(written: Path) -> None:
    rows = read_json(written / "stage4.json")
    assert len(rows) == 2 * len(world.FAMILIES)
    assert all(len(row["conversations"]) == 2 and row["family"] in world.FAMILIES for row in rows)


def test_both_stages_learn_from_the_same_pictures_of_every_layout(written: Path) -> None:
    captions, conversations = read_json(written / "stage1.json"), read_json(written / "instruct.json")
    assert {row["image"] for row in captions} == {row["image"] for row in conversations} and len(captions) == 18
    sizes = {"miniatures": {(64, 64)}, "pairs": {(64, 128), (128, 64)}, "scenes": {(128, 128)}, "stage4": {(128, 128)}}
    for row in captions + read_json(written / "stage4.json"):
        assert Image.open(written / row["image"]).size in sizes[row["image"].split("/")[1]]


def test_committed_split_is_what_the_generator_gives_and_small(written: Path) -> None:
    committed = read_lines(EVAL / "test.jsonl")
    assert len({row["image"] for row in committed}) == 400
    assert {row["family"] for row in committed} == set(world.FAMILIES)
    fresh = read_lines(written / "test.jsonl")
    for old, new in zip(committed, fresh, strict=False):
        assert {key: old[key] for key in old if key != "image"} == {key: new[key] for key in new if key != "image"}
        assert (np.asarray(Image.open(EVAL / old["image"])) == np.asarray(Image.open(written / new["image"]))).all()
    assert sum(path.stat().st_size for path in EVAL.rglob("*") if path.is_file()) < 3_000_000
