"""The merged checkpoint against the adapter, and what the script refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llava.model import LlavaLlamaForCausalLM
from llava.model.adapter import attach_adapter
from llava.model.builder import load_pretrained_model
from llava.model.router import name_in_memory
from llava.tokenizer import load_tokenizer
from llava.tools.merge_lora_weights import main

peft = pytest.importorskip("peft")


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    torch.manual_seed(0)
    image = [torch.randn(3, 3, 48, 48)]
    return model.eval()(torch.tensor([[1, 5, -200, 7]]), images=image, image_sizes=[(90, 48)], vis_token_granularity=144).logits


@pytest.fixture
def adapter(oracle: Path, tmp_path: Path) -> tuple[Path, Any]:
    """An adapter folder over the recorded checkpoint that does not name it, and the model in memory."""
    model = LlavaLlamaForCausalLM.from_pretrained(oracle / "checkpoint", dtype=torch.float32)
    attach_adapter(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=r"model\.layers\.\d+\..*_proj"))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
            if name.startswith("model.mm_projector"):
                parameter.mul_(1.5)
    model.save_pretrained(tmp_path / "adapter")
    load_tokenizer(oracle / "checkpoint").save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", model


def test_the_merged_checkpoint_is_the_adapters_model(oracle: Path, tmp_path: Path, adapter: tuple[Path, Any]) -> None:
    """Logits equal the adapter's within float32 rounding; the written folder holds exactly what was merged in memory."""
    folder, model = adapter
    base, merged = oracle / "checkpoint", tmp_path / "merged"
    assert main(["--model-path", str(folder), "--model-base", str(base), "--save-model-path", str(merged)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "merged"]
    assert not (merged / "adapter_config.json").exists()
    tokenizer, again, _, _ = load_pretrained_model(str(merged), device="cpu")
    # The adapter computes W x + s B A x, the merged layer (W + s B A) x: the worst of four such adapters was 2e-4, of logits up to 17.
    torch.testing.assert_close(_logits(again), _logits(model), rtol=0, atol=5e-4)
    in_memory = load_pretrained_model(str(folder), str(base), device="cpu")[1].state_dict()
    written = {name_in_memory(key): value for file in merged.glob("*.safetensors") for key, value in load_file(file).items()}
    for weights in (written, again.state_dict()):
        assert weights.keys() == in_memory.keys()
        assert all(torch.equal(tensor, in_memory[name]) for name, tensor in weights.items())
    assert tokenizer("Where is the man?").input_ids == load_tokenizer(base)("Where is the man?").input_ids


def test_refusals_are_one_sentence(
    oracle: Path, tmp_path: Path, adapter: tuple[Path, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, base, new = str(adapter[0]), str(oracle / "checkpoint"), str(tmp_path / "new")
    for arguments, message in (
        (["--model-path", folder, "--save-model-path", folder, "--model-base", base], "exists already; give a new folder"),
        (["--model-path", base, "--save-model-path", new], "holds no adapter_config.json"),
        (["--model-path", folder, "--save-model-path", new], "does not name the model it belongs to"),
    ):
        assert main(arguments) == 1 and message in capsys.readouterr().err
    assert not Path(new).exists() and (adapter[0] / "adapter_config.json").is_file()
