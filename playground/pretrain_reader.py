"""Reading warm-up of the micro model: the language model learns to read vectors, and the projector to write them.

The features of CLIP lie close to words; ours come from a tower that has never seen one. A language model that has only read
words takes very long to find out, through a fresh projector, that one vector among three hundred says "marked, row 2, column 3":
after 400 steps that asked nothing else it was still at chance. So both sides first learn a common code:

1. A table holds one vector per attribute (see ``world.ATTRIBUTES``), at first the embedding of its word. The stand-in for a patch
   is the sum of the vectors of what lies under it. The language model and the table learn together from conversations: about one
   view of a quadrant, then about miniatures, then about whole scenes, at every granularity.
2. The projector is fitted, without the language model, to turn the tower's features into those sums.

Run: ``python -m playground.pretrain_reader --language L --vision V --output R [flags of llava.train.train]``; the other flags say
what the model is made of. Writes the language model and ``mm_projector.safetensors``; run again to resume.
"""

from __future__ import annotations

import argparse
import logging
import random
import shutil
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from llava.constants import IGNORE_INDEX
from llava.conversation import conv_templates
from llava.train.build import load_model
from llava.train.checkpoint import save_projector
from llava.train.objectives import answer_losses, granularities
from llava.train.packing import pack
from llava.train.run import parse_arguments as parse_training_arguments
from llava.train.stages import part_of
from llava.train.targets import build_targets, place_images
from playground import common, pretrain_vision, world
from playground.make_data import conversation_record

log = logging.getLogger("playground.pretrain_reader")

SIDE = world.QUADRANT // world.PATCH
PIECES = ((1, 1), (2, 1), (1, 2))


@dataclass(frozen=True)
class Phase:
    """A part of the schedule: until which share of the steps, on which layouts, how many rows a step, whether an image is given as
    one view only, and between which levels (by place, coarse to fine) each step draws."""

    until: float
    layouts: tuple[tuple[int, int], ...]
    rows: int
    one_view: bool
    levels: tuple[int, ...]


PHASES = (
    Phase(0.30, ((1, 1),), 32, True, (2, 4, 4)),
    Phase(0.50, PIECES, 24, False, (0, 1, 2, 3, 4, 4)),
    Phase(1.00, ((2, 2),), 12, False, (0, 1, 2, 3, 4, 4)),
)
WHOLE_SCENES = PHASES[-1]


@dataclass(frozen=True)
class Reading:
    """A batch as ``llava.train.objectives`` takes it, labels of its images' views (C, 64, A) each, and the questions by row."""

    batch: dict[str, Any]
    labels: list[Tensor]
    questions: list[list[world.Question]]


def view_labels(scene: world.Scene, one_view: bool) -> Tensor:
    """What lies under the patches of a scene's views, (C, 64, NUM_ATTRIBUTES): the squeezed whole, then the tiles; of one view, the
    image itself."""
    labels = world.patch_labels(scene)
    if one_view:
        return torch.from_numpy(labels).flatten(0, 1)[None].float()
    tiles = labels.reshape(scene.rows, SIDE, scene.columns, SIDE, -1).swapaxes(1, 2).reshape(-1, SIDE * SIDE, world.NUM_ATTRIBUTES)
    whole = labels.reshape(SIDE, scene.rows, SIDE, scene.columns, -1).max(axis=(1, 3)).reshape(1, SIDE * SIDE, -1)
    return torch.from_numpy(np.concatenate([whole, tiles])).float()


