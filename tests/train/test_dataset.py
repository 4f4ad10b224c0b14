"""Rows: as recorded, padded by length, refused or skipped when broken, never cut."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llava.conversation import conv_templates
from llava.train.dataset import BadSampleError, Collator, ConversationDataset, RowReader, read_rows
from llava.train.train import visual_token_counter

ORACLE = Path(__file__).parents[1] / "oracle"


@pytest.fixture
def reader(tiny_model: Any, tokenizer: Any) -> RowReader:
    return RowReader(
        tokenizer=tokenizer,
        template=conv_templates["v1"],
        image_processor=tiny_model.get_vision_tower().image_processor,
        model_config=tiny_model.config,
        image_folder=ORACLE / "images",
        max_length=2048,
        visual_tokens=visual_token_counter(tiny_model),
    )


@pytest.fixture
def dataset(reader: RowReader) -> ConversationDataset:
    return ConversationDataset(read_rows(ORACLE / "train_data.json"), reader)


def test_recorded_rows_and_batches(
    dataset: ConversationDataset, training_records: Any, recorded_batch: Callable[[str], Any]
) -> None:
    record = training_records["data"]
    assert dataset.lengths == record["lengths"] and dataset.modality_lengths == record["modality_lengths"]
    for index, pixels in record["item_pixels"].items():
        item = dataset[int(index)]
        if item["images"]:
            assert list(item["images"][0].shape) == pixels["shape"] and list(item["image_sizes"][0]) == pixels["image_size"]
            assert float(item["images"][0].double().sum()) == pytest.approx(pixels["sum"], abs=0.05)
    tensors = load_file(ORACLE / "training_batches.safetensors")
    for name in ("A_two_images", "B_padded_three", "C_mixed_text", "D_text_only"):
        batch = Collator(0)([dataset[index] for index in record["batches"][name]["samples"]])
        for field in ("input_ids", "labels"):
            assert torch.equal(batch[field], tensors[f"{name}/{field}"].long()), field
        assert torch.equal(batch["attention_mask"], tensors[f"{name}/attention_mask"].bool())
        recorded = recorded_batch(name)
        assert batch["image_sizes"] == recorded["image_sizes"] and batch["images_per_row"] == recorded["images_per_row"]


def test_a_literal_unk_stays_visible(reader: RowReader) -> None:
    rows = [
        {"conversations": [{"from": "human", "value": "Say <unk> now"}, {"from": "gpt", "value": "<unk>"}]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}], "family": "x", "id": 3},
    ]
    dataset = ConversationDataset(rows, reader)
    items = [dataset[0], dataset[1]]
    batch = Collator(0)(items)
    assert batch["attention_mask"].sum(1).tolist() == [len(item["input_ids"]) for item in items]
    assert (items[0]["labels"] == 0).any() and batch["ids"] == ["0", "3"] and batch["images"] == []


def test_several_pictures_and_eager_preparation(reader: RowReader) -> None:
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
    with pytest.raises(BadSampleError, match=rf"row 3 \(id s3\).*{text + visual} tokens long \({text} of text, {visual} visual\)"):
        short[3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": "none.png"}, "none.png"),
        ({"image": "broken.png"}, "not a readable image"),
        ({"image": None}, "0 pictures but its turns hold 1"),
        ({"conversations": [{"from": "gpt", "value": "Hi"}]}, "turns hold 0"),
    ],
)
def test_broken_rows(change: dict[str, Any], message: str, reader: RowReader, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    good = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}], "id": "good"}
    turns = [{"from": "human", "value": "<image>\nHi"}, {"from": "gpt", "value": "Yo"}]
    rows = [{"id": "bad", "image": "broken.png", "conversations": turns, **change}, good]
    reader = replace(reader, image_folder=tmp_path)
    with pytest.raises(BadSampleError, match=rf"row 0 \(id bad\).*{message}"):
        ConversationDataset(rows, reader)[0]
    skipping = ConversationDataset(rows, reader, on_bad_sample="skip", max_bad_share=0.5)
    assert skipping[0]["id"] == "good" == skipping[1]["id"] and skipping.bad_rows == {0}
    with pytest.raises(ValueError, match="1 of 2 rows are broken"):
        ConversationDataset(rows, reader, on_bad_sample="skip", max_bad_share=0.1)[0]


def test_files(tmp_path: Path) -> None:
    rows = [{"conversations": []}, {"conversations": []}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    assert read_rows(tmp_path / "a.jsonl") == rows
    for name, text, message in (
        ("b.json", "{", "not valid JSON"),
        ("c.json", "[]", "without rows"),
        ("d.json", '[{"image": "x"}]', "row 0 .* no list 'conversations'"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            read_rows(tmp_path / name)
