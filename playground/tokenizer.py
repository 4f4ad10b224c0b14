"""The micro model's tokenizer: a SentencePiece BPE model trained on the world's own text, digits split.

Run: ``python -m playground.tokenizer --output playground/build/tokenizer``.
"""

from __future__ import annotations

import argparse
import io
import json
import random
from pathlib import Path

import sentencepiece
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from playground import world

SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
"""What every v1 conversation opens with (the words of Vicuna v1.1)."""
VOCABULARY = 640
CONTEXT = 2048
EXTRA_SENTENCES = (
    "What is in the picture?", "Describe the picture.", "What do you see?", "How many are there?", "Is it red?",
    "There is no such thing here.", "I do not know.", "Yes.", "No.", "Hello!", "Thank you.", "<image>",
)


def world_text(rows: int, seed: int = 0) -> list[str]:
    """Sentences to train on: the system prompt, and questions, answers, captions and notes of ``rows`` train scenes.

    A bar stands for the line break and the end-of-sequence token after which words come without a leading space: being
    punctuation it never joins a piece, so "What" and "USER" become pieces as well as " What" and " USER".
    """
    lots = random.Random(f"{seed}/tokenizer")
    lines = [SYSTEM_PROMPT] * (6 * rows) + ["|USER: ASSISTANT:"] * rows + list(EXTRA_SENTENCES) * (rows // 20)
    for number in range(rows):
        scene = world.make_scene("train", number, seed=seed)
        lines += [world.caption(scene, lots), world.description(scene, lots)]
        for question in world.questions(scene, lots):
            lines.append(f"USER: {question.text} ASSISTANT: {question.answer}")
            lines.append(f"|{question.text}")
    return lines


def train_tokenizer(output: Path, vocabulary: int = VOCABULARY, rows: int = 2000, seed: int = 0) -> None:
    """Train and write ``tokenizer.model`` and ``tokenizer_config.json`` into ``output``."""
    output.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(world_text(rows, seed)), model_writer=model, vocab_size=vocabulary, model_type="bpe",
        split_digits=True, byte_fallback=True, character_coverage=1.0, normalization_rule_name="identity",
        remove_extra_whitespaces=False, num_threads=1, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
    )
    (output / "tokenizer.model").write_bytes(model.getvalue())
    config = {
        "tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, "add_eos_token": False,
        "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>",
        "padding_side": "right", "model_max_length": CONTEXT, "clean_up_tokenization_spaces": False,
        "sp_model_kwargs": {},
    }
    (output / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in ``folder``, as any user would load it."""
    return AutoTokenizer.from_pretrained(folder)


def main() -> None:
    """Command line of the tokenizer trainer."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("playground/build/tokenizer"))
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train_tokenizer(args.output, args.vocabulary, seed=args.seed)


if __name__ == "__main__":
    main()
