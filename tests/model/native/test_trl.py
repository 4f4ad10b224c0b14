"""TRL's trainers as their documentation calls them, on a native folder given by its name: every form of data, with and without LoRA; and
the block of docs/Coming_from_transformers.md.

The micro model learns answers that it would never give, so that the loss has far to fall.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from llava.constants import MICRO_MODEL
from llava.tools.native_checkpoint import to_native
from tests.micro import llava_micro_folder

pytestmark = pytest.mark.slow

EVAL = MICRO_MODEL.parent / "eval"
ROWS = [json.loads(line) for line in (EVAL / "test.jsonl").read_text().splitlines()][:8]
QUESTIONS = [row["text"] for row in ROWS]
ANSWERS = [f"a purple elephant number {place}" for place in range(len(ROWS))]
RIGHT = [str(row["answer"]) for row in ROWS]


def turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def asked() -> list[list[dict[str, str]]]:
    return [[turn("user", question)] for question in QUESTIONS]


def answered(answers: list[str]) -> list[list[dict[str, str]]]:
    return [[turn("assistant", answer)] for answer in answers]


FORMS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [question + answer for question, answer in zip(asked(), answered(ANSWERS), strict=True)]},
    "text": {"text": [f"USER: <image>\n{question} ASSISTANT: {answer}</s>" for question, answer in zip(QUESTIONS, ANSWERS, strict=True)]},
    "prompt and completion": {"prompt": asked(), "completion": answered(ANSWERS)},
    "preferences": {"prompt": asked(), "chosen": answered(ANSWERS), "rejected": answered(RIGHT)},
}


def dataset(form: str) -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"images": [[Image.open(EVAL / row["image"]).convert("RGB")] for row in ROWS], **FORMS[form]})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("trl") / "native"
    to_native(llava_micro_folder(), made)
    return made


def trainer(folder: Path, output: Path, form: str, lora: bool, **options: Any) -> Any:
    from peft import LoraConfig  # these take seconds to import
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    kind, config = (DPOTrainer, DPOConfig) if form == "preferences" else (SFTTrainer, SFTConfig)
    args = config(
        output_dir=str(output),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=2e-3 if lora else 3e-4,
        logging_steps=1,
        max_length=None,  # TRL cuts at 1,024 tokens by default, and an image's tokens are only counted in the model
        remove_unused_columns=form != "text",  # of data with images, TRL would drop the text
        report_to="none",
        use_cpu=True,
        bf16=False,
        **options,
    )
    adapter = LoraConfig(r=8, target_modules="all-linear") if lora else None
    return kind(model=str(folder), args=args, train_dataset=dataset(form), peft_config=adapter)


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
@pytest.mark.parametrize("form", FORMS)
def test_the_loss_falls(folder: Path, tmp_path: Path, form: str, lora: bool) -> None:
    trained = trainer(folder, tmp_path, form, lora)
    assert trained.args.gradient_checkpointing
    trained.train()
    losses = [step["loss"] for step in trained.state.log_history if "loss" in step]
    assert len(losses) == 6 and losses[-1] < 0.8 * losses[0], losses


def test_what_it_saves_is_a_folder_again(folder: Path, tmp_path: Path) -> None:
    trained = trainer(folder, tmp_path, "prompt and completion", False, num_train_epochs=1)
    trained.train()
    trained.save_model(str(tmp_path / "saved"))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "saved")
    image = {"type": "image", "path": str(EVAL / ROWS[0]["image"])}
    chat = [{"role": "user", "content": [image, {"type": "text", "text": QUESTIONS[0]}]}]
    inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        found, expected = model(**inputs).logits, trained.model.eval()(**inputs).logits
    assert torch.equal(found, expected)


def test_an_answer_has_the_ids_that_a_conversation_gives_it(folder: Path, tmp_path: Path) -> None:
    """All of a form's data, and what the trainer makes of it, against the processor's own words."""
    processor = AutoProcessor.from_pretrained(folder)
    forms = ("messages", "prompt and completion")
    batches = {form: trainer(folder, tmp_path, form, False).data_collator(list(dataset(form))) for form in forms}
    for row, (question, answer) in enumerate(zip(QUESTIONS, ANSWERS, strict=True)):
        image = {"type": "image", "path": str(EVAL / ROWS[row]["image"])}
        chat = [{"role": "user", "content": [image, {"type": "text", "text": question}]}, turn("assistant", answer)]
        expected = processor.apply_chat_template(chat, tokenize=True)[0]
        for form, batch in batches.items():
            ids = batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()
            assert ids == expected, form
    labels = batches["prompt and completion"]["labels"]
    said = [processor.decode(row[row >= 0]).replace(" ", "") for row in labels]
    assert said == [f"{answer}</s>".replace(" ", "") for answer in ANSWERS]


def test_the_block_of_the_page_runs_as_pasted(folder: Path, tmp_path: Path) -> None:
    root = MICRO_MODEL.parents[1]
    page = (root / "docs" / "Coming_from_transformers.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE) if "SFTTrainer" in block)
    (tmp_path / "micro-native").symlink_to(folder)
    (tmp_path / "playground").symlink_to(root / "playground")
    environment = {**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "tuned" / "adapter_model.safetensors").is_file()


def test_the_router_sees_no_answer(folder: Path, tmp_path: Path) -> None:
    """TRL calls the model without its head and without labels: the level is the prompt's, of what is preferred and what is rejected."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    batch = trainer(folder, tmp_path, "preferences", False).data_collator(list(dataset("preferences")))
    batch.pop("completion_mask")
    chats = [
        [{"role": "user", "content": [{"type": "image", "path": str(EVAL / row["image"])}, {"type": "text", "text": row["text"]}]}]
        for row in ROWS
    ]
    prompts = processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True}
    )
    with torch.no_grad():
        found, expected = (model.model(**inputs).routing for inputs in (batch, prompts))
    assert len(found) == 2 * len(expected) == 16 and len({report.granularity for report in expected}) > 1
    for place, report in enumerate(expected):
        for answered_too in (found[place], found[place + len(expected)]):
            assert answered_too.granularity == report.granularity
            torch.testing.assert_close(answered_too.logits, report.logits, atol=1e-4, rtol=0)
