"""Language warm-up of the micro model: teach a small Llama the format, the vocabulary, and to look things up.

The real model starts from Vicuna. Here a Llama from scratch reads v1 conversations in which terse notes in random order
stand where the image will be ("sign 4 7 2 ; background blue ; ..."), and learns to answer from them: to copy a
sequence, and to find the item a question names. Loss on answers, plus captions from notes and captions alone.

Run: ``python -m playground.pretrain_language --output playground/build/language``; run again to resume.
"""

from __future__ import annotations

import argparse
import logging
import random
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from playground import common, world
from playground.tokenizer import CONTEXT, SYSTEM_PROMPT, load_tokenizer, train_tokenizer

log = logging.getLogger("playground.pretrain_language")

IGNORE = -100
EASY_SHARE = 0.3
"""Share of the steps, from the start, that see miniatures only."""
LONGEST_GAP = 60
"""Most positions skipped after one note. An image spends hundreds of tokens where notes spend eighty; gaps make the
model look things up across such distances."""


@dataclass(frozen=True)
class Row:
    """One training text: token ids, labels (IGNORE where nothing is asked), positions, and per answer its family and
    the (first, last) range of its tokens."""

    ids: list[int]
    labels: list[int]
    positions: list[int]
    answers: list[tuple[str, int, int]]


def language_config(vocabulary: int) -> LlamaConfig:
    """The micro language model: a stock Llama of four layers, 192 wide (a multiple of 64, as 4-bit weights want it)."""
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=6, max_position_embeddings=CONTEXT, rms_norm_eps=1e-5, tie_word_embeddings=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )


def _encode(pieces: list[tuple[str, str | None]], tokenizer: PreTrainedTokenizerBase,
            gaps: random.Random | None) -> Row:
    """Tokenize text given as (piece, family or None); pieces with a family are answers and carry the loss."""
    text = "".join(piece for piece, _ in pieces)
    encoded = tokenizer(text, return_offsets_mapping=True)
    ids, ends = encoded["input_ids"], [end for _, end in encoded["offset_mapping"]]
    labels, answers = [IGNORE] * len(ids), []
    token, edge = 0, 0
    for piece, family in pieces:
        edge += len(piece)
        first = token
        while token < len(ids) and ends[token] <= edge:
            token += 1
        if family is not None:
            labels[first:token] = ids[first:token]
            answers.append((family, first, token))
    return Row(ids, labels, _positions(ids, tokenizer, gaps), answers)


def _positions(ids: list[int], tokenizer: PreTrainedTokenizerBase, gaps: random.Random | None) -> list[int]:
    """0, 1, 2 ..., with random gaps after the notes' semicolons where ``gaps`` is given."""
    semicolon = tokenizer.convert_tokens_to_ids("▁;")
    positions, here = [], 0
    longest = gaps.randrange(LONGEST_GAP) if gaps else 0
    for token in ids:
        positions.append(here)
        here += 1 + (gaps.randint(0, longest) if gaps and token == semicolon else 0)
    return positions


def conversation_row(scene: world.Scene, lots: random.Random, tokenizer: PreTrainedTokenizerBase,
                     gaps: bool = True) -> Row:
    """A v1 conversation: the notes where the image goes, then every question of the scene with its answer."""
    pieces: list[tuple[str, str | None]] = []
    opening = f"{SYSTEM_PROMPT} USER: {world.description(scene, lots)}\n"
    for question in world.questions(scene, lots, posters=2):
        pieces.append((f"{opening}{question.text} ASSISTANT:", None))
        pieces.append((f" {question.answer}</s>", question.family))
        opening = "USER: "
    return _encode(pieces, tokenizer, lots if gaps and lots.random() < 0.6 else None)


def caption_row(scene: world.Scene, lots: random.Random, tokenizer: PreTrainedTokenizerBase) -> Row:
    """A caption, from notes two times in three, else as plain text."""
    caption = f" {world.caption(scene, lots)}</s>"
    notes = [(world.description(scene, lots), None)] if lots.random() < 0.67 else []
    return _encode([*notes, (caption, "caption")], tokenizer, None)


