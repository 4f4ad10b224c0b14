"""Manifests: which rows an epoch reads, from where, and what is refused."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from llava.train.data import ConversationDataset
from llava.train.mixture import Mixture, draw, open_rows
from llava.train.scores import parts_of_rows
from llava.train.shards import ImageFolder, ImageMap, ImageShard

IMAGES = Path(__file__).parents[1] / "oracle" / "images"


def rows(prefix: str, count: int, image: str | None = None) -> list[dict[str, Any]]:
    turns = [{"from": "human", "value": "Hello you"}, {"from": "gpt", "value": "Yes"}]
    extra = {} if image is None else {"image": image}
    return [{"id": f"{prefix}{number}", "conversations": turns, **extra} for number in range(count)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.json").write_text(json.dumps(rows("a", 6, "tiny.png")))
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows("b", 4))))
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as shard:
        shard.write(IMAGES / "tiny.png", "tiny.png")
    return tmp_path


def manifest(folder: Path, sources: Any, **more: Any) -> Path:
    path = folder / "mix.yaml"
    path.write_text(yaml.safe_dump({"sources": sources, **more}))
    return path


def ids(mixture: Mixture) -> list[str]:
    return [row["id"] for row in mixture]


def test_weights_say_how_often_rows_are_read(folder: Path) -> None:
    path = manifest(folder, [{"file": "a.json", "weight": 2.5}, {"file": "b.jsonl", "weight": 0.5, "name": "half"}])
    mixture = open_rows(path)
    counts = Counter(ids(mixture))
    assert len(mixture) == 17 and sorted(counts[f"a{number}"] for number in range(6)) == [2, 2, 2, 3, 3, 3]
    assert sum(counts[f"b{number}"] for number in range(4)) == 2 and max(counts[f"b{number}"] for number in range(4)) == 1
    assert ids(open_rows(path)) == ids(mixture) == ids(pickle.loads(pickle.dumps(mixture)))
    others = {tuple(ids(open_rows(manifest(folder, [{"file": "a.json", "weight": 0.5}], seed=seed)))) for seed in range(8)}
    assert len(others) > 1
    source, number = mixture.locate(16)
    assert source.name == "half" and mixture[16]["id"] == f"b{number}" and mixture[-1] == mixture[16]
    assert ids(mixture.unweighted()) == [f"a{n}" for n in range(6)] + [f"b{n}" for n in range(4)]


def test_the_draw_is_the_same_everywhere() -> None:
    picks = draw(0.5, 10, 0, "coco")
    assert picks is not None and picks.tolist() == [4, 5, 6, 7, 9]
    assert draw(1, 10, 0, "coco") is None
    assert draw(0.5, 10, 0, "gqa").tolist() != picks.tolist()  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="less than one row"):
        draw(0.01, 10, 0, "coco")


def test_columns_come_from_the_indices(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = open_rows(manifest(folder, [{"file": "a.json"}, {"file": "b.jsonl", "weight": 2}, {"file": "a.json", "name": "c"}]))
    dataset = ConversationDataset(mixture, None)  # type: ignore[arg-type]
    monkeypatch.setattr(Mixture, "__getitem__", lambda *_: pytest.fail("a row was read"))
    assert dataset.lengths == [131] * 6 + [3] * 8 + [131] * 6 and dataset.modality_lengths == [3] * 6 + [-3] * 8 + [3] * 6
    parts = parts_of_rows(mixture, 4)
    assert parts == [[6, 7, 8, 9], [10, 11, 12, 13], [0, 1, 2, 3, 4, 5], [14, 15, 16, 17, 18, 19]]


def test_sources_of_images(folder: Path) -> None:
    sources = [
        {"file": "a.json", "images": "s.zip"},
        {"file": "a.json", "images": str(IMAGES), "name": "b"},
        {"file": "a.json", "images": {"tiny": ["s.zip", str(IMAGES)], "": "."}, "name": "c"},
        {"file": "b.jsonl"},
    ]
    opened = [source.images for source in open_rows(manifest(folder, sources)).sources]
    assert [type(source) for source in opened] == [ImageShard, ImageFolder, ImageMap, type(None)]
    with pytest.raises(ValueError, match="there is no folder or shard of images at"):
        open_rows(manifest(folder, [{"file": "a.json", "images": "none.zip"}]))


def test_the_fingerprint_follows_content_and_draw(folder: Path) -> None:
    def fingerprint(sources: Any, **more: Any) -> str:
        return open_rows(manifest(folder, sources, **more)).fingerprint

    plain = open_rows(folder / "a.json").fingerprint
    assert fingerprint([{"file": "a.json", "name": "x"}]) == plain
    (folder / "copy.json").write_bytes((folder / "a.json").read_bytes())
    assert open_rows(folder / "copy.json").fingerprint == plain
    seen = [plain, fingerprint([{"file": "a.json", "images": "s.zip"}]), fingerprint([{"file": "a.json", "weight": 2}])]
    seen += [fingerprint([{"file": "a.json", "weight": 0.5}], seed=seed) for seed in (0, 1)]
    seen += [fingerprint([{"file": "a.json"}, {"file": "b.jsonl"}]), fingerprint([{"file": "b.jsonl"}, {"file": "a.json"}])]
    assert len(set(seen)) == len(seen)


def test_counts_and_checksums_are_checked(folder: Path) -> None:
    found = open_rows(folder / "a.json").sources[0].rows.sha256
    open_rows(manifest(folder, [{"file": "a.json", "count": 6, "sha256": found}]))
    wrong = [{"file": "a.json", "count": 7}, {"file": "b.jsonl", "sha256": "0" * 64}]
    with pytest.raises(ValueError) as error:
        open_rows(manifest(folder, wrong))
    text = str(error.value)
    assert "has count 6, but the manifest expects 7" in text and f"but the manifest expects {'0' * 64}" in text
    assert open_rows(folder / "b.jsonl").sources[0].rows.sha256 in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sources: [", "cannot be read"),
        ("[]", "no list 'sources'"),
        ("sources: []", "no list 'sources'"),
        ("sources: [{file: a.json}]\nfiles: 1", "'files' is unknown"),
        ("sources: [{file: a.json}]\nseed: x", "seed is 'x'"),
        ("sources: [a.json]", "source 0: it is 'a.json', expected a mapping"),
        ("sources: [{file: a.json, wieght: 2}]", "'wieght' is unknown"),
        ("sources: [{file: a.json, weight: 0}]", "weight is 0"),
        ("sources: [{file: a.json, weight: true}]", "weight is True, expected int or float"),
        ("sources: [{file: a.json, sha256: 123}]", "sha256 is 123, expected str; put text in quotes"),
        ("sources: [{file: a.json, images: [1]}]", "images is"),
        ("sources: [{file: a.json, images: []}]", "images is"),
        ("sources: [{file: a.json, images: {1: x}}]", "images is"),
        ("sources: [{file: a.json}, {file: a.json}]", "two sources are called a.json"),
        ("sources: [{file: none.json}]", "there is no file"),
        ("sources: [{file: !!python/object/apply:os.getcwd []}]", "cannot be read"),
    ],
)
def test_wrong_manifests(content: str, message: str, folder: Path) -> None:
    (folder / "mix.yml").write_text(content)
    with pytest.raises(ValueError, match=message):
        open_rows(folder / "mix.yml")


def test_other_endings_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"ends in '.txt', expected .json or .jsonl for rows, or .yaml or .yml for a manifest"):
        open_rows(folder / "rows.txt")
