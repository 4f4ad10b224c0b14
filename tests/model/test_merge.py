"""From pooled views to one sequence: recorded counts and embeddings, both unpad rules, hand-computed cases."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from llava.model.granularity import granularity_levels
from llava.model.merge import merge_views, merged_layout

FULL = [36, 72, 144, 288, 576]


def real_level(tokens: int):
    return granularity_levels((24, 24), [tokens])[0]


def test_token_counts_of_the_real_geometry_equal_the_recorded_ones(oracle):
    for case in json.loads((oracle / "token_counts_real.json").read_text())["cases"]:
        across, down = case["grid_wh"]
        for tokens in FULL:
            expected = case["by_granularity"][str(tokens)]
            args = (real_level(tokens), across * down + 1, (down, across), tuple(case["size_wh"]))
            layout = merged_layout(*args, "spatial_unpad", "pooled_grid")
            rows = layout.rows[1] - layout.rows[0]
            kept = (rows, layout.columns[1] - layout.columns[0] if rows else 0)
            assert (layout.num_tokens, *kept) == (expected["total"], expected["kept_rows"], expected["kept_cols"]), case["size_wh"]
            assert merged_layout(*args, "spatial", "pooled_grid").num_tokens == case["spatial_total"][str(tokens)]
            if tokens == 576:
                assert merged_layout(*args, "spatial_unpad", "picture") == layout


@pytest.mark.parametrize("size", [(672, 672), (640, 480), (480, 640), (1920, 1080), (336, 336), (3000, 60)])
@pytest.mark.parametrize("tokens", FULL)
def test_the_picture_rule_keeps_every_cell_that_shows_the_picture_and_no_other(size, tokens):
    tiles = {(640, 480): (2, 2), (480, 640): (2, 2), (672, 672): (2, 2), (1920, 1080): (2, 2), (336, 336): (2, 1), (3000, 60): (1, 3)}[size]
    level = real_level(tokens)
    layout = merged_layout(level, tiles[0] * tiles[1] + 1, tiles, size, "spatial_unpad", "picture")
    scale = min(tiles[1] * 336 / size[0], tiles[0] * 336 / size[1])
    top = (tiles[0] * 24 - int(size[1] * scale / 14 + 1e-9)) // 2  # whole patches of padding above, as at full granularity
    left = (tiles[1] * 24 - int(size[0] * scale / 14 + 1e-9)) // 2
    assert layout.rows[0] == top // level.kernel[0] and layout.columns[0] == left // level.kernel[1]
    assert layout.rows[1] * level.kernel[0] >= tiles[0] * 24 - top and layout.columns[1] * level.kernel[1] >= tiles[1] * 24 - left


def test_two_tiles_by_hand():
    level = granularity_levels((2, 2), [4])[0]
    pooled = torch.arange(12.0).reshape(3, 4, 1)  # the whole view 0..3, the left tile 4..7, the right tile 8..11
    layout = merged_layout(level, 3, (1, 2), (20, 5), "spatial_unpad", "picture")
    assert (layout.rows, layout.columns, layout.num_tokens) == ((0, 2), (0, 4), 4 + 8 + 2)
    merged = merge_views(pooled, level, layout, torch.tensor([-1.0])).flatten().tolist()
    assert merged == [0, 1, 2, 3, 4, 5, 8, 9, -1, 6, 7, 10, 11, -1]
    flat = merged_layout(level, 3, None, (20, 5), "flat", "picture")
    assert merge_views(pooled, level, flat, torch.zeros(0)).flatten().tolist() == list(range(12))


def test_a_size_that_does_not_make_up_the_tiles_is_refused():
    with pytest.raises(ValueError, match=r"has 3 tiles, but its size \(10, 10\) asks for \(1, 2\)"):
        merged_layout(real_level(36), 4, (1, 2), (10, 10), "spatial", "picture")


def test_merged_inputs_equal_the_recorded_ones(oracle, released, images):
    """All recorded cases but those where the reference is wrong: truncation, text paired by image number, a router that flat ignores."""
    tensors = load_file(oracle / "merge_cases.safetensors")
    checked = 0
    for case in json.loads((oracle / "merge_cases.json").read_text())["cases"]:
        name = case["name"]
        if "trunc" in name or name in ("adaptive_4d", "adaptive_multi_image", "no_granularity_flat_router_on"):
            continue
        given = {key: tensors.get(f"{name}/{key}") for key in ("input_ids", "attention_mask", "labels", "position_ids")}
        adaptive = case["router_select"] and case["granularity"] is None
        if adaptive:  # outside training the reference lets the router read the answer; ours never does, so it gets none here
            given["labels"] = None
        out = _merge(released, case, given, images)
        rows = case["row_lengths"] or [case["out_shape"][1]] * case["out_shape"][0]
        expected = tensors[f"{name}/out_inputs_embeds"]
        assert list(out.embeds.shape) == case["out_shape"], name
        torch.testing.assert_close(out.embeds, expected, atol=3e-5, rtol=0, msg=lambda text, n=name: f"{n}: {text}")
        for key, value in (("attention_mask", out.mask), ("labels", out.labels), ("position_ids", out.positions)):
            if key == "labels" and adaptive:
                continue
            assert (value is None) == case[f"out_{key}_is_none"], (name, key)
            if value is not None:
                assert torch.equal(value.long(), tensors[f"{name}/out_{key}"].long()), (name, key)
        if out.mask is not None:
            assert out.mask.sum(-1).tolist() == rows, name
        checked += 1
    assert checked >= 40


def _merge(model, case, given, images):
    config = model.config
    saved = (config.mm_patch_merge_type, config.tokenizer_padding_side, model.model.router)
    config.mm_patch_merge_type, config.tokenizer_padding_side = case["merge"], case["padding_side"]
    if not case["router_select"]:
        model.model.router = None
    try:
        with torch.no_grad():
            ids, positions, mask, _, embeds, labels = model.prepare_inputs_labels_for_multimodal(
                given["input_ids"],
                torch.zeros_like(given["input_ids"])
                if given["position_ids"] is None and case["gives_position_ids"]
                else given["position_ids"],
                given["attention_mask"].bool() if given["attention_mask"] is not None else None,
                None,
                given["labels"],
                images.views(case["images"], case["image_container"]),
                images.sizes_of(case["images"]),
                vis_token_granularity=case["granularity"],
            )
    finally:
        config.mm_patch_merge_type, config.tokenizer_padding_side, model.model.router = saved
    assert ids is None
    return SimpleNamespace(embeds=embeds, mask=mask, labels=labels, positions=positions)


@pytest.mark.parametrize("name", ["mixed_right_trunc", "mixed_left_trunc", "trunc_inside_image"])
def test_a_row_longer_than_the_context_is_refused_never_cut(oracle, released, images, name):
    cases = {case["name"]: case for case in json.loads((oracle / "merge_cases.json").read_text())["cases"]}
    tensors, case = load_file(oracle / "merge_cases.safetensors"), cases[name]
    given = {key: tensors.get(f"{name}/{key}") for key in ("input_ids", "attention_mask", "labels", "position_ids")}
    context, released.config.max_position_embeddings = released.config.max_position_embeddings, case["max_length"]
    try:
        with pytest.raises(ValueError, match=rf"of them visual\), but the context of this model is {case['max_length']}"):
            _merge(released, case, given, images)
    finally:
        released.config.max_position_embeddings = context


def test_flat_merging_routes_too(released, images):
    """The reference silently keeps full granularity under `flat`; ours lets the router choose."""
    released.config.mm_patch_merge_type = "flat"
    try:
        report = released.route(torch.tensor([[1, -200, 5, 6]]), images.views(["tall"]), images.sizes_of(["tall"]))[0]
    finally:
        released.config.mm_patch_merge_type = "spatial_unpad"
    assert report.tokens_per_level == {9: 27, 18: 54, 36: 108, 72: 216, 144: 432}
    assert report.num_visual_tokens == report.tokens_per_level[report.granularity]
