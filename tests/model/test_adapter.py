"""Adapter folders: ours and LLaVA's, what merging computes, and one clear error for each way a folder can be wrong."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from llava.model import LlavaLlamaForCausalLM
from llava.model.adapter import attach_adapter, is_adapter, language_linears, load_lora, merge_adapter, read_lora_config
from llava.model.builder import load_pretrained_model

peft = pytest.importorskip("peft")
PLAIN = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=420)
LEAVES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _randomised(model: Any, config: Any) -> Any:
    """The model with an adapter whose matrices are all random, so that it changes something."""
    attach_adapter(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return model


def _config(**changes: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": r"model\.layers\.\d+\..*_proj", **changes})


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    torch.manual_seed(0)
    image = [torch.randn(3, 3, 48, 48)]
    return model.eval()(torch.tensor([[1, 5, -200, 7]]), images=image, image_sizes=[(90, 48)], vis_token_granularity=144).logits


def _close(one: torch.Tensor, two: torch.Tensor) -> None:
    """W x + s B A x is not (W + s B A) x bit for bit. In float32 the worst of four such adapters was 2e-4, of logits up to 17."""
    torch.testing.assert_close(one, two, rtol=0, atol=5e-4)


def _edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture
def model(oracle: Path) -> Any:
    return LlavaLlamaForCausalLM.from_pretrained(oracle / "checkpoint", dtype=torch.float32).eval()


@pytest.fixture
def folder(model: Any, oracle: Path, tmp_path: Path) -> Path:
    """An adapter over a copy of the recorded checkpoint, without tokenizer."""
    shutil.copytree(oracle / "tiny-clip", tmp_path / "tiny-clip")
    shutil.copytree(oracle / "checkpoint", tmp_path / "base")
    _randomised(model, _config(base_model_name_or_path=str(tmp_path / "base"))).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_merging_rounds_once(model: Any) -> None:
    """In bfloat16 a merged weight is the float32 sum, rounded; the logits are the unmerged model's."""
    assert language_linears(model) == sorted(LEAVES)
    _randomised(model.to(torch.bfloat16), _config())
    layer = model.model.layers[1].mlp.up_proj
    sums = layer.base_layer.weight.float() + 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    unmerged = _logits(model)
    merge_adapter(model)
    assert type(model.model.layers[1].mlp.up_proj) is torch.nn.Linear and model.dtype == torch.bfloat16
    torch.testing.assert_close(model.model.layers[1].mlp.up_proj.weight, sums.to(torch.bfloat16), rtol=0, atol=0)
    assert torch.cosine_similarity(_logits(model).float().flatten(), unmerged.float().flatten(), dim=0) > 0.999


def test_the_adapters_folder_says_what_it_belongs_to(folder: Path, model: Any) -> None:
    assert is_adapter(folder) and not is_adapter(folder.parent / "base")
    for base in (None, str(folder.parent / "base")):
        tokenizer, loaded, processor, context = load_pretrained_model(str(folder), base, "llava", device="cpu", dtype=torch.float32)
        _close(_logits(loaded), _logits(model))
        assert (context, processor.crop_size["height"], tokenizer("Hello there.").input_ids[0]) == (2048, 48, 1)
    _edit(folder / "adapter_config.json", base_model_name_or_path="base")  # found beside the adapter
    half = LlavaLlamaForCausalLM.from_pretrained(folder.parent / "base", dtype=torch.bfloat16)
    for file in (folder.parent / "base").glob("model*"):
        file.unlink()
    half.save_pretrained(folder.parent / "base")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    assert load_pretrained_model(str(folder), str(folder.parent / "base"), device="cpu")[1].dtype == torch.bfloat16


def test_llavas_own_layout(folder: Path, model: Any, oracle: Path) -> None:
    """Layers named by their last word, which the tower has too; pickled files, names with peft's prefix; a plain base."""
    expected = _logits(model)
    base = folder.parent / "vicuna"
    plain = LlamaForCausalLM(PLAIN)
    source = {key: value for file in (oracle / "checkpoint").glob("*.safetensors") for key, value in load_file(file).items()}
    plain.load_state_dict({name: source[name] for name in plain.state_dict()})
    plain.save_pretrained(base)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(oracle / "checkpoint" / name, base)
    _edit(folder / "adapter_config.json", target_modules=LEAVES, exclude_modules=None)
    rest = {name: tensor for name, tensor in source.items() if name not in plain.state_dict()}
    torch.save({f"base_model.model.{name}": tensor for name, tensor in rest.items()}, folder / "non_lora_trainables.bin")
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    for name in ("non_lora_trainables.safetensors", "adapter_model.safetensors"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match="non_lora_trainables.bin is a pickled file; pass use_safetensors=False"):
        load_pretrained_model(str(folder), str(base), device="cpu")
    loaded = load_pretrained_model(str(folder), str(base), device="cpu", dtype=torch.float32, use_safetensors=False)[1]
    _close(_logits(loaded), expected)


