"""The micro world: small scenes, and questions about them that need different visual granularity.

A scene is a grid of 64x64 quadrants whose borders are the tile borders of the any-resolution crops. There are four
kinds of quadrant; a full scene (128x128) has each once, in random order:

* ``poster``: an easy-VQA image with easy-VQA's own questions;
* ``grid``: 3x3 cells of 16 px, one of them marked. Average pooling keeps the cell while a pooled token is at most
  one cell large: 16 tokens per view;
* ``signs``: a three-digit number whose glyphs each fill one patch column, which only 64 tokens per view keep apart, and
  a pole of four coloured bands, each one patch row high, which 1x2 pooling (32 tokens per view) keeps in order;
* ``things``: a large shape, a scan of a handwritten digit and an arrow, each alone in a 32 px cell, so that 4x4
  pooling (4 tokens per view) still gives each its own token.

A miniature is an image of one or two quadrants: same objects, same questions, an easier search. Everything follows
from (seed, split, number); splits share no scan and no easy-VQA image (see ``sources``).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import cos, pi, sin

import numpy as np
from PIL import Image, ImageDraw

from playground import sources

QUADRANT = 64
PATCH = 8
QUADRANT_KINDS = ("poster", "grid", "signs", "things")
COARSE_FAMILIES = ("background", "shape", "shape_colour", "digit", "arrow", "poster")
FINE_FAMILIES = ("cell", "pole", "pole_item", "number")
FAMILIES = COARSE_FAMILIES + FINE_FAMILIES

Colour = tuple[int, int, int]
BACKGROUNDS: dict[str, Colour] = {
    "pink": (246, 168, 190), "cyan": (132, 214, 224), "gray": (158, 158, 164),
    "beige": (232, 216, 178), "olive": (136, 142, 66), "brown": (128, 92, 64),
}
COLOURS: dict[str, Colour] = {
    "red": (222, 30, 36), "green": (24, 150, 52), "blue": (30, 70, 222), "yellow": (252, 222, 20),
    "white": (252, 252, 252), "black": (18, 18, 20), "purple": (138, 34, 170), "orange": (250, 132, 14),
}
BAND_COLOURS = ("red", "green", "blue", "yellow", "white", "black")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
DIRECTIONS = ("up", "right", "down", "left")
ORDINALS = ("first", "second", "third", "fourth")
BANDS = 4
GLYPHS = 3
CELLS = 3
CELL = 16
INK: Colour = (26, 26, 34)
PAPER: Colour = (250, 248, 240)

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "background": tuple(BACKGROUNDS),
    "shape": SHAPES,
    "shape_colour": tuple(COLOURS),
    "scan_digit": tuple("0123456789"),
    "arrow": DIRECTIONS,
    "poster_kind": sources.POSTER_KINDS,
    "poster_colour": sources.POSTER_COLOURS,
    "glyph": tuple("0123456789"),
    "glyph_index": ORDINALS[:GLYPHS],
    "band_colour": BAND_COLOURS,
    "band_index": ORDINALS,
    "grid_mark": ("marked",),
    "grid_row": ("1", "2", "3"),
    "grid_column": ("1", "2", "3"),
}
"""What may be said of a patch, by group; the vision warm-up has one linear head per group."""
OFFSETS: dict[str, int] = dict(
    zip(ATTRIBUTES, np.cumsum([0] + [len(names) for names in ATTRIBUTES.values()])[:-1].tolist(), strict=True)
)
NUM_ATTRIBUTES = sum(len(names) for names in ATTRIBUTES.values())

_GLYPH_ROWS: dict[str, str] = {
    "0": ".####. ###### ##..## ##..## ##..## ##..## ##..## ##..## ##..## ##..## ###### .####.",
    "1": "..##.. .###.. ####.. ..##.. ..##.. ..##.. ..##.. ..##.. ..##.. ..##.. ###### ######",
    "2": ".####. ###### ##..## ....## ....## ...##. ..##.. .##... ##.... ##.... ###### ######",
    "3": ".####. ###### ##..## ....## ..###. ..###. ....## ....## ....## ##..## ###### .####.",
    "4": "##..## ##..## ##..## ##..## ##..## ###### ###### ....## ....## ....## ....## ....##",
    "5": "###### ###### ##.... ##.... #####. ###### ....## ....## ....## ##..## ###### .####.",
    "6": ".####. ###### ##.... ##.... #####. ###### ##..## ##..## ##..## ##..## ###### .####.",
    "7": "###### ###### ....## ....## ...##. ...##. ..##.. ..##.. .##... .##... ##.... ##....",
    "8": ".####. ###### ##..## ##..## .####. .####. ##..## ##..## ##..## ##..## ###### .####.",
    "9": ".####. ###### ##..## ##..## ##..## ###### .##### ....## ....## ....## ###### .####.",
}
GLYPH_WIDTH, GLYPH_HEIGHT = 6, 12


@dataclass(frozen=True)
class Poster:
    """An easy-VQA image: its key in ``sources``, and what it shows."""

    key: str
    path: str
    kind: str
    colour: str
    questions: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Grid:
    """A 3x3 grid at (x, y) pixels in its quadrant; ``row`` and ``column`` of the mark count from 0."""

    x: int
    y: int
    row: int
    column: int
    colour: str


@dataclass(frozen=True)
class Signs:
    """A number on a sign (top left of the first glyph in pixels) and a pole (top left of the first band)."""

    number: str
    x: int
    y: int
    dark: bool
    bands: tuple[str, ...]
    pole_x: int
    pole_y: int


@dataclass(frozen=True)
class Thing:
    """One big thing: ``kind`` shape, scan or arrow; ``box`` (left, top, size) in pixels; what it is; its colour."""

    kind: str
    box: tuple[int, int, int]
    name: str
    colour: str = "black"
    scan: int = -1
    angle: float = 0.0


@dataclass(frozen=True)
class Things:
    """The shape, the scan and the arrow of a ``things`` quadrant."""

    shape: Thing
    scan: Thing
    arrow: Thing


Quadrant = Poster | Grid | Signs | Things


@dataclass(frozen=True)
class Question:
    """A question about a scene, its answer, and the family it belongs to."""

    family: str
    text: str
    answer: str


@dataclass(frozen=True)
class Scene:
    """What an image shows: quadrants row by row on a ``columns`` x ``rows`` layout over one background."""

    columns: int
    rows: int
    background: str
    background_rgb: Colour
    quadrants: tuple[Quadrant, ...]

    @property
    def has_background(self) -> bool:
        """Whether any background is visible (a lone poster covers it)."""
        return any(not isinstance(quadrant, Poster) for quadrant in self.quadrants)

    def find(self, kind: type[Quadrant]) -> Quadrant | None:
        """The quadrant of the given class, if the scene has one."""
        return next((quadrant for quadrant in self.quadrants if isinstance(quadrant, kind)), None)


# ---------------------------------------------------------------- drawing lots


def make_scene(split: str, number: int, seed: int = 0, layout: tuple[int, int] = (2, 2),
               kinds: tuple[str, ...] | None = None) -> Scene:
    """The scene that (seed, split, number, layout) stand for.

    Args:
        split: "train", "validation" or "test": decides which scans and easy-VQA images may appear.
        number: any integer; equal numbers give equal scenes.
        layout: (columns, rows) of quadrants; (2, 2) is a full scene, (1, 1), (2, 1) and (1, 2) are miniatures.
        kinds: the quadrant kinds in reading order; drawn without repetition when not given.

    Raises:
        ValueError: for a split that does not exist, or a layout that four kinds cannot fill.
    """
    if split not in sources.SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(sources.SPLITS)}.")
    count = layout[0] * layout[1]
    if not 1 <= count <= len(QUADRANT_KINDS):
        raise ValueError(f"layout {layout} has {count} quadrants; a scene has 1 to {len(QUADRANT_KINDS)}.")
    lots = random.Random(f"{seed}/{split}/{layout}/{number}")
    drawn = lots.sample(QUADRANT_KINDS, count)
    name = lots.choice(tuple(BACKGROUNDS))
    red, green, blue = (min(255, max(0, value + lots.randint(-8, 8))) for value in BACKGROUNDS[name])
    quadrants = tuple(_draw_lots(kind, split, lots) for kind in (kinds or drawn))
    return Scene(layout[0], layout[1], name, (red, green, blue), quadrants)


def _draw_lots(kind: str, split: str, lots: random.Random) -> Quadrant:
    if kind == "poster":
        source = lots.choice(sources.posters(split))
        return Poster(source.key, source.path, source.kind, source.colour, source.questions)
    if kind == "grid":
        corner = (lots.choice((0, CELL)), lots.choice((0, CELL)))
        return Grid(*corner, lots.randrange(CELLS), lots.randrange(CELLS), lots.choice(("red", "blue", "black")))
    if kind == "signs":
        return _signs_lots(lots)
    return _things_lots(split, lots)


def _signs_lots(lots: random.Random) -> Signs:
    """Sign on one side, pole on the other; glyph columns and bands sit on the patch grid, give or take a pixel."""
    sign_left = lots.random() < 0.5
    column = lots.choice((1, 2)) if sign_left else lots.choice((3, 4))
    bands = [lots.choice(BAND_COLOURS)]
    while len(bands) < BANDS:
        bands.append(lots.choice([colour for colour in BAND_COLOURS if colour != bands[-1]]))
    return Signs(
        number="".join(lots.choice("0123456789") for _ in range(GLYPHS)),
        x=PATCH * column + 1 + lots.choice((-1, 0, 0, 1)),
        y=PATCH * lots.randint(1, 5) + 2 + lots.randint(-1, 1),
        dark=lots.random() < 0.3,
        bands=tuple(bands),
        pole_x=(48 if sign_left else 0) + 1 + lots.choice((-1, 0, 0, 1)),
        pole_y=PATCH * lots.randint(1, 3) + lots.choice((-1, 0, 0, 1)),
    )


def _things_lots(split: str, lots: random.Random) -> Things:
    def box(cell: int) -> tuple[int, int, int]:
        size = lots.randint(24, 28)
        free = QUADRANT // 2 - size - 1
        left, top = 32 * (cell % 2) + lots.randint(1, free), 32 * (cell // 2) + lots.randint(1, free)
        return left, top, size

    cells = lots.sample(range(4), 3)
    scan = lots.choice(sources.scan_indices(split))
    angle = lots.uniform(-10, 10) if split == "train" else 0.0
    return Things(
        shape=Thing("shape", box(cells[0]), lots.choice(SHAPES), lots.choice(tuple(COLOURS))),
        scan=Thing("scan", box(cells[1]), str(sources.scan_digit(scan)), scan=scan, angle=angle),
        arrow=Thing("arrow", box(cells[2]), lots.choice(DIRECTIONS)),
    )


# ---------------------------------------------------------------- drawing images


def render(scene: Scene) -> Image.Image:
    """The RGB image of a scene, (64*columns) x (64*rows) pixels."""
    image = Image.new("RGB", (QUADRANT * scene.columns, QUADRANT * scene.rows), scene.background_rgb)
    for place, quadrant in enumerate(scene.quadrants):
        tile = image.crop((0, 0, QUADRANT, QUADRANT)) if place == 0 else Image.new(
            "RGB", (QUADRANT, QUADRANT), scene.background_rgb)
        _paint(tile, quadrant)
        image.paste(tile, (QUADRANT * (place % scene.columns), QUADRANT * (place // scene.columns)))
    return image


def _paint(tile: Image.Image, quadrant: Quadrant) -> None:
    if isinstance(quadrant, Poster):
        tile.paste(sources.poster_image(quadrant.path))
    elif isinstance(quadrant, Grid):
        _paint_grid(tile, quadrant)
    elif isinstance(quadrant, Signs):
        _paint_signs(tile, quadrant)
    else:
        _paint_shape(tile, quadrant.shape)
        _paint_scan(tile, quadrant.scan)
        _paint_arrow(tile, quadrant.arrow)


def _paint_grid(tile: Image.Image, grid: Grid) -> None:
    brush = ImageDraw.Draw(tile)
    for row in range(CELLS):
        for column in range(CELLS):
            left, top = grid.x + CELL * column, grid.y + CELL * row
            marked = (row, column) == (grid.row, grid.column)
            brush.rectangle((left, top, left + CELL - 1, top + CELL - 1), fill=PAPER, outline=INK)
            if marked:
                brush.rectangle((left + 2, top + 2, left + CELL - 3, top + CELL - 3), fill=COLOURS[grid.colour])


@cache
def _glyph_mask(character: str) -> Image.Image:
    rows = _GLYPH_ROWS[character].split()
    return Image.fromarray(np.array([[255 * (dot == "#") for dot in row] for row in rows], dtype=np.uint8))


def _paint_signs(tile: Image.Image, signs: Signs) -> None:
    brush = ImageDraw.Draw(tile)
    board, ink = ((34, 44, 84), PAPER) if signs.dark else (PAPER, INK)
    frame = (signs.x - 3, signs.y - 4, signs.x + PATCH * GLYPHS, signs.y + GLYPH_HEIGHT + 3)
    brush.rectangle(frame, fill=board, outline=INK)
    for place, character in enumerate(signs.number):
        tile.paste(ink, (signs.x + PATCH * place, signs.y), _glyph_mask(character))
    left, right = signs.pole_x, signs.pole_x + 13
    for place, colour in enumerate(signs.bands):
        top = signs.pole_y + PATCH * place
        brush.rectangle((left, top, right, top + PATCH - 1), fill=COLOURS[colour])
    brush.rectangle((left, signs.pole_y - 1, right, signs.pole_y + PATCH * BANDS), outline=INK)


def _polygon(name: str) -> list[tuple[float, float]]:
    """Corner points of a shape or arrow in the unit square."""
    if name == "triangle":
        return [(0.5, 0.0), (1.0, 1.0), (0.0, 1.0)]
    if name == "star":
        spokes = [(0.5 if k % 2 == 0 else 0.2, pi * k / 5) for k in range(10)]
        return [(0.5 + radius * sin(turn), 0.53 - radius * cos(turn)) for radius, turn in spokes]
    if name == "cross":
        low, high = 0.33, 0.67
        return [(low, 0), (high, 0), (high, low), (1, low), (1, high), (high, high),
                (high, 1), (low, 1), (low, high), (0, high), (0, low), (low, low)]
    arrow = [(0.5, 0.0), (1.0, 0.5), (0.68, 0.5), (0.68, 1.0), (0.32, 1.0), (0.32, 0.5), (0.0, 0.5)]
    for _ in range(DIRECTIONS.index(name)):
        arrow = [(1 - y, x) for x, y in arrow]
    return arrow


@cache
def _shape_mask(name: str, size: int) -> Image.Image:
    """An anti-aliased mask (drawn four times as large) of a shape or of an arrow's direction."""
    large = 4 * size
    mask = Image.new("L", (large, large), 0)
    brush = ImageDraw.Draw(mask)
    if name == "square":
        brush.rectangle((0, 0, large, large), fill=255)
    elif name in ("circle", "ring"):
        brush.ellipse((0, 0, large - 1, large - 1), fill=255)
        if name == "ring":
            brush.ellipse((0.28 * large, 0.28 * large, 0.72 * large, 0.72 * large), fill=0)
    else:
        brush.polygon([(x * large, y * large) for x, y in _polygon(name)], fill=255)
    return mask.reduce(4)