def make_batch(step: int, args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """Rows of about ``args.tokens`` tokens: miniatures first, later mostly full scenes; one in eight captions."""
    lots = random.Random(f"{args.seed}/language/{step}")
    easy = step < EASY_SHARE * args.steps
    layouts = ((1, 1), (2, 1)) if easy else ((2, 1), (2, 2), (2, 2), (2, 2))
    rows: list[Row] = []
    while sum(len(row.ids) for row in rows) < args.tokens:
        scene = world.make_scene("train", lots.randrange(1 << 40), seed=args.seed, layout=lots.choice(layouts))
        rows.append((caption_row if lots.random() < 0.125 else conversation_row)(scene, lots, tokenizer))
    return rows


def _pad(rows: list[list[int]], value: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def answer_logits(model: LlamaForCausalLM, rows: list[Row]) -> tuple[Tensor, Tensor]:
    """Logits (N, V) and targets (N,) at the N labelled tokens of a batch, row by row."""
    ids, labels = _pad([row.ids for row in rows], 0), _pad([row.labels for row in rows], IGNORE)
    positions = _pad([row.positions for row in rows], 0)
    mask = _pad([[1] * len(row.ids) for row in rows], 0)
    hidden = model.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)[0]
    asked = labels[:, 1:] != IGNORE
    return model.lm_head(hidden[:, :-1][asked]), labels[:, 1:][asked]


@torch.inference_mode()
def exact_match(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, seed: int,
                scenes: int = 60) -> dict[str, float]:
    """Share of validation questions, per family and in all, whose every answer token is the likeliest one: what greedy
    decoding after the true earlier turns would produce."""
    lots = random.Random(f"{seed}/language/validation")
    rows = [conversation_row(world.make_scene("validation", k, seed=seed), lots, tokenizer, gaps=False)
            for k in range(scenes)]
    right, asked = Counter[str](), Counter[str]()
    for row in rows:
        logits, targets = answer_logits(model, [row])
        hits = (logits.argmax(-1) == targets).tolist()
        for family, first, last in row.answers:
            mine, hits = hits[: last - first], hits[last - first:]
            for name in (family, "all"):
                asked[name] += 1
                right[name] += all(mine)
    return {name: right[name] / asked[name] for name in (*world.FAMILIES, "all")}


def train(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """Train until ``args.steps``, resuming from the state in the output folder."""
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(language_config(len(tokenizer)))
    common.scaled_init(model)
    optimizer = torch.optim.AdamW(common.decayed_groups([model], 0.05), betas=(0.9, 0.98), fused=True)
    state_path = args.output / "state.pt"
    state, first = common.load_state(state_path), 0
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    began, tokens = time.monotonic(), 0
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, desc="language", mininterval=10)
    for step in bar:
        rate = common.cosine_rate(step, args.steps, args.learning_rate, warmup=100)
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = make_batch(step, args, tokenizer)
        loss = functional.cross_entropy(*answer_logits(model, rows))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        tokens += sum(len(row.ids) for row in rows)
        speed = tokens / (time.monotonic() - began)
        bar.set_postfix(loss=f"{loss.item():.3f}", tokens_per_s=f"{speed:.0f}", refresh=False)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            common.save_atomically(state, state_path)
            scores = exact_match(model, tokenizer, args.seed)
            log.info("step %d loss %.3f exact match: %s", step + 1, loss.item(),
                     ", ".join(f"{family} {100 * score:.0f}" for family, score in scores.items()))
    return model


def parse_arguments() -> argparse.Namespace:
    """Command line of the language warm-up."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("playground/build/language"))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Train the tokenizer where there is none, then train and save the language model beside it."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    if not (args.output / "tokenizer.model").exists():
        train_tokenizer(args.output, seed=args.seed)
    model = train(args, load_tokenizer(args.output))
    model.generation_config.update(eos_token_id=2, pad_token_id=0, bos_token_id=1)
    model.save_pretrained(args.output)
    log.info("saved %s", args.output)


if __name__ == "__main__":
    main()
