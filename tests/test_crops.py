"""Any-resolution geometry and pixels, against recorded ones."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from packaging import version
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPImageProcessorPil

from llava import crops, images

ORACLE = Path(__file__).parent / "oracle"
CHOICES = json.loads((ORACLE / "resolution_choice.json").read_text())
PREPROCESS = json.loads((ORACLE / "preprocess.json").read_text())
PIXELS = load_file(ORACLE / "preprocess.safetensors")
SMALL = CHOICES["pinpoints_small_list"]


@pytest.fixture(scope="module")
def processor() -> CLIPImageProcessorPil:
    return crops.load_image_processor(ORACLE / "tiny-clip")


@pytest.mark.parametrize("kind", ["small", "real"])
@pytest.mark.parametrize("case", CHOICES["cases"], ids=lambda case: "x".join(map(str, case["size_wh"])))
def test_canvas_and_grid(case: dict[str, Any], kind: str) -> None:
    text, tile = CHOICES[f"pinpoints_{kind}_string"], CHOICES["tile_pixels"][kind]
    best = crops.select_best_resolution(case["size_wh"], crops.parse_pinpoints(text))
    assert list(best) == case[kind]["best_resolution_wh"]
    assert list(crops.get_anyres_image_grid_shape(case["size_wh"], text, tile)) == case[kind]["grid_wh"]


def test_the_first_of_equal_canvases_wins() -> None:
    assert crops.select_best_resolution((10, 10), [(20, 40), (40, 20)]) == (20, 40)
    assert crops.select_best_resolution((10, 10), [(40, 20), (20, 40)]) == (40, 20)


@pytest.mark.parametrize("pinpoints", [SMALL, tuple(map(tuple, SMALL)), str(SMALL), json.dumps(SMALL), f" {SMALL}\n"])
def test_pinpoints_as_list_or_text(pinpoints: Any) -> None:
    assert crops.parse_pinpoints(pinpoints) == [tuple(pair) for pair in SMALL]


@pytest.mark.parametrize(
    "pinpoints",
    [
        "",
        "[]",
        "336",
        "[[336]]",
        "[[336, 0]]",
        "[[336, -336]]",
        "[[336.0, 672]]",
        "[[True, 1]]",
        "[[1, 2, 3]]",
        "__import__('os')",
        "[" * 500,
        [],
        [["336", "672"]],
        None,
        7,
    ],
)
def test_bad_pinpoints_are_refused(pinpoints: Any) -> None:
    with pytest.raises(ValueError, match="expected a list of"):
        crops.parse_pinpoints(pinpoints)


def test_empty_pictures_and_canvas_lists_are_refused() -> None:
    with pytest.raises(ValueError, match="0 x 5 pixels"):
        crops.select_best_resolution((0, 5), SMALL)
    with pytest.raises(ValueError, match="no canvas"):
        crops.select_best_resolution((5, 5), [])


@pytest.mark.parametrize("name", PIXELS)
def test_pixels(name: str, processor: CLIPImageProcessorPil) -> None:
    mode, image_name = name.split("/")
    image = Image.open(ORACLE / "images" / f"{image_name}.png").convert("RGB")
    ours = crops.process_image_for_mode(image, processor, mode, SMALL)
    torch.testing.assert_close(ours, PIXELS[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("seed", range(4))
def test_every_pillow_scales_as_version_13_does(seed: int) -> None:
    numbers = random.Random(seed)
    noise = Image.effect_noise((200, 200), 90).convert("RGB")
    for _ in range(50):
        width, height, *size = (numbers.randint(1, 200) for _ in range(4))
        image, target = noise.crop((0, 0, width, height)), (size[0], size[1])
        by_columns = image.resize((target[0], height)).resize(target)
        by_rows = image.resize((width, target[1])).resize(target)
        rows_first = height - target[1] > 0 and height - target[1] > 2 * (width - target[0])  # Pillow 13, Resample.c
        scaled = crops.resize(image, target).tobytes()
        assert scaled == (by_rows if rows_first else by_columns).tobytes()
        if version.parse(PIL.__version__) >= version.parse("13"):
            assert scaled == image.resize(target).tobytes()


@pytest.mark.parametrize(
    "settings", [{}, {"image_mean": [0.5, 0.1, 0.9], "image_std": [0.5, 0.7, 1.0]}, {"do_normalize": False}, {"rescale_factor": 1 / 127.5}],
    ids=str,
)  # fmt: skip
def test_the_table_has_the_bits_of_the_processors_own_arithmetic(settings: dict[str, Any], processor: CLIPImageProcessorPil) -> None:
    own = CLIPImageProcessorPil(**{**processor.to_dict(), **settings})
    pixels = np.stack([np.random.default_rng(channel).permutation(256).astype(np.uint8).reshape(16, 16) for channel in range(3)], -1)
    image = Image.fromarray(pixels).resize((48, 48), Image.Resampling.NEAREST)
    expected = own.preprocess([image], return_tensors="pt")["pixel_values"][0]
    assert torch.equal(crops.process_image_for_mode(image, own, "square", None), expected) and expected.dtype == torch.float32
    cut = crops.cut_into_views(image, own, "square", None)
    assert cut.dtype == torch.uint8 and torch.equal(cut, torch.from_numpy(np.array(image)).permute(2, 0, 1))
    assert crops.pixel_values(expected, crops.pixel_table(own)) is expected


@pytest.mark.parametrize("size", [(7, 5), (48, 48), (30, 200), (200, 30), (48, 300)])
def test_a_plain_image_is_scaled_as_the_processor_would(size: tuple[int, int], processor: CLIPImageProcessorPil) -> None:
    image = Image.effect_noise(size, 90).convert("RGB")
    by_columns = image.size[1] <= 2 * image.size[0]  # where no version of Pillow has rows come first
    if by_columns or version.parse(PIL.__version__) >= version.parse("13"):
        ours = crops.process_image_for_mode(image, processor, "square", None)
        assert torch.equal(ours, processor.preprocess([image], return_tensors="pt")["pixel_values"][0])


def test_the_processor_is_the_pillow_one_with_or_without_torchvision(processor: CLIPImageProcessorPil) -> None:
    assert type(processor) is CLIPImageProcessorPil


def test_tiles_put_back_together_are_the_canvas() -> None:
    canvas = Image.effect_noise((96, 144), 80).convert("RGB")
    tiles = crops.divide_to_patches(canvas, 48)
    again = Image.new("RGB", canvas.size)
    for i, tile in enumerate(tiles):
        again.paste(tile, (i % 2 * 48, i // 2 * 48))
    assert len(tiles) == 6
    assert again.tobytes() == canvas.tobytes()


def test_a_canvas_that_is_no_whole_number_of_tiles_is_refused() -> None:
    with pytest.raises(ValueError, match="100 x 96 pixels is not a whole number of 48-pixel tiles"):
        crops.divide_to_patches(Image.new("RGB", (100, 96)), 48)


@pytest.mark.parametrize(("size", "box"), [((4, 2), (0, 1, 4, 3)), ((2, 5), (1, 0, 3, 5)), ((3, 3), (0, 0, 3, 3))])
def test_square_around_a_picture(size: tuple[int, int], box: tuple[int, int, int, int]) -> None:
    square = images.expand2square(Image.new("RGB", size, "white"), (1, 2, 3))
    assert square.size == (max(size), max(size))
    assert square.getbbox() == (0, 0, max(size), max(size))
    assert square.crop(box).getextrema() == ((255, 255),) * 3
    assert (np.asarray(square) == 255).all(axis=-1).sum() == size[0] * size[1]


def test_picture_is_centred_on_black() -> None:
    canvas = crops.resize_and_pad_image(Image.new("RGB", (10, 5), "white"), (48, 48))
    assert canvas.getbbox() == (0, 12, 48, 36)


@pytest.mark.parametrize("size", [(1, 1), (1, 150), (150, 1), (900, 6)])
@pytest.mark.parametrize("mode", ["none", "pad", "anyres"])
def test_odd_shapes_give_finite_views(
    size: tuple[int, int], mode: str, processor: CLIPImageProcessorPil, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crops, "_MAX_PAD_SIDE", 600)
    views = crops.process_image_for_mode(Image.new("RGB", size, "red"), processor, mode, SMALL)
    assert views.shape[-3:] == (3, 48, 48)
    assert torch.isfinite(views).all()


def test_modes_that_cannot_work_are_refused(processor: CLIPImageProcessorPil) -> None:
    image = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match="'any' .*expected one of none, square, pad, anyres|is 'any', expected"):
        crops.process_image_for_mode(image, processor, "any", SMALL)
    with pytest.raises(ValueError, match="image_grid_pinpoints is None"):
        crops.process_image_for_mode(image, processor, "anyres", None)


def test_view_size_takes_both_spellings_and_wants_a_square(processor: CLIPImageProcessorPil) -> None:
    assert crops.view_size(processor) == 48
    assert crops.view_size(CLIPImageProcessorPil(crop_size=32)) == 32
    with pytest.raises(ValueError, match="crops to 20 x 10"):
        crops.view_size(CLIPImageProcessorPil(crop_size={"height": 10, "width": 20}))