def _paint_shape(tile: Image.Image, thing: Thing) -> None:
    left, top, size = thing.box
    tile.paste(INK, (left, top), _shape_mask(thing.name, size))
    tile.paste(COLOURS[thing.colour], (left + 1, top + 1), _shape_mask(thing.name, size - 2))


def _paint_arrow(tile: Image.Image, thing: Thing) -> None:
    left, top, size = thing.box
    ImageDraw.Draw(tile).rounded_rectangle((left, top, left + size - 1, top + size - 1), 4, fill=(36, 60, 110))
    tile.paste(PAPER, (left + 3, top + 3), _shape_mask(thing.name, size - 6))


def _paint_scan(tile: Image.Image, thing: Thing) -> None:
    left, top, size = thing.box
    ink = sources.scan_image(thing.scan).resize((size - 4, size - 4), Image.Resampling.BICUBIC)
    if thing.angle:
        ink = ink.rotate(thing.angle, Image.Resampling.BILINEAR)
    ImageDraw.Draw(tile).rectangle((left, top, left + size - 1, top + size - 1), fill=PAPER, outline=(120, 110, 100))
    tile.paste((16, 20, 60), (left + 2, top + 2), ink)


# ---------------------------------------------------------------- labels per patch


def patch_labels(scene: Scene) -> np.ndarray:
    """What lies under each patch of the image: (8*rows, 8*columns, NUM_ATTRIBUTES) of 0 and 1."""
    side = QUADRANT // PATCH
    labels = np.zeros((side * scene.rows, side * scene.columns, NUM_ATTRIBUTES), dtype=np.uint8)
    for place, quadrant in enumerate(scene.quadrants):
        row, column = divmod(place, scene.columns)
        part = labels[side * row: side * (row + 1), side * column: side * (column + 1)]
        if isinstance(quadrant, Poster):
            _say(part, (0, 0, QUADRANT, QUADRANT), poster_kind=quadrant.kind, poster_colour=quadrant.colour)
            continue
        _say(part, (0, 0, QUADRANT, QUADRANT), background=scene.background)
        if isinstance(quadrant, Grid):
            _label_grid(part, quadrant)
        elif isinstance(quadrant, Signs):
            _label_signs(part, quadrant)
        else:
            _label_things(part, quadrant)
    return labels


