"""docs/Extending.md: a model put together from another text model and tower, by the page's block, answers under our own names."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

from llava.constants import MICRO_MODEL
from llava.images import load_images
from llava.inference import Assistant, Options
from llava.messages import RoutingRequest
from llava.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "Extending.md").read_text(encoding="utf-8")


def save_parts(folder: Path) -> None:
    torch.manual_seed(0)
    tokenizer = load_tokenizer(MICRO_MODEL)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    text = Qwen3Config(**sizes, **special, vocab_size=640, num_key_value_heads=2, head_dim=16, max_position_embeddings=2048)
    Qwen3ForCausalLM(text).save_pretrained(folder / "text-model")
    tokenizer.save_pretrained(folder / "text-model")
    SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=64, patch_size=8)).save_pretrained(folder / "tower")
    SiglipImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder / "tower")


def test_the_block_makes_a_model_that_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_parts(tmp_path)
    monkeypatch.chdir(tmp_path)
    code = re.search(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert code is not None
    exec(compile(code[1], "Extending.md", "exec"), {})
    assert {file.name for file in Path("new-model").iterdir()} >= {"README.md", "chat_template.jinja", "tokenizer.json"}
    stored = json.loads(Path("new-model/config.json").read_text())
    assert (stored["text_config"]["model_type"], stored["vision_config"]["model_type"]) == ("qwen3", "siglip_vision_model")
    assistant = Assistant.load("new-model", device="cpu")
    images = load_images([str(ROOT / "playground" / "images" / "scene_pink.png")])
    costs = [
        assistant.answer(images, "What?", Options(routing=RoutingRequest(granularity=level), max_new_tokens=2)).reports[0].num_visual_tokens
        for level in (4, 16, 64)
    ]
    assert costs == [24, 88, 336]