def _weights(folder: Path, change: Any, name: str = "adapter_model.safetensors") -> None:
    save_file(change(load_file(folder / name)), folder / name)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: shutil.rmtree(folder.parent / "base"), "was trained on .*base, which does not exist"),
        (lambda folder: _edit(folder / "adapter_config.json", base_model_name_or_path=None), "does not name the model it belongs to"),
        (lambda folder: _edit(folder / "adapter_config.json", base_model_name_or_path=str(folder)), "is an adapter itself; merge it"),
        (lambda folder: _edit(folder / "adapter_config.json", peft_type="IA3"), "of type IA3 .* expected LORA"),
        (lambda folder: _edit(folder / "adapter_config.json", bias="all"), "with bias 'all'; expected LORA with bias 'none'"),
        (lambda folder: _edit(folder / "config.json", model_type="llama"), "adapter of a plain language model"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "but no adapter_model.safetensors"),
        (lambda folder: (folder / "non_lora_trainables.safetensors").unlink(), "but no non_lora_trainables.safetensors"),
        (lambda folder: _weights(folder, lambda w: dict(list(w.items())[1:])), "LoRA does not fit the model: 1 missing"),
        (lambda folder: _weights(folder, lambda w: {k: v[:1].contiguous() for k, v in w.items()}), "has rank 1, but r is 4"),
        (lambda folder: _weights(folder, lambda w: {k: v[:, :2].contiguous() for k, v in w.items()}), "or of another shape"),
        (
            lambda folder: _weights(folder, lambda w: {**w, "model.extra": torch.ones(1)}, "non_lora_trainables.safetensors"),
            r"does not fit the model: 1 missing, unexpected or of another shape \(model.extra\)",
        ),
    ],
)
def test_a_broken_adapter_gets_one_clear_error(folder: Path, break_it: Any, message: str) -> None:
    break_it(folder)
    with pytest.raises(ValueError, match=message):
        load_pretrained_model(str(folder), device="cpu")


def test_parts_that_nobody_brings_are_refused(folder: Path, oracle: Path) -> None:
    """A plain base has no projector; a file without it cannot make the model whole."""
    base = folder.parent / "plain"
    LlamaForCausalLM(PLAIN).save_pretrained(base)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(oracle / "checkpoint" / name, base)
    _weights(folder, lambda w: {k: v for k, v in w.items() if "mm_projector" not in k}, "non_lora_trainables.safetensors")
    with pytest.raises(ValueError, match="missing 4 .*mm_projector"):
        load_pretrained_model(str(folder), str(base), device="cpu")


def test_an_adapter_is_no_whole_checkpoint(folder: Path) -> None:
    with pytest.raises(ValueError, match="holds an adapter, not a whole model"):
        LlavaLlamaForCausalLM.from_pretrained(folder)


def test_layers_outside_the_language_model_are_refused(model: Any, folder: Path) -> None:
    with pytest.raises(ValueError, match="changes more than the language model"):
        attach_adapter(LlavaLlamaForCausalLM.from_pretrained(folder.parent / "base"), _config(target_modules=LEAVES))


def test_quantised_weights_keep_their_adapter(folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    loaded = load_pretrained_model(str(folder), device="cpu", dtype=torch.float32, load_8bit=True)[1]
    with pytest.raises(ValueError, match="cannot be merged into quantised weights"):
        merge_adapter(loaded)
    before = {name: tensor for name, tensor in loaded.state_dict().items() if "lora_" in name}
    load_lora(loaded, folder)
    assert before and all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in before.items())
    whole = load_pretrained_model(str(folder), device="cpu", dtype=torch.float32)[1]
    assert torch.cosine_similarity(_logits(loaded).flatten(), _logits(whole).flatten(), dim=0) > 0.99


def test_without_peft_an_adapter_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"reading it needs peft; run pip install"):
        read_lora_config(tmp_path)