def _say(part: np.ndarray, box: tuple[int, int, int, int], **claims: str) -> None:
    """Set ``claims`` (attribute group to name) on every patch at least a quarter of whose width and height lies in
    ``box`` (left, top, right, bottom in pixels)."""
    margin = PATCH // 4
    left, top = (-(-(edge - PATCH + margin) // PATCH) for edge in box[:2])
    right, bottom = ((edge - margin) // PATCH + 1 for edge in box[2:])
    for group, name in claims.items():
        place = OFFSETS[group] + ATTRIBUTES[group].index(name)
        part[max(top, 0): bottom, max(left, 0): right, place] = 1


def _label_grid(part: np.ndarray, grid: Grid) -> None:
    for row in range(CELLS):
        for column in range(CELLS):
            left, top = grid.x + CELL * column, grid.y + CELL * row
            box = (left, top, left + CELL, top + CELL)
            _say(part, box, grid_row=str(row + 1), grid_column=str(column + 1))
            if (row, column) == (grid.row, grid.column):
                _say(part, box, grid_mark="marked")


def _label_signs(part: np.ndarray, signs: Signs) -> None:
    for place, character in enumerate(signs.number):
        left = signs.x + PATCH * place
        box = (left, signs.y, left + GLYPH_WIDTH, signs.y + GLYPH_HEIGHT)
        _say(part, box, glyph=character, glyph_index=ORDINALS[place])
    for place, colour in enumerate(signs.bands):
        top = signs.pole_y + PATCH * place
        box = (signs.pole_x, top, signs.pole_x + 14, top + PATCH)
        _say(part, box, band_colour=colour, band_index=ORDINALS[place])


def _label_things(part: np.ndarray, things: Things) -> None:
    def frame(thing: Thing) -> tuple[int, int, int, int]:
        left, top, size = thing.box
        return left, top, left + size, top + size

    _say(part, frame(things.shape), shape=things.shape.name, shape_colour=things.shape.colour)
    _say(part, frame(things.scan), scan_digit=things.scan.name)
    _say(part, frame(things.arrow), arrow=things.arrow.name)


def views(scene: Scene) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The 64x64 views of the any-resolution crops, first the squeezed whole, then the tiles row by row.

    Yields:
        (pixels (64, 64, 3) uint8, labels (8, 8, NUM_ATTRIBUTES) uint8); a patch of the squeezed whole has the labels of
        all the patches beneath it.
    """
    image, labels = render(scene), patch_labels(scene)
    side = QUADRANT // PATCH
    beneath = labels.reshape(side, scene.rows, side, scene.columns, NUM_ATTRIBUTES).max(axis=(1, 3))
    yield np.asarray(image.resize((QUADRANT, QUADRANT), Image.Resampling.BICUBIC)), beneath
    pixels = np.asarray(image)
    for row in range(scene.rows):
        for column in range(scene.columns):
            rows, columns = slice(row, row + 1), slice(column, column + 1)
            yield (pixels[_span(rows, QUADRANT), _span(columns, QUADRANT)],
                   labels[_span(rows, side), _span(columns, side)])


def _span(units: slice, size: int) -> slice:
    return slice(units.start * size, units.stop * size)


# ---------------------------------------------------------------- words

PHRASES: dict[str, tuple[str, str]] = {
    "background": ("What is the background colour?", "Which colour is behind everything?"),
    "shape": ("Which large shape is there?", "What is the large shape?"),
    "shape_colour": ("What colour is the large shape?", "Which colour does the large shape have?"),
    "digit": ("Which digit is handwritten on the stamp?", "What handwritten digit is there?"),
    "arrow": ("Which way does the arrow point?", "What is the direction of the arrow?"),
    "cell": ("Which cell of the grid is marked?", "Where is the mark in the grid?"),
    "pole": ("What colours are on the pole from top to bottom?", "Name the pole colours from top to bottom."),
    "pole_item": ("What is the {} colour of the pole from the top?", "Which colour is the {} band of the pole?"),
    "number": ("What number is on the sign?", "Which number does the sign show?"),
}
"""Two ways to ask, per family; the poster's questions are easy-VQA's own."""


def cell_name(grid: Grid) -> str:
    """How the marked cell is called, counting from 1."""
    return f"row {grid.row + 1} column {grid.column + 1}"


def _poster_question(poster: Poster, lots: random.Random) -> Question:
    """One of easy-VQA's questions; its three sorts (what shape, what colour, yes or no) come equally often."""
    sorts: dict[str, list[tuple[str, str]]] = {}
    for text, answer in poster.questions:
        sort = "truth" if answer in ("yes", "no") else "kind" if answer in sources.POSTER_KINDS else "colour"
        sorts.setdefault(sort, []).append((text, answer))
    text, answer = lots.choice(sorts[lots.choice(sorted(sorts))])
    return Question("poster", f"In the poster, {text}", answer)


def questions(scene: Scene, lots: random.Random, posters: int = 1, bands: int = 1) -> list[Question]:
    """One question of every family that applies to ``scene``, in random order and random phrasing.

    Args:
        posters: how many of easy-VQA's questions to ask about the poster (repetitions are dropped).
        bands: about how many bands of the pole to ask by position.
    """
    asked: list[Question] = []

    def ask(family: str, answer: str, *words: str) -> None:
        asked.append(Question(family, lots.choice(PHRASES[family]).format(*words), answer))

    if scene.has_background:
        ask("background", scene.background)
    for quadrant in scene.quadrants:
        if isinstance(quadrant, Poster):
            asked.extend(dict.fromkeys(_poster_question(quadrant, lots) for _ in range(posters)))
        elif isinstance(quadrant, Grid):
            ask("cell", cell_name(quadrant))
        elif isinstance(quadrant, Signs):
            first = lots.randrange(BANDS)
            ask("number", quadrant.number)
            ask("pole", " ".join(quadrant.bands))
            for item in range(first, first + bands):
                ask("pole_item", quadrant.bands[item % BANDS], ORDINALS[item % BANDS])
        else:
            ask("shape", quadrant.shape.name)
            ask("shape_colour", quadrant.shape.colour)
            ask("digit", quadrant.scan.name)
            ask("arrow", quadrant.arrow.name)
    lots.shuffle(asked)
    return asked


def caption(scene: Scene, lots: random.Random) -> str:
    """Everything in the scene in short sentences, in random order."""
    parts = [f"The background is {scene.background}."] if scene.has_background else []
    for quadrant in scene.quadrants:
        if isinstance(quadrant, Poster):
            parts.append(f"The poster shows a {quadrant.colour} {quadrant.kind}.")
        elif isinstance(quadrant, Grid):
            parts.append(f"The marked cell is {cell_name(quadrant)}.")
        elif isinstance(quadrant, Signs):
            parts.append(f"The sign shows {quadrant.number}.")
            parts.append(f"The pole is {' '.join(quadrant.bands)}.")
        else:
            parts.append(f"The large shape is a {quadrant.shape.colour} {quadrant.shape.name}.")
            parts.append(f"The handwritten digit is {quadrant.scan.name}.")
            parts.append(f"The arrow points {quadrant.arrow.name}.")
    lots.shuffle(parts)
    return " ".join(parts)


def description(scene: Scene, lots: random.Random) -> str:
    """The scene as terse notes in random order: what the language warm-up reads in place of the image.

    Sequences come either whole ("sign 4 7 2") or item by item in any order ("sign third 2 ; sign first 4 ..."), so that
    a reader learns both to copy and to look up by position.
    """
    parts = [f"background {scene.background}"] if scene.has_background else []
    for quadrant in scene.quadrants:
        if isinstance(quadrant, Poster):
            parts.append(f"poster {quadrant.colour} {quadrant.kind}")
        elif isinstance(quadrant, Grid):
            parts.append(f"marked {cell_name(quadrant)}")
        elif isinstance(quadrant, Signs):
            parts.extend(_sequence_notes("sign", tuple(quadrant.number), lots))
            parts.extend(_sequence_notes("pole", quadrant.bands, lots))
        else:
            parts.append(f"shape {quadrant.shape.colour} {quadrant.shape.name}")
            parts.append(f"handwritten {quadrant.scan.name}")
            parts.append(f"arrow {quadrant.arrow.name}")
    lots.shuffle(parts)
    return " ; ".join(parts)


def _sequence_notes(name: str, items: tuple[str, ...], lots: random.Random) -> list[str]:
    if lots.random() < 0.5:
        return [f"{name} {' '.join(items)}"]
    return [f"{name} {ORDINALS[place]} {item}" for place, item in enumerate(items)]