def make_reading(name: str, phase: Phase, tokenizer: PreTrainedTokenizerBase, seed: int, split: str = "train") -> Reading:
    """A batch of conversations with every question about each scene, about all four bands of the pole and with two about the poster."""
    lots = random.Random(f"{seed}/reader/{split}/{name}")
    template = conv_templates["v1"]
    targets, labels, sizes, asked = [], [], [], []
    for _ in range(phase.rows):
        scene = world.make_scene(split, lots.randrange(1 << 40), seed=seed, layout=lots.choice(phase.layouts))
        questions = world.questions(scene, lots, posters=2, bands=world.BANDS)
        turns = conversation_record("", "", questions)["conversations"]
        targets.append(build_targets(place_images(turns, 1, template.version, False), template, tokenizer))
        labels.append(view_labels(scene, phase.one_view))
        sizes.append((world.QUADRANT * scene.columns, world.QUADRANT * scene.rows))
        asked.append(questions)
    ids = [torch.tensor(row.input_ids) for row in targets]
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True),
        "labels": pad_sequence([torch.tensor(row.labels) for row in targets], batch_first=True, padding_value=IGNORE_INDEX),
        "attention_mask": pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in ids], batch_first=True),
        "images": labels,
        "image_sizes": sizes,
        "images_per_row": [1] * phase.rows,
    }
    return Reading(batch, labels, asked)


