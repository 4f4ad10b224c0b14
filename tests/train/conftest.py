"""A tiny checkpoint, its tokenizer and batches, shared by the training tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from llava.conversation import conv_templates
from llava.images import load_image
from llava.mm_utils import process_images
from llava.model import LlavaLlamaForCausalLM
from llava.tokenizer import load_tokenizer
from llava.train.rows import RowReader, visual_token_costs
from llava.train.shards import ImageFolder
from tests.stage_runs import make_language_model

ORACLE = Path(__file__).parents[1] / "oracle"


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return load_tokenizer(str(ORACLE / "checkpoint"))


@pytest.fixture
def tiny_model() -> Any:
    """The recorded checkpoint in float32 with every dropout at 0, as the records were made."""
    model = LlavaLlamaForCausalLM.from_pretrained(
        str(ORACLE / "checkpoint"), dtype=torch.float32, attn_implementation="eager"
    )
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


@pytest.fixture(scope="session")
def training_records() -> dict[str, Any]:
    return json.loads((ORACLE / "training.json").read_text())


@pytest.fixture(scope="session")
def train_rows() -> list[dict[str, Any]]:
    return json.loads((ORACLE / "train_data.json").read_text())


@pytest.fixture
def recorded_batch(tiny_model: Any, training_records: Any, train_rows: Any) -> Callable[[str], dict[str, Any]]:
    """Batches as recorded, in this project's form: text-only rows have no stand-in image."""
    tensors = load_file(ORACLE / "training_batches.safetensors")

    def make(name: str) -> dict[str, Any]:
        record = training_records["data"]["batches"][name]
        if record["samples"] is None:
            names = [[f"{image}.png"] for image in record["images"]]
        else:
            rows = [train_rows[index] for index in record["samples"]]
            names = [[row["image"]] if "image" in row else [] for row in rows]
        loaded = [load_image(ORACLE / "images" / image) for row in names for image in row]
        processor = tiny_model.get_vision_tower().image_processor
        return {
            "input_ids": tensors[f"{name}/input_ids"].long(),
            "labels": tensors[f"{name}/labels"].long(),
            "attention_mask": tensors[f"{name}/attention_mask"].bool(),
            "images": [process_images([image], processor, tiny_model.config)[0] for image in loaded],
            "image_sizes": [image.size for image in loaded],
            "image_keys": [image for row in names for image in row],
            "images_per_row": [len(row) for row in names],
            "rows": list(range(len(names))),
            "ids": [str(row) for row in range(len(names))],
        }

    return make


@pytest.fixture
def reader(tiny_model: Any, tokenizer: Any) -> RowReader:
    """Reads rows about the recorded images for the tiny model."""
    return RowReader(
        tokenizer=tokenizer,
        template=conv_templates["v1"],
        image_processor=tiny_model.get_vision_tower().image_processor,
        model_config=tiny_model.config,
        max_length=2048,
        visual_tokens=lambda size: visual_token_costs(tiny_model, size)[-1],
        images=ImageFolder(ORACLE / "images"),
    )


@pytest.fixture(scope="session")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain random Llama folder to start a multimodal model from."""
    return make_language_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def run_flags() -> Callable[..., list[str]]:
    """Flags of a short CPU run of one stage; keywords change or add flags, `None` drops one."""

    def make(output: Path, stage: str | None, model: Path = ORACLE / "checkpoint", **changes: object) -> list[str]:
        flags: dict[str, object] = {
            "model_name_or_path": model,
            "stage": stage,
            "output_dir": output,
            "data_path": ORACLE / "train_data.json",
            "image_folder": ORACLE / "images",
            "per_device_train_batch_size": 2,
            "max_steps": 2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "warmup_ratio": 0,
            **changes,
        }
        return [part for name, value in flags.items() if value is not None for part in (f"--{name}", str(value))]

    return make
