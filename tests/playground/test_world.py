"""The micro world: everything follows from the seed, splits are disjoint, labels and answers agree with the scene."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from playground import sources, world

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]


def named(patches: np.ndarray, group: str) -> set[str]:
    """Names of ``group`` that any of the patches carries."""
    first = world.OFFSETS[group]
    found = patches.reshape(-1, world.NUM_ATTRIBUTES).any(0)[first: first + len(world.ATTRIBUTES[group])]
    return {name for name, there in zip(world.ATTRIBUTES[group], found, strict=True) if there}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_numbers_give_equal_scenes_pictures_and_words(layout: tuple[int, int]) -> None:
    one, two = (world.make_scene("train", 7, layout=layout) for _ in range(2))
    assert one == two
    assert world.render(one).tobytes() == world.render(two).tobytes()
    assert world.questions(one, random.Random(3)) == world.questions(two, random.Random(3))
    assert world.caption(one, random.Random(3)) == world.caption(two, random.Random(3))
    assert world.make_scene("train", 7, seed=1, layout=layout) != one


def test_splits_share_no_scene_no_scan_and_no_poster_image() -> None:
    scans = [set(sources.scan_indices(split)) for split in sources.SPLITS]
    posters = [{poster.key for poster in sources.posters(split)} for split in sources.SPLITS]
    pixels = [{sources.poster_image(poster.path).tobytes() for poster in sources.posters(split)}
              for split in sources.SPLITS]
    for kind in (scans, posters, pixels):
        assert all(kind) and not (kind[0] & kind[1] or kind[0] & kind[2] or kind[1] & kind[2])
    assert {key.split("/")[0] for key in posters[2]} == {"test"}
    scenes = [{world.make_scene(split, number) for number in range(200)} for split in sources.SPLITS]
    assert [len(kind) for kind in scenes] == [200] * 3 and len(set().union(*scenes)) == 600


@pytest.mark.parametrize("split", sources.SPLITS)
def test_a_scene_uses_only_sources_of_its_split(split: str) -> None:
    scans, posters = set(sources.scan_indices(split)), {poster.key for poster in sources.posters(split)}
    for number in range(50):
        scene = world.make_scene(split, number)
        things, poster = scene.find(world.Things), scene.find(world.Poster)
        assert things.scan.scan in scans and poster.key in posters
        assert things.scan.name == str(sources.scan_digit(things.scan.scan))


def test_a_full_scene_asks_every_family_once_and_a_miniature_a_part() -> None:
    families = [question.family for question in world.questions(world.make_scene("train", 1), random.Random(0))]
    assert sorted(families) == sorted(world.FAMILIES)
    for kind, expected in (("poster", {"poster"}), ("grid", {"background", "cell"}),
                           ("signs", {"background", "number", "pole", "pole_item"}),
                           ("things", {"background", "shape", "shape_colour", "digit", "arrow"})):
        scene = world.make_scene("train", 1, layout=(1, 1), kinds=(kind,))
        assert {question.family for question in world.questions(scene, random.Random(0))} == expected


def test_every_family_has_two_phrasings() -> None:
    seen: dict[str, set[str]] = {family: set() for family in world.FAMILIES}
    for number in range(40):
        for question in world.questions(world.make_scene("train", number), random.Random(number)):
            seen[question.family].add(question.text)
    assert all(len(texts) >= 2 for texts in seen.values())


def test_answers_agree_with_the_labels_of_the_patches() -> None:
    group_of = {"background": "background", "shape": "shape", "shape_colour": "shape_colour", "digit": "scan_digit",
                "arrow": "arrow"}
    for number in range(30):
        scene = world.make_scene("validation", number)
        labels = world.patch_labels(scene)
        answers = {q.family: q.answer for q in world.questions(scene, random.Random(number))}
        for family, group in group_of.items():
            assert named(labels, group) == {answers[family]}
        assert named(labels, "glyph") == set(answers["number"])
        assert named(labels, "band_colour") == set(answers["pole"].split())
        assert answers["pole_item"] in answers["pole"].split()
        marked = labels[labels[..., world.OFFSETS["grid_mark"]] > 0]
        (row,), (column,) = named(marked, "grid_row"), named(marked, "grid_column")
        assert answers["cell"] == f"row {row} column {column}"


def test_fine_things_lie_on_the_patch_grid() -> None:
    """Each glyph owns a patch column and each band a patch row: what makes the fine families fine, and solvable."""
    for number in range(60):
        scene = world.make_scene("train", number, layout=(1, 1), kinds=("signs",))
        signs, labels = scene.find(world.Signs), world.patch_labels(scene)
        glyphs = labels[..., world.OFFSETS["glyph"]: world.OFFSETS["glyph"] + 10]
        bands = labels[..., world.OFFSETS["band_colour"]: world.OFFSETS["band_colour"] + len(world.BAND_COLOURS)]
        assert glyphs.sum(-1).max() == 1 and bands.sum(-1).max() == 1
        columns = [int(part.argmax()) for part in glyphs.any(0) if part.any()]
        assert columns == [int(character) for character in signs.number]
        rows = [world.BAND_COLOURS[int(part.argmax())] for part in bands.any(1) if part.any()]
        assert tuple(rows) == signs.bands


def test_big_things_stay_in_their_cells() -> None:
    for number in range(60):
        things = world.make_scene("train", number).find(world.Things)
        cells = []
        for thing in (things.shape, things.scan, things.arrow):
            left, top, size = thing.box
            assert left // 32 == (left + size - 1) // 32 and top // 32 == (top + size - 1) // 32
            cells.append((left // 32, top // 32))
        assert len(set(cells)) == 3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_views_are_the_squeezed_whole_and_then_the_tiles(layout: tuple[int, int]) -> None:
    scene = world.make_scene("train", 5, layout=layout)
    views = list(world.views(scene))
    assert len(views) == 1 + layout[0] * layout[1]
    assert all(pixels.shape == (64, 64, 3) and labels.shape == (8, 8, world.NUM_ATTRIBUTES) for pixels, labels in views)
    picture = np.asarray(world.render(scene))
    assert (views[1][0] == picture[:64, :64]).all()
    tiles = np.stack([labels for _, labels in views[1:]]).any((0, 1, 2))
    assert (views[0][1].any((0, 1)) == tiles).all()


def test_easy_vqa_answers_agree_with_what_the_poster_shows() -> None:
    for poster in sources.posters("validation"):
        for _, answer in poster.questions:
            if answer in sources.POSTER_KINDS:
                assert answer == poster.kind
            elif answer in sources.POSTER_COLOURS:
                assert answer == poster.colour


def test_notes_and_caption_name_what_the_questions_ask() -> None:
    scene = world.make_scene("train", 11)
    lots = random.Random(0)
    notes, caption = world.description(scene, lots).split(), world.caption(scene, lots)
    for question in world.questions(scene, lots):
        if question.family not in ("poster", "pole", "number"):
            assert set(question.answer.split()) <= set(notes)
            assert question.answer in caption
    signs = scene.find(world.Signs)
    assert set(signs.number) <= set(notes) and signs.number in caption


def test_bad_split_and_layout_are_refused() -> None:
    with pytest.raises(ValueError, match="'dev'.*train, validation, test"):
        world.make_scene("dev", 0)
    with pytest.raises(ValueError, match="6 quadrants"):
        world.make_scene("train", 0, layout=(3, 2))


def test_committed_samples_are_what_the_generator_gives(tmp_path: Path) -> None:
    from playground import make_data

    make_data.write_samples(tmp_path, seed=0)
    committed = Path(world.__file__).parent / "images"
    assert (tmp_path / "samples.json").read_text() == (committed / "samples.json").read_text()
