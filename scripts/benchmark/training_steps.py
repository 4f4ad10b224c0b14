"""How much faster the steps of stages 3 and 4 are than the plain way, both sides in one run.

    python scripts/benchmark/training_steps.py [--threads 1] [--repeats 5] [--output ratios.json]

======================  ============================================  ====================================================
what                    ours                                          the plain way
======================  ============================================  ====================================================
multi-granularity step  tower once, one backward pass                 for each granularity: the model's own forward with
                                                                      labels (tower again, rows padded), then backward
RGLF step               the same without gradients, then the router   for each granularity: the model's own forward (tower
                                                                      again), row by row losses; then the router
router epoch            scores from a file, features of images        the RGLF step of ours on every batch
                        seen before kept in memory
scoring pass            questions about one image together, behind    the same rows, one question each, as padded batches;
                        one reading of what they share                the tower once per image on both sides
======================  ============================================  ====================================================

Sizes: the shipped micro model, and random models of the same recipe that are wider and deeper. Sides alternate; medians of this
process's CPU seconds are compared, so that other work on the machine counts little. `bound` is the ratio of the operations (matrix
products) of both sides: no implementation of the same arithmetic gets past it.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from llava.constants import IGNORE_INDEX
from llava.crops import pixel_table, pixel_values
from llava.model import LlavaLlamaForCausalLM
from llava.model.builder import load_pretrained_model
from llava.train.arguments import DataArguments
from llava.train.data import Collator, ConversationDataset, make_dataset
from llava.train.features import FeatureCache
from llava.train.losses import rglf_losses
from llava.train.objectives import (
    RouterSettings,
    evaluating,
    granularities,
    image_features,
    multi_granularity_loss,
    rglf_loss,
    score_rows,
)
from llava.train.scores import score_part
from llava.train.stages import STAGES, apply_stage

ROOT = Path(__file__).resolve().parents[2]
MICRO = ROOT / "playground" / "avg-llava-micro"
EVAL = ROOT / "playground" / "eval"
QUESTIONS_PER_ROW = 4
SIZES: dict[str, dict[str, int]] = {
    "micro": {},
    "wide (384, 6 layers)": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6},
    "wider (768, 8 layers)": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8},
}
"""Changes to the micro model's language model; its heads stay 32 wide."""


def write_rows(folder: Path, rows: int) -> tuple[Path, Path]:
    """The first images of the evaluation split as training rows: with several questions each, and each question as a row of its own."""
    asked: dict[str, list[dict[str, Any]]] = {}
    for line in (EVAL / "test.jsonl").read_text().splitlines():
        question = json.loads(line)
        asked.setdefault(question["image"], []).append(question)
    records, single = [], []
    for image, questions in list(asked.items())[:rows]:
        turns: list[dict[str, str]] = []
        for number, question in enumerate(questions[:QUESTIONS_PER_ROW]):
            turns += [
                {"from": "human", "value": ("" if number else "<image>\n") + question["text"]},
                {"from": "gpt", "value": question["answer"]},
            ]
        records.append({"id": image, "image": image, "conversations": turns})
        for question in questions:
            ask = {"from": "human", "value": "<image>\n" + question["text"]}
            single.append({"id": len(single), "image": image, "conversations": [ask, {"from": "gpt", "value": question["answer"]}]})
    paths = folder / "rows.json", folder / "questions.json"
    for path, written in zip(paths, (records, single), strict=True):
        path.write_text(json.dumps(written))
    return paths


def make_model(changes: dict[str, int]) -> tuple[Any, Any]:
    """The micro model, or a random one with changes to its language model, and the tokenizer."""
    tokenizer, model, _, _ = load_pretrained_model(str(MICRO), None, None, device="cpu", dtype=torch.float32)
    if changes:
        config = copy.deepcopy(model.config)
        for name, value in changes.items():
            setattr(config, name, value)
        config.num_attention_heads = config.num_key_value_heads = config.hidden_size // 32
        config.head_dim = 32
        model = LlavaLlamaForCausalLM(config)
    return tokenizer, model.train()


def values(model: Any, batch: dict[str, Any]) -> list[Tensor]:
    """The views of a batch as the model's own forward takes them."""
    table = pixel_table(model.get_vision_tower().image_processor)
    return [pixel_values(views, table) for views in batch["images"]]


def plain_losses(model: Any, batch: dict[str, Any], level: int) -> Any:
    """The model's own forward with labels: images encoded again, rows padded."""
    return model(
        batch["input_ids"],
        attention_mask=batch["attention_mask"],
        labels=batch["labels"],
        images=values(model, batch),
        image_sizes=batch["image_sizes"],
        vis_token_granularity=level,
    )


def plain_multi_granularity_step(model: Any, batch: dict[str, Any]) -> None:
    """Stage 3 as a loop: a forward and a backward pass for every granularity."""
    levels = granularities(model)
    for level in levels:
        (plain_losses(model, batch, level).loss / len(levels)).backward()


def multi_granularity_step(model: Any, batch: dict[str, Any]) -> None:
    """Stage 3 as it is trained."""
    multi_granularity_loss(model, batch, image_features(model, batch), RouterSettings()).loss.backward()