def word_table(model: Any, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The table's start, (NUM_ATTRIBUTES, D): each attribute's word, moved by a random vector of its group."""
    words = model.get_input_embeddings().weight.detach()
    rows = []
    for names in world.ATTRIBUTES.values():
        group = 0.2 * torch.randn(words.shape[1])
        for name in names:
            rows.append(0.7 * words[tokenizer(name, add_special_tokens=False)["input_ids"]].mean(0) + group)
    return torch.stack(rows)


def _answer_spans(labels: Tensor) -> list[tuple[int, int]]:
    """(first, last + 1) of each stretch of supervised positions of one row (L,)."""
    edges = torch.diff((labels != IGNORE_INDEX).int(), prepend=torch.zeros(1), append=torch.zeros(1))
    return list(zip((edges > 0).nonzero().flatten().tolist(), (edges < 0).nonzero().flatten().tolist(), strict=True))


@torch.inference_mode()
def exact_match(model: Any, features: Sequence[Tensor], reading: Reading, level: int) -> dict[str, float]:
    """Share of the questions, per family, whose every answer token is the likeliest one at one granularity."""
    keys = ("input_ids", "attention_mask", "labels")
    sequences = model.splice_levels(*(reading.batch[key] for key in keys), features, reading.batch["image_sizes"], [level])[0]
    packed = pack(sequences)
    hidden = model.model(
        inputs_embeds=packed.inputs_embeds, attention_mask=None, position_ids=packed.position_ids, use_cache=False
    ).last_hidden_state
    likeliest = model.lm_head(hidden).argmax(-1)
    hits: dict[str, list[bool]] = defaultdict(list)
    for number, questions in enumerate(reading.questions):
        own = packed.owners == number
        labels, said = packed.labels[own], likeliest[own]
        for question, (first, end) in zip(questions, _answer_spans(labels), strict=True):
            hits[question.family].append(bool((said[first - 1 : end - 1] == labels[first:end]).all()))
    return {family: sum(rights) / len(rights) for family, rights in sorted(hits.items())}


def _phase_at(step: int, steps: int) -> Phase:
    return next(phase for phase in PHASES if step < phase.until * steps or phase is WHOLE_SCENES)


def learn_to_read(model: Any, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> Tensor:
    """Train the language model, the newline vector and the table together, resuming from the state in the output folder.

    Returns:
        The table, (NUM_ATTRIBUTES, D).
    """
    torch.manual_seed(args.seed)
    table = nn.Parameter(word_table(model, tokenizer))
    parameters = {name: parameter for name, parameter in model.named_parameters() if part_of(name) in ("llm", "newline")}
    optimizer = torch.optim.AdamW([*parameters.values(), table], weight_decay=0.0, betas=(0.9, 0.98), fused=True)
    state_path, first = args.output / "state.pt", 0
    state = common.load_state(state_path)
    if state is not None:
        model.load_state_dict(state["model"], strict=False)
        table.data.copy_(state["table"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    levels = granularities(model)
    model.train()
    began = time.monotonic()
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, desc="reading", mininterval=10)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = common.cosine_rate(step, args.steps, args.learning_rate, warmup=50)
        phase = _phase_at(step, args.steps)
        reading = make_reading(str(step), phase, tokenizer, args.seed)
        level = levels[phase.levels[random.Random(f"{args.seed}/level/{step}").randrange(len(phase.levels))]]
        answers = answer_losses(model, reading.batch, [labels @ table for labels in reading.labels], [level])
        loss = answers.sums.sum() / answers.labels.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([*parameters.values(), table], 1.0)
        optimizer.step()
        speed = (step + 1 - first) / (time.monotonic() - began)
        bar.set_postfix(loss=f"{loss.item():.3f}", steps_per_s=f"{speed:.2f}", refresh=False)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            trained = {name: parameter.detach() for name, parameter in parameters.items()}
            common.save_atomically(
                {"model": trained, "table": table.detach(), "optimizer": optimizer.state_dict(), "step": step + 1}, state_path
            )
            _report(model, table.detach(), phase, tokenizer, args.seed, step + 1)
    return table.detach()


def _report(model: Any, table: Tensor, phase: Phase, tokenizer: PreTrainedTokenizerBase, seed: int, step: int) -> None:
    reading = make_reading("report", phase, tokenizer, seed, split="validation")
    features = [labels @ table for labels in reading.labels]
    for level in granularities(model)[:: len(granularities(model)) - 1]:
        scores = exact_match(model, features, reading, level)
        log.info("step %d, %d tokens per view: %s", step, level, ", ".join(f"{f} {100 * s:.0f}" for f, s in scores.items()))


def fit_projector(model: Any, table: Tensor, args: argparse.Namespace) -> float:
    """Fit the projector to turn the tower's features into the table's sums.

    Returns:
        Mean squared distance on fresh train views, as a share of the sums' variance.
    """
    tower, projector = model.get_vision_tower(), model.model.mm_projector
    common.scaled_init(projector)
    code = torch.cat([table, table.new_zeros(1, table.shape[1])])
    weights = pretrain_vision.attribute_weights(pretrain_vision.make_batch(-1, 64, args.seed)[1])
    optimizer = torch.optim.AdamW(projector.parameters(), weight_decay=0.0, betas=(0.9, 0.98), fused=True)

    def distance(step: int) -> Tensor:
        pixels, labels = pretrain_vision.make_batch(step, 12, args.seed)
        with torch.no_grad():
            features = tower(pixels)
        return pretrain_vision.distance_to_code(projector(features), labels, weights, code)

    bar = tqdm(range(args.projector_steps), desc="projector", mininterval=10)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = common.cosine_rate(step, args.projector_steps, 3e-3, warmup=20)
        away = distance(1_000_000 + step)
        optimizer.zero_grad(set_to_none=True)
        away.backward()
        optimizer.step()
        bar.set_postfix(distance=f"{away.item():.4f}", refresh=False)
    with torch.no_grad():
        return distance(2_000_000).item()


def save_reader(model: Any, args: argparse.Namespace) -> None:
    """Write the language model with its tokenizer as a plain Llama folder, and the projector beside it."""
    plain = LlamaForCausalLM.from_pretrained(args.language)
    own = model.state_dict()
    plain.load_state_dict({name: own[name] for name in plain.state_dict()})
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(args.language / name, args.output / name)
    save_projector(own, args.output)
    plain.save_pretrained(args.output)


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Command line of the reading warm-up, and the flags that are the training program's."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--language", type=Path, default=Path("playground/build/language"))
    parser.add_argument("--vision", type=Path, default=Path("playground/build/vision"))
    parser.add_argument("--output", type=Path, default=Path("playground/build/reader"))
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--projector-steps", type=int, default=300)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_known_args()


def main() -> None:
    """Train the reader, fit the projector, and save both."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    args, rest = parse_arguments()
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    flags = ["--stage", "align", "--model_name_or_path", str(args.language), "--vision_tower", str(args.vision)]
    fixed = ["--data_path", "none", "--output_dir", str(args.output), "--use_cpu", "--report_to", "none"]
    model, tokenizer = load_model(*parse_training_arguments([*flags, *fixed, *rest]))
    table = learn_to_read(model, tokenizer, args)
    log.info("the projector is %.4f of the variance away from the table", fit_projector(model, table, args))
    save_reader(model, args)
    log.info("saved %s", args.output)


if __name__ == "__main__":
    main()
