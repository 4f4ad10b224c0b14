"""A row of training data: what is known of it before its images are opened, and what an image costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava.train.build import model_outline
from llava.train.estimation import preset_config
from llava.train.rows import UNREAD_KEYS, measure, num_views, unread_key, visual_token_costs

RECORDED = Path(__file__).parents[1] / "oracle" / "token_counts_real.json"
TURNS = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A bus."}]


def test_measure_never_fails() -> None:
    assert measure({"image": "a", "conversations": TURNS}) == ('["a"]', 6, True, -1)
    for row in (None, 3, {}, {"conversations": 3}, {"conversations": [3]}, {"conversations": [{"value": 3}]}, {"image": []}):
        assert measure(row) == ("", 0, False, -1)


@pytest.mark.parametrize(
    ("speakers", "answered"),
    [
        ([("human", "a"), ("gpt", "b")], True),
        ([("human", "a"), ("gpt", "")], False),
        ([("human", "a")], False),
        ([("gpt", "b"), ("human", "a")], False),
        ([("gpt", "b"), ("human", "a"), ("gpt", ""), ("human", "a"), ("gpt", "c")], True),
        ([("user", "a"), ("assistant", "b")], False),
        ([], False),
    ],
)
def test_whether_there_is_an_answer(speakers: list[tuple[str, str]], answered: bool) -> None:
    """As training finds labels, also where answers come before the first question."""
    row = {"conversations": [{"from": speaker, "value": text} for speaker, text in speakers]}
    assert measure(row).answered is answered


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ({"images": ["a"]}, "images"),
        ({"images": []}, None),
        ({"images": None, "video": ""}, None),
        ({"image": "a", "images": ["a"]}, None),
        ({"image": None, "images": ["a"]}, "images"),
        ({"image": "a", "video": "a.mp4"}, "video"),
        ({"img": "a"}, "img"),
        ({"Images": ["a"], "note": "video"}, None),
    ],
)
def test_keys_that_name_an_image_that_is_not_read(more: dict[str, Any], key: str | None) -> None:
    assert unread_key({"conversations": TURNS, **more}) == key
    assert measure({"conversations": TURNS, **more}).unread == (-1 if key is None else list(UNREAD_KEYS).index(key))


def test_views_and_visual_tokens_equal_the_recorded_ones() -> None:
    """Of the published widths, for images of many shapes."""
    config = preset_config("vicuna-7b")
    config.unpad_rule, config.num_hidden_layers = "pooled_grid", 1
    model = model_outline(config)
    cases = json.loads(RECORDED.read_text())["cases"]
    assert len(cases) == 15
    for case in cases:
        size, (across, down) = tuple(case["size_wh"]), case["grid_wh"]
        assert num_views(config, size) == 1 + across * down
        assert visual_token_costs(model, size) == [line["total"] for line in case["by_granularity"].values()]
    config.image_aspect_ratio = "pad"
    assert num_views(config, (1000, 100)) == 1
