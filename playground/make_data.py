"""Write the micro world as LLaVA data: images, captions, conversations, and question files.

Run: ``python -m playground.make_data --output playground/build/data`` (``--part eval`` writes the committed evaluation
split, ``--part samples`` the sample images). Image paths in the files are relative to the output folder.

======================  =====================================================================================
``stage1.json``         captions ("<image>" and what it shows, template ``plain``)
``instruct.json``       conversations with every question about an image, in random order
``stage4.json``         one question per row about other full scenes, with its ``family``
``validation.jsonl``    questions with ``question_id, image, text, answer, family`` on the validation split
``test.jsonl``          the same on the test split
======================  =====================================================================================

The first two are about the same images: full scenes (128x128), pairs of quadrants (128x64 or 64x128) and miniatures (64x64).
"""

from __future__ import annotations

import argparse
import json
import logging
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from playground import world

log = logging.getLogger("playground.make_data")

FULL = ((2, 2),)
PAIRS = ((2, 1), (1, 2))
MINIATURES = ((1, 1),)
FIRST_STAGE4_SCENE = 1_000_000
FIRST_SAMPLE_SCENE = 2_000_000
FIRST_QUESTION_ID = {"validation": 1_000_000, "test": 2_000_000}
SAMPLES = (("beige", 0), ("olive", 1), ("pink", 2))

Record = dict[str, Any]


def _save(image: Image.Image, folder: Path, name: str, optimize: bool = False) -> str:
    """Write ``image`` to folder/name and return ``name``."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, optimize=optimize)
    return name


def _write_json(records: list[Record], path: Path) -> None:
    path.write_text(json.dumps(records, ensure_ascii=False, indent=0) + "\n")
    log.info("%s: %d rows", path, len(records))


def _write_lines(records: Iterable[Record], path: Path) -> None:
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("\n".join(lines) + "\n")
    log.info("%s: %d questions", path, len(lines))


def caption_record(name: str, image: str, scene: world.Scene, lots: random.Random) -> Record:
    """A stage 1 row: the image and its caption."""
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": world.caption(scene, lots)}]
    return {"id": f"caption-{name}", "image": image, "conversations": turns}


def conversation_record(name: str, image: str, questions: Iterable[world.Question]) -> Record:
    """A stage 2 and 3 row: the questions about one image in one conversation."""
    turns: list[dict[str, str]] = []
    for question in questions:
        opening = "" if turns else "<image>\n"
        turns.append({"from": "human", "value": opening + question.text})
        turns.append({"from": "gpt", "value": question.answer})
    return {"id": name, "image": image, "conversations": turns}


def single_question_records(name: str, image: str, scene: world.Scene, lots: random.Random) -> list[Record]:
    """Stage 4 rows: one question each, with its family."""
    return [
        {"id": f"{name}-{question.family}", "image": image, "family": question.family,
         "conversations": [{"from": "human", "value": f"<image>\n{question.text}"},
                           {"from": "gpt", "value": question.answer}]}
        for question in world.questions(scene, lots)
    ]


def write_images(kind: str, count: int, layouts: tuple[tuple[int, int], ...], output: Path,
                   seed: int) -> tuple[list[Record], list[Record]]:
    """Write ``count`` images; return their captions and their conversations."""
    lots = random.Random(f"{seed}/data/{kind}")
    captions, conversations = [], []
    for number in tqdm(range(count), desc=kind, mininterval=5):
        scene = world.make_scene("train", number, seed=seed, layout=layouts[number % len(layouts)])
        name = f"{kind}-{number:06d}"
        image = _save(world.render(scene), output, f"images/{kind}/{number:06d}.png")
        captions.append(caption_record(name, image, scene, lots))
        conversations.append(conversation_record(name, image, world.questions(scene, lots, posters=2)))
    return captions, conversations


def write_stage4(count: int, output: Path, seed: int) -> None:
    """Write ``count`` further train scenes, one row per question."""
    lots = random.Random(f"{seed}/data/stage4")
    rows: list[Record] = []
    for number in tqdm(range(count), desc="stage4", mininterval=5):
        scene = world.make_scene("train", FIRST_STAGE4_SCENE + number, seed=seed)
        image = _save(world.render(scene), output, f"images/stage4/{number:06d}.png")
        rows.extend(single_question_records(f"stage4-{number:06d}", image, scene, lots))
    _write_json(rows, output / "stage4.json")


def write_questions(split: str, count: int, output: Path, seed: int, folder: str) -> None:
    """Write ``count`` scenes of ``split`` and one question per family and scene to ``<split>.jsonl``."""
    lots = random.Random(f"{seed}/data/{split}")
    records: list[Record] = []
    for number in tqdm(range(count), desc=split, mininterval=5):
        scene = world.make_scene(split, number, seed=seed)
        image = _save(world.render(scene), output, f"{folder}/{number:03d}.png", optimize=True)
        for question in world.questions(scene, lots):
            records.append({"question_id": FIRST_QUESTION_ID[split] + len(records), "image": image,
                            "text": question.text, "answer": question.answer, "family": question.family})
    _write_lines(records, output / f"{split}.jsonl")


def write_samples(output: Path, seed: int) -> None:
    """Write three images that are in no other file, and ``samples.json`` with every question about them."""
    records = []
    for background, place in SAMPLES:
        lots = random.Random(f"{seed}/data/samples/{place}")
        scene = next(scene for scene in (world.make_scene("test", FIRST_SAMPLE_SCENE + number, seed=seed)
                                         for number in range(place, 10_000, len(SAMPLES)))
                     if scene.background == background)
        image = _save(world.render(scene), output, f"scene_{background}.png", optimize=True)
        records.append({"image": image, "questions": [
            {"family": question.family, "text": question.text, "answer": question.answer}
            for question in world.questions(scene, lots)]})
    (output / "samples.json").write_text(json.dumps(records, indent=1) + "\n")


def write_training_data(args: argparse.Namespace) -> None:
    """Write every file of the table above."""
    captions: list[Record] = []
    conversations: list[Record] = []
    for kind, count, layouts in (("scenes", args.scenes, FULL), ("pairs", args.pairs, PAIRS),
                                 ("miniatures", args.miniatures, MINIATURES)):
        captioned, asked = write_images(kind, count, layouts, args.output, args.seed)
        captions += captioned
        conversations += asked
    for records, name in ((captions, "stage1"), (conversations, "instruct")):
        random.Random(f"{args.seed}/data/{name}").shuffle(records)
        _write_json(records, args.output / f"{name}.json")
    write_stage4(args.stage4, args.output, args.seed)
    write_questions("validation", args.validation, args.output, args.seed, "images/validation")
    write_questions("test", args.test, args.output, args.seed, "images/test")


def parse_arguments() -> argparse.Namespace:
    """Command line of the data writer."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("playground/build/data"))
    parser.add_argument("--part", choices=("training", "eval", "samples"), default="training",
                        help="training: every file; eval: the test split alone; samples: three sample images")
    parser.add_argument("--scenes", type=int, default=8_000)
    parser.add_argument("--pairs", type=int, default=1_000)
    parser.add_argument("--miniatures", type=int, default=1_000)
    parser.add_argument("--stage4", type=int, default=400, help="images; ten rows each")
    parser.add_argument("--validation", type=int, default=200)
    parser.add_argument("--test", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Write the asked part."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = parse_arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    if args.part == "training":
        write_training_data(args)
    elif args.part == "eval":
        write_questions("test", args.test, args.output, args.seed, "images")
    else:
        write_samples(args.output, args.seed)


if __name__ == "__main__":
    main()
