"""The drawn grid has as many cells as the model spends tokens."""

from __future__ import annotations

import pytest
from PIL import Image

from llava import visualize
from llava.model import LlavaConfig
from llava.model.granularity import granularity_levels
from llava.model.merge import merged_layout
from llava.model.routing import RoutingReport

VISION = {"image_size": 64, "patch_size": 8}


def config(**changes):
    fields = {"vision_config": VISION, "image_grid_pinpoints": [[128, 128], [128, 64]], "vis_token_granularity": [4, 16, 64]}
    return LlavaConfig(**{**fields, **changes})


@pytest.mark.parametrize("size", [(128, 128), (128, 40), (90, 128)])
@pytest.mark.parametrize("tokens", [4, 16, 64])
def test_the_kept_cells_and_newlines_add_up_to_the_cost(monkeypatch, size, tokens):
    drawn = []
    real = visualize._draw_grid

    def noting(panel, grid, tiles, rows=None, columns=None):
        drawn.append((grid, rows, columns))
        real(panel, grid, tiles, rows, columns)

    monkeypatch.setattr(visualize, "_draw_grid", noting)
    tiles = (1, 2) if size == (128, 40) else (2, 2)
    level = granularity_levels((8, 8), [tokens])[0]
    layout = merged_layout(level, tiles[0] * tiles[1] + 1, tiles, size, "spatial_unpad", "picture")
    report = RoutingReport(None, None, tokens, layout.num_tokens, 336, {tokens: layout.num_tokens})
    visualize.draw_granularity([Image.new("RGB", size, "blue")], [report], config())
    (whole, _, _), (_, rows, columns) = drawn
    cells = whole[0] * whole[1] + (rows[1] - rows[0]) * (columns[1] - columns[0])
    assert cells + (rows[1] - rows[0]) == layout.num_tokens


@pytest.mark.parametrize("mode", ["pad", "square"])
def test_single_views_are_drawn_too(mode):
    report = RoutingReport(None, None, 16, 16, 64, {16: 16})
    sheet = visualize.draw_granularity([Image.new("RGB", (30, 90), "blue")] * 2, [report, report], config(image_aspect_ratio=mode))
    assert sheet.height > 2 * visualize.PANEL and (255, 64, 64) in {color for _, color in sheet.getcolors(10**7)}


@pytest.mark.parametrize("mode", ["anyres", "pad", "square"])
@pytest.mark.parametrize("size", [(128, 128), (128, 40), (90, 128)])
@pytest.mark.parametrize("tokens", [4, 16, 64])
def test_the_grid_for_pages_adds_up_to_the_cost_too(mode, size, tokens):
    views = visualize.grid_of(size, tokens, config(image_aspect_ratio=mode))["views"]
    cells = [(view["rows"][1] - view["rows"][0]) * (view["columns"][1] - view["columns"][0]) for view in views]
    assert cells[0] == tokens
    if mode != "anyres":
        assert len(views) == 1
        return
    tiles = (1, 2) if size == (128, 40) else (2, 2)
    level = granularity_levels((8, 8), [tokens])[0]
    layout = merged_layout(level, tiles[0] * tiles[1] + 1, tiles, size, "spatial_unpad", "picture")
    assert sum(cells) + views[1]["newlines"] == layout.num_tokens
    left, top, right, bottom = views[1]["picture"]
    assert abs((right - left) / (bottom - top) - size[0] / size[1]) < 0.05
    assert 0 <= left < right <= views[1]["canvas"][0] and 0 <= top < bottom <= views[1]["canvas"][1]


def test_a_grid_of_another_granularity_is_refused():
    with pytest.raises(ValueError, match="granularity is 5"):
        visualize.grid_of((128, 128), 5, config())
