"""Rows: as recorded, padded by length, refused or skipped when broken, never cut."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from llava.constants import IGNORE_INDEX
from llava.crops import pixel_table, pixel_values
from llava.train.data import Collator, ConversationDataset, check_rows
from llava.train.mixture import open_rows
from llava.train.rows import BadSampleError, RowReader
from llava.train.shards import ImageFolder

ORACLE = Path(__file__).parents[1] / "oracle"


@pytest.fixture
def dataset(reader: RowReader, tmp_path: Path) -> ConversationDataset:
    return ConversationDataset(open_rows(ORACLE / "train_data.json", tmp_path), reader)


def test_recorded_rows_and_batches(
    dataset: ConversationDataset, training_records: Any, recorded_batch: Callable[[str], Any]
) -> None:
    record, table = training_records["data"], pixel_table(dataset.reader.image_processor)
    assert dataset.lengths == record["lengths"] and dataset.modality_lengths == record["modality_lengths"]
    for index, pixels in record["item_pixels"].items():
        item = dataset[int(index)]
        if item["images"]:
            assert list(item["images"][0].shape) == pixels["shape"] and list(item["image_sizes"][0]) == pixels["image_size"]
            assert item["images"][0].dtype == torch.uint8
            assert float(pixel_values(item["images"][0], table).double().sum()) == pytest.approx(pixels["sum"], abs=0.05)
    tensors = load_file(ORACLE / "training_batches.safetensors")
    for name in ("A_two_images", "B_padded_three", "C_mixed_text", "D_text_only"):
        batch = Collator(0)([dataset[index] for index in record["batches"][name]["samples"]])
        for field in ("input_ids", "labels"):
            assert torch.equal(batch[field], tensors[f"{name}/{field}"].long()), field
        assert torch.equal(batch["attention_mask"], tensors[f"{name}/attention_mask"].bool())
        recorded = recorded_batch(name)
        assert batch["image_sizes"] == recorded["image_sizes"] and batch["images_per_row"] == recorded["images_per_row"]


def test_a_literal_unk_is_text(reader: RowReader) -> None:
    rows = [
        {"conversations": [{"from": "human", "value": "Say <unk> now"}, {"from": "gpt", "value": "<unk>"}]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}], "family": "x", "id": 3},
    ]
    dataset = ConversationDataset(rows, reader)
    items = [dataset[0], dataset[1]]
    batch = Collator(0)(items)
    assert batch["attention_mask"].sum(1).tolist() == [len(item["input_ids"]) for item in items]
    assert 0 not in items[0]["input_ids"] and batch["ids"] == ["0", "3"] and batch["images"] == []
    supervised = items[0]["labels"][items[0]["labels"] != IGNORE_INDEX]
    assert reader.tokenizer.decode(supervised).strip() == "<unk></s>"


def test_several_images_and_eager_preparation(reader: RowReader) -> None:
    row = {
        "image": ["wide.png", "tiny.png"],
        "conversations": [{"from": "human", "value": "<image> or <image>?"}, {"from": "gpt", "value": "Left."}],
    }
    item = ConversationDataset([row], reader, lazy=False)[0]
    assert [len(views) for views in item["images"]] == [4, 3] and item["image_sizes"] == [(130, 45), (20, 17)]
    with pytest.raises(BadSampleError, match="row 0"):
        ConversationDataset([{"conversations": [{"from": "x", "value": "y"}]}], reader, lazy=False)


def test_too_long_is_refused_with_its_numbers(reader: RowReader, dataset: ConversationDataset) -> None:
    item = dataset[3]
    text = len(item["input_ids"]) - 1
    visual = reader.visual_tokens((64, 64))
    exact = ConversationDataset(dataset.rows, replace(reader, max_length=text + visual))
    assert len(exact[3]["input_ids"]) == text + 1
    short = ConversationDataset(dataset.rows, replace(reader, max_length=text + visual - 1))
    message = rf"row 3 of .*train_data.json \(id s3\).*{text + visual} tokens long \({text} of text, {visual} visual\)"
    with pytest.raises(BadSampleError, match=message):
        short[3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": "none.png"}, "none.png"),
        ({"image": "broken.png"}, "not a readable image"),
        ({"image": None}, "0 images, but its turns have 1"),
        ({"image": 5}, "image is 5, expected a file name"),
        ({"image": ["broken.png", None]}, "image is None"),
        ({"image": ""}, "image is ''"),
        ({"image": {"a": 1}}, "image is {'a': 1}"),
        ({"conversations": [{"from": "gpt", "value": "Hi"}]}, "turns have 0"),
        ({"conversations": ["Hi"]}, "turn 0 is 'Hi'"),
        ({"conversations": [{"from": "human"}]}, "turn 0 is"),
        ({"conversations": [{"from": "human", "value": 3}]}, "turn 0 is"),
        ({"conversations": [{"from": ["human"], "value": "<image>"}]}, "a turn is"),
        ({"conversations": [{"from": "human", "value": "\ud800"}]}, "turn 0 contains a lone surrogate"),
        ({"conversations": {}}, "no list 'conversations'"),
        ({"conversations": None}, "no list 'conversations'"),
        ({"conversations": []}, "turns have 0"),
    ],
)
@pytest.mark.parametrize("lazy", [True, False])
def test_broken_rows(change: dict[str, Any], message: str, lazy: bool, reader: RowReader, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"not an image")
    good = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}], "id": "good"}
    turns = [{"from": "human", "value": "<image>\nHi"}, {"from": "gpt", "value": "Yo"}]
    rows = [good, {"id": "bad", "image": "broken.png", "conversations": turns, **change}, good]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    mixture = open_rows(tmp_path / "rows.json")
    reader = replace(reader, images=ImageFolder(tmp_path))
    with pytest.raises(BadSampleError, match=rf"row 1 of .*rows.json \(id bad\).*{message}"):
        ConversationDataset(mixture, reader, lazy=lazy)[1]
    skipping = ConversationDataset(mixture, reader, on_bad_sample="skip", max_bad_share=0.5, lazy=lazy)
    assert skipping[0]["row"] == 0 and skipping[1]["row"] == 2 == skipping[2]["row"] and skipping.bad_rows == {1}
    with pytest.raises(ValueError, match="1 of 3 rows are broken.*The last one: row 1 of"):
        ConversationDataset(mixture, reader, on_bad_sample="skip", max_bad_share=0.1, lazy=lazy)[1]


def test_rows_that_are_no_rows(reader: RowReader, tmp_path: Path) -> None:
    good = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(good) + '\n[3]\n{"id": 1,\n')
    for lazy in (True, False):
        skipping = ConversationDataset(open_rows(tmp_path / "rows.jsonl"), reader, on_bad_sample="skip", max_bad_share=1, lazy=lazy)
        assert [skipping[index]["row"] for index in range(3)] == [0, 0, 0] and skipping.bad_rows == {1, 2}
        with pytest.raises(BadSampleError, match=r"row 2 of .* \(id 2\): line 3 cannot be read: the value ends before"):
            skipping.read(2)


def test_workers_count_skips_together(reader: RowReader, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]}
    rows = [good if index % 3 else {"conversations": [index]} for index in range(12)]
    dataset = ConversationDataset(rows, reader, on_bad_sample="skip", max_bad_share=0.5)
    loader: Any = DataLoader(dataset, batch_size=2, num_workers=2, collate_fn=Collator(0))
    assert [row for batch in loader for row in batch["rows"]] == [1, 1, 2, 4, 4, 5, 7, 7, 8, 10, 10, 11]
    assert dataset.bad_rows == {0, 3, 6, 9}
    strict = ConversationDataset(rows, reader, on_bad_sample="skip", max_bad_share=0.25)
    with pytest.raises(ValueError, match="4 of 12 rows are broken"):
        list(DataLoader(strict, batch_size=2, num_workers=2, collate_fn=Collator(0)))
    dataset = ConversationDataset(rows, reader, on_bad_sample="skip", max_bad_share=0.5)
    with caplog.at_level("WARNING", logger="llava.train.data"):
        for _ in range(2):
            [dataset[index] for index in range(12)]
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == [f"skipped row {index}" for index in (0, 3, 6, 9)]


def test_a_mixture_with_a_shard_reads_like_files(reader: RowReader, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "s.zip", "w", zipfile.ZIP_DEFLATED) as shard:
        for image in (ORACLE / "images").iterdir():
            shard.write(image, image.name)
    (tmp_path / "mix.yaml").write_text(f"sources: [{{file: '{ORACLE / 'train_data.json'}', images: s.zip}}]")
    plain = ConversationDataset(open_rows(ORACLE / "train_data.json", tmp_path), reader)
    mixed = ConversationDataset(open_rows(tmp_path / "mix.yaml", tmp_path), replace(reader, images=ImageFolder(Path("/nowhere"))))
    loader: Any = DataLoader(mixed, batch_size=1, num_workers=2, collate_fn=list)
    for one, (other,) in zip((plain[index] for index in range(len(plain))), loader, strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"]) and one["image_sizes"] == other["image_sizes"]
        assert all(torch.equal(left, right) for left, right in zip(one["images"], other["images"], strict=True))
        assert all(key.startswith(str(tmp_path / "s.zip")) for key in other["image_keys"])


def rows_of(*rows: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with an answer each, and whatever else they have."""
    return [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": answer}], **more} for answer, more in rows]


def as_dataset(rows: list[dict[str, Any]], form: str, reader: RowReader, folder: Path, **more: Any) -> ConversationDataset:
    if form == "a list":
        return ConversationDataset(rows, reader, **more)
    (folder / "rows.json").write_text(json.dumps(rows))
    return ConversationDataset(open_rows(folder / "rows.json"), reader, **more)


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was warned of; that a file was indexed is told too where something has set the level of logging."""
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("form", ["a list", "a file"])
def test_rows_without_an_answer_are_counted_before_training(
    form: str, reader: RowReader, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    check_rows(as_dataset(rows_of(("a", {}), ("b", {})), form, reader, tmp_path), "rows")
    assert not warnings_in(caplog)
    check_rows(as_dataset(rows_of(("a", {}), ("", {"id": "x"}), ("c", {}), ("", {})), form, reader, tmp_path), "rows")
    assert [text.split(";")[0] for text in warnings_in(caplog)] == ["2 of 4 rows have no answer and add nothing to the loss"]
    assert "(id x)" in caplog.text
    with pytest.raises(ValueError, match=r"3 of 4 rows have no answer, so there is nothing to train on.*; the first is row 1 .*\(id x\)"):
        check_rows(as_dataset(rows_of(("a", {}), ("", {"id": "x"}), ("", {}), ("", {})), form, reader, tmp_path), "rows")
    turns = [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Yo"}]
    with pytest.raises(ValueError, match=r"row 0.*expected \{'from': 'human' or 'gpt'"):
        check_rows(as_dataset([{"conversations": turns}], form, reader, tmp_path), "rows")


def test_a_router_learns_from_images_alone(reader: RowReader, tmp_path: Path) -> None:
    with_image = {"image": "tiny.png"}
    check_rows(as_dataset(rows_of(("a", {}), ("", with_image), ("b", with_image)), "a file", reader, tmp_path), "rows", needs_images=True)
    with pytest.raises(ValueError, match="none of the 2 rows has both an image and an answer, so there is nothing to train the router on"):
        check_rows(as_dataset(rows_of(("a", {}), ("", with_image)), "a list", reader, tmp_path), "rows", needs_images=True)


@pytest.mark.parametrize("form", ["a list", "a file"])
def test_keys_that_are_not_read_are_named_with_counts(
    form: str, reader: RowReader, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = rows_of(("a", {}), ("b", {"video": "b.mp4", "id": "b"}), ("c", {"images": ["c"], "id": "c"}), ("d", {"video": "d.mp4"}))
    with pytest.raises(ValueError, match=r"1 of 4 rows have the key 'images', which is not read: name images under 'image'.*\(id c\)"):
        check_rows(as_dataset(rows, form, reader, tmp_path), "rows")
    skipping = as_dataset(rows, form, reader, tmp_path, on_bad_sample="skip", max_bad_share=1)
    check_rows(skipping, "rows")
    assert "2 of 4 rows have the key 'video'" in caplog.text and "(id b)" in caplog.text and len(warnings_in(caplog)) == 2
    assert [skipping[index]["row"] for index in range(4)] == [0, 0, 0, 0] and skipping.bad_rows == {1, 2, 3}
    with pytest.raises(BadSampleError, match=r"\(id b\): the row's key 'video' is not read, so the model .* without it: only images"):
        skipping.read(1)


def test_a_placeholder_in_an_answer_is_refused(reader: RowReader) -> None:
    rows = rows_of(("<image>\nA bus", {"image": "tiny.png"}))
    with pytest.raises(BadSampleError, match=r"turn 1 is an answer \(gpt\) with <image> in it; images belong in questions"):
        ConversationDataset(rows, reader)[0]