def _rows_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean loss of each row from logits (B, L, V) and labels (B, L) of the spliced rows, aligned at the end."""
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=IGNORE_INDEX
    )
    return losses.sum(1) / (labels != IGNORE_INDEX).sum(1)


def plain_rglf_step(model: Any, batch: dict[str, Any]) -> None:
    """Stage 4 online as a loop: tower and language model for every granularity, then the router."""
    columns = []
    images = values(model, batch)
    with torch.no_grad(), evaluating(model):
        for level in granularities(model):
            spliced = model.prepare_inputs_labels_for_multimodal(
                batch["input_ids"], None, batch["attention_mask"], None, batch["labels"], images, batch["image_sizes"], level
            )
            logits = model(inputs_embeds=spliced[4], attention_mask=spliced[2]).logits
            columns.append(_rows_of(logits, spliced[5]))
        features = image_features(model, batch)
    logits = model.route_logits(batch["input_ids"], batch["attention_mask"], batch["labels"], features)
    rglf_losses(logits, torch.stack(columns, dim=1), 1.0).total.mean().backward()


def rglf_step(model: Any, batch: dict[str, Any]) -> None:
    """Stage 4 online as it is trained."""
    with torch.no_grad():
        features = image_features(model, batch)
    rglf_loss(model, batch, features, RouterSettings()).loss.backward()


def operations(work: Callable[[], None]) -> int:
    """Floating-point operations of matrix products, attention included."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def compare(ours: Callable[[], None], plain: Callable[[], None], repeats: int) -> dict[str, float]:
    """Median seconds of two ways that take turns, their ratio, and the ratio of their operations."""
    bound = operations(plain) / operations(ours)
    seconds: dict[str, list[float]] = {"ours_s": [], "plain_s": []}
    for _ in range(repeats):
        for name, work in (("ours_s", ours), ("plain_s", plain)):
            began = time.process_time()
            work()
            seconds[name].append(time.process_time() - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {**medians, "ratio": medians["plain_s"] / medians["ours_s"], "bound": bound}


def compare_epochs(model: Any, dataset: Any, collator: Collator, batch_size: int) -> dict[str, float]:
    """One router epoch from scores with features kept in memory, against one that scores online."""
    batches = [list(range(start, min(start + batch_size, len(dataset)))) for start in range(0, len(dataset), batch_size)]
    cache = FeatureCache(2**34)
    known = []
    with torch.no_grad():
        for rows in batches:
            batch = collator([dataset[row] for row in rows])
            known.append(score_rows(model, batch, image_features(model, batch, cache)))
    losses, tokens = (torch.cat(parts) for parts in zip(*known, strict=True))
    settings = RouterSettings(scores=lambda rows: (losses[rows], tokens[rows]))
    began = time.process_time()
    for rows in batches:
        rglf_step(model, collator([dataset[row] for row in rows]))
    online = time.process_time() - began
    remembering = ConversationDataset(dataset.rows, replace(dataset.reader, cache=cache))
    began = time.process_time()
    for rows in batches:
        batch = collator([remembering[row] for row in rows])
        with torch.no_grad():
            features = image_features(model, batch, cache)
        rglf_loss(model, batch, features, settings).loss.backward()
    offline = time.process_time() - began
    return {"ours_s": offline, "plain_s": online, "ratio": online / offline}


@torch.no_grad()
def compare_scoring(model: Any, dataset: Any, collator: Collator, batch_size: int) -> dict[str, float]:
    """The offline pass over single questions: `score_part` against padded batches."""
    rows = range(len(dataset))
    began = time.process_time()
    ours = score_part(model, dataset, rows, batch_size, collator)
    shared = time.process_time() - began
    began = time.process_time()
    cache, found = FeatureCache(2**34), []
    for start in range(0, len(dataset), batch_size):
        batch = collator([dataset[row] for row in rows[start : start + batch_size]])
        found.append(score_rows(model, batch, image_features(model, batch, cache))[0])
    plain = time.process_time() - began
    gap = float((torch.tensor(ours["losses"].to_pylist()) - torch.cat(found)).abs().max())
    return {"ours_s": shared, "plain_s": plain, "ratio": plain / shared, "largest_difference": gap}


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every comparison at every size."""
    results = []
    path, single = write_rows(args.work, args.rows)
    for size, changes in SIZES.items():
        tokenizer, model = make_model(changes)
        model.config.tokenizer_model_max_length = model.config.context_length
        data_args = DataArguments(str(path), image_folder=str(EVAL))
        dataset = make_dataset(str(path), model, tokenizer, "v1", data_args)
        collator = Collator(tokenizer.pad_token_id or 0)
        for rows in args.batch_sizes:
            batch = collator([dataset[row] for row in range(rows)])
            for stage, ours, plain in (
                ("multi_granularity", multi_granularity_step, plain_multi_granularity_step),
                ("rglf", rglf_step, plain_rglf_step),
            ):
                apply_stage(model, STAGES[stage])
                found = compare(lambda: ours(model, batch), lambda: plain(model, batch), args.repeats)  # noqa: B023
                results.append({"what": f"{stage} step", "size": size, "batch": rows, **found})
                report(results[-1])
        apply_stage(model, STAGES["rglf"])
        results.append({"what": "router epoch", "size": size, "batch": 8, **compare_epochs(model, dataset, collator, 8)})
        report(results[-1])
        questions = make_dataset(str(single), model, tokenizer, "v1", data_args)
        results.append({"what": "scoring pass", "size": size, "batch": 8, **compare_scoring(model, questions, collator, 8)})
        report(results[-1])
    return results


def report(result: dict[str, Any]) -> None:
    """A line of the table."""
    print(
        f"{result['what']:<24} {result['size']:<22} batch {result['batch']:<3} ours {result['ours_s'] * 1e3:9.1f} ms   "
        f"plain {result['plain_s'] * 1e3:9.1f} ms   ratio {result['ratio']:5.2f}"
        + (f"   bound {result['bound']:5.2f}" if "bound" in result else ""),
        flush=True,
    )


def main() -> None:
    """Measure, print, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--work", type=Path, default=Path("."), help="where the rows are written")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    results = measure(args)
    if args.output:
        args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
