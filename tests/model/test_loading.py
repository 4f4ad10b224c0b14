"""Checkpoints: both layouts, bit-exact round trips, and one clear error for each way a folder can be wrong."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llava.model import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.builder import load_pretrained_model
from llava.model.loading import load_tower_weights

ANSWER = {"do_sample": False, "max_new_tokens": 5}


def stored_weights(folder):
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture
def checkpoint(oracle, tmp_path):
    """A copy of the released-layout checkpoint that a test may break, with its tower beside it."""
    shutil.copytree(oracle / "tiny-clip", tmp_path / "tiny-clip")
    return shutil.copytree(oracle / "checkpoint", tmp_path / "checkpoint")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_released_layout_survives_a_round_trip_bit_for_bit(oracle, released, tmp_path):
    released.save_pretrained(tmp_path)
    assert same(stored_weights(oracle / "checkpoint"), stored_weights(tmp_path))
    again = LlavaLlamaForCausalLM.from_pretrained(tmp_path)
    assert same(released.state_dict(), again.state_dict()) and again.config.unpad_rule == "pooled_grid"


def test_a_new_model_survives_too_and_loads_without_its_tower(new_model, tmp_path):
    new_model.save_pretrained(tmp_path)
    assert "model.vision_tower.vision_tower.vision_model.pre_layrnorm.weight" in stored_weights(tmp_path)
    again = LlavaLlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert same(new_model.state_dict(), again.state_dict())
    assert (again.config.unpad_rule, again.config.router_hidden_size) == ("picture", 16)
    image, ids = [torch.randn(5, 3, 32, 32)], torch.tensor([[1, -200, 5]])
    outs = [model.generate(ids, images=image, image_sizes=[(64, 64)], **ANSWER).tolist() for model in (new_model, again)]
    assert outs[0] == outs[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_dtype_is_the_checkpoints_unless_told(new_model, tmp_path, dtype):
    new_model.to(dtype).save_pretrained(tmp_path)
    assert LlavaLlamaForCausalLM.from_pretrained(tmp_path).dtype == dtype
    assert LlavaLlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float16).dtype == torch.float16


def test_the_checkpoints_tower_wins_over_the_named_one(oracle, released):
    named = load_file(oracle / "tiny-clip" / "model.safetensors")["vision_model.pre_layrnorm.weight"]
    loaded = released.get_vision_tower().vision_tower.vision_model.pre_layrnorm.weight
    assert not torch.equal(named, loaded)


def test_a_checkpoint_without_its_tower_takes_the_named_one(oracle, checkpoint):
    weights = {key: value for key, value in stored_weights(checkpoint).items() if "vision_tower" not in key}
    for file in [*checkpoint.glob("*.safetensors"), checkpoint / "model.safetensors.index.json"]:
        file.unlink()
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    loaded = LlavaLlamaForCausalLM.from_pretrained(checkpoint).get_vision_tower().vision_tower.vision_model.pre_layrnorm.weight
    assert torch.equal(loaded, load_file(oracle / "tiny-clip" / "model.safetensors")["vision_model.pre_layrnorm.weight"])


def test_a_tower_that_is_not_whole_is_refused_and_not_filled_with_noise(released, checkpoint):
    tower = checkpoint.parent / "tiny-clip"
    weights = {key: value for key, value in load_file(tower / "model.safetensors").items() if ".layers.1." not in key}
    save_file(weights, tower / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="tiny-clip' is not whole: missing 16 .*layers.1.*copy it again"):
        load_tower_weights(released, str(tower))


def test_auto_classes_read_it(checkpoint):
    assert isinstance(AutoConfig.from_pretrained(checkpoint), LlavaConfig)
    assert isinstance(AutoModelForCausalLM.from_pretrained(checkpoint), LlavaLlamaForCausalLM)


def test_the_door_gives_four_things_from_a_folder_of_any_name(checkpoint):
    folder = checkpoint.rename(checkpoint.parent / "x")
    tokenizer, model, image_processor, context = load_pretrained_model(str(folder), None, "anything", device="cpu")
    assert (context, model.training, image_processor.crop_size["height"]) == (2048, False, 48)
    assert tokenizer("Hello there.").input_ids == [1, 363, 406, 334, 287, 262, 264, 377]


def test_a_plain_language_model_loads_without_an_image_processor(oracle, tmp_path):
    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=420)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(oracle / "checkpoint" / name, tmp_path)
    assert load_pretrained_model(str(tmp_path), device="cpu")[2] is None


@pytest.mark.parametrize("pickled", [False, True])
def test_a_projector_only_folder_goes_over_its_language_model(released, checkpoint, tmp_path, pickled):
    base = tmp_path / "base"
    config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=420)
    LlamaForCausalLM(config).save_pretrained(base)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(checkpoint / name, base)
    weights = {key: value for key, value in stored_weights(checkpoint).items() if "mm_projector" in key or "newline" in key}
    folder = tmp_path / "projector"
    folder.mkdir()
    shutil.copy(checkpoint / "config.json", folder)
    edit_config(folder, router_select=False)
    if pickled:
        torch.save(weights, folder / "mm_projector.bin")
        with pytest.raises(ValueError, match="pickled projector only; pass use_safetensors=False"):
            load_pretrained_model(str(folder), str(base), device="cpu")
    else:
        save_file(weights, folder / "mm_projector.safetensors")
    options = {"use_safetensors": False} if pickled else {}
    model = load_pretrained_model(str(folder), str(base), device="cpu", **options)[1]
    assert torch.equal(model.model.mm_projector[0].weight, released.model.mm_projector[0].weight)
    assert torch.equal(model.model.image_newline, released.model.image_newline)


@pytest.mark.parametrize("option", ["load_4bit", "load_8bit"])
def test_quantisation_leaves_tower_projector_and_router_whole(oracle, new_config, tmp_path, option):
    pytest.importorskip("bitsandbytes")
    new_config.hidden_size, new_config.intermediate_size = 64, 128
    new_config.head_dim, new_config.vocab_size = 16, 420
    LlavaLlamaForCausalLM(new_config).save_pretrained(tmp_path)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(oracle / "checkpoint" / name, tmp_path)
    _, model, _, _ = load_pretrained_model(str(tmp_path), device="cpu", dtype=torch.float32, **{option: True})
    quantised = {name for name, parameter in model.named_parameters() if parameter.dtype in (torch.uint8, torch.int8)}
    assert quantised and all(name.startswith("model.layers.") for name in quantised)
    out = model.generate(torch.tensor([[1, -200, 5]]), images=[torch.randn(3, 3, 32, 32)], image_sizes=[(30, 64)], **ANSWER)
    assert out.shape[0] == 1


def test_4bit_on_the_cpu_is_refused_where_the_library_would_fail_later(checkpoint):
    with pytest.raises(ValueError, match="multiples of 64, but .* has {'hidden_size': 32}"):
        load_pretrained_model(str(checkpoint), device="cpu", load_4bit=True)


def _remove(*names):
    def change(folder):
        for name in names:
            (folder / name).unlink()

    return change


def _rewrite(change):
    def rewritten(folder):
        weights = change(stored_weights(folder))
        for file in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
            file.unlink()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return rewritten


def _index(change):
    def rewritten(folder):
        file = folder / "model.safetensors.index.json"
        file.write_text(json.dumps(change(json.loads(file.read_text()))))

    return rewritten


def _all_in(stored, file):
    return {"weight_map": dict.fromkeys(stored["weight_map"], file)}


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (_remove("config.json"), "has no config.json"),
        (_remove(*SHARDS, "model.safetensors.index.json"), "holds no weights: expected model.safetensors"),
        (_remove(SHARDS[1]), "lacks the weight files"),
        (
            _rewrite(lambda weights: {k: v for k, v in weights.items() if k != "lm_head.weight"}),
            r"missing 1 \(lm_head.weight\), unexpected none",
        ),
        (_rewrite(lambda weights: {**weights, "model.extra.weight": torch.ones(1)}), r"missing none, unexpected 1 \(model.extra.weight\)"),
        (
            _rewrite(lambda weights: {k: v for k, v in weights.items() if "vision_model.encoder.layers.1" not in k and "voter" not in k}),
            "missing 1",
        ),
        (_rewrite(lambda weights: {k: v.to(torch.int8) for k, v in weights.items()}), "are no floating-point weights .* is I8"),
        (_rewrite(lambda w: {**w, "lm_head.weight": w["lm_head.weight"][:7].contiguous()}), r"lm_head.weight has shape \[7, 32\]"),
        (lambda folder: (folder / SHARDS[0]).write_bytes(b"\x08\0\0\0\0\0\0\0{}      "), "do not fit its configuration: missing"),
        (lambda folder: (folder / SHARDS[0]).write_bytes((folder / SHARDS[0]).read_bytes()[:-4]), "is no whole safetensors file"),
        (_index(lambda stored: {}), "has no weight_map"),
        (_index(lambda stored: _all_in(stored, "../base.safetensors")), "names '../base.safetensors'"),
        (_index(lambda stored: _all_in(stored, "/etc/passwd")), "names '/etc/passwd'"),
        (_index(lambda stored: _all_in(stored, "pytorch_model.bin")), "expected names of .safetensors files"),
        (lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": 420}'), "eos_token_id is 420, expected less than"),
        (lambda folder: (folder / "tokenizer_config.json").write_text('{"padding_side": 3}'), "padding_side is 3, expected one of left"),
        (lambda folder: (folder / "tokenizer.model").write_bytes(b"no model"), "The tokenizer of .* cannot be read"),
        (lambda folder: edit_config(folder, vocab_size=300), r"shape \[420, 32\], but the configuration makes it \[300, 32\]"),
        (lambda folder: edit_config(folder, quantization_config={"quant_method": "gptq"}), "quant_method is 'gptq', expected bitsandbytes"),
        (lambda folder: edit_config(folder, model_type="bert"), "model type 'bert', expected one of llava_llama"),
        (lambda folder: edit_config(folder, mm_vision_tower="nowhere/tower"), "vision tower 'nowhere/tower' could not be read"),
    ],
)
def test_a_broken_folder_gets_one_clear_error(checkpoint, break_it, message):
    break_it(checkpoint)
    with pytest.raises(ValueError, match=message):
        load_pretrained_model(str(checkpoint), device="cpu")


def test_a_hubs_cache_of_links_loads_by_its_id(checkpoint, tmp_path):
    """The hub's cache holds links to files named by their hash, in a folder outside the model's."""
    edit_config(checkpoint, mm_vision_tower=str(tmp_path / "tiny-clip"))
    stored = tmp_path / "cache" / "models--someone--tiny"
    (stored / "refs").mkdir(parents=True)
    (stored / "refs" / "main").write_text("a" * 40)
    snapshot = stored / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (stored / "blobs").mkdir()
    for number, file in enumerate(checkpoint.iterdir()):
        file.rename(stored / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    _, model, _, _ = load_pretrained_model(str(snapshot), device="cpu")
    assert model.config.vocab_size == 420
    hub = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    assert LlavaLlamaForCausalLM.from_pretrained("someone/tiny", **hub).config.vocab_size == 420
    (snapshot / "model.safetensors.index.json").unlink()
    (snapshot / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "../../blobs/1"}}')
    with pytest.raises(ValueError, match="names '../../blobs/1'"):
        LlavaLlamaForCausalLM.from_pretrained("someone/tiny", **hub)


def test_a_base_beside_a_whole_model_is_left_aside_and_that_is_said(checkpoint, oracle, caplog):
    with caplog.at_level(logging.WARNING):
        model = load_pretrained_model(str(checkpoint), str(oracle / "tiny-clip"), device="cpu")[1]
    assert model.config.vocab_size == 420 and "is left aside" in caplog.text and "is a whole model" in caplog.text


def test_a_tokenizer_of_another_model_is_refused(checkpoint, new_config):
    """Its ids would be rows that the model does not have."""
    new_config.vocab_size = 419
    _remove(*SHARDS, "model.safetensors.index.json", "generation_config.json")(checkpoint)
    LlavaLlamaForCausalLM(new_config).save_pretrained(checkpoint)
    with pytest.raises(ValueError, match="The tokenizer has 420 ids, but the model embeds 419"):
        load_pretrained_model(str(checkpoint), device="cpu")


def test_pickled_weights_are_read_only_when_asked(checkpoint):
    torch.save(stored_weights(checkpoint), checkpoint / "pytorch_model.bin")
    _remove(*SHARDS, "model.safetensors.index.json")(checkpoint)
    with pytest.raises(ValueError, match=r"holds pickled weights \(.bin\) only"):
        load_pretrained_model(str(checkpoint), device="cpu")
    assert load_pretrained_model(str(checkpoint), device="cpu", use_safetensors=False)[1].config.vocab_size == 420


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_8bit": True, "load_4bit": True}, "both on; choose one"),
        ({"dtype": torch.float32, "torch_dtype": torch.float16}, "they mean the same"),
        ({"use_flash_attn": True, "attn_implementation": "eager"}, "contradicts attn_implementation='eager'"),
        ({"device": "tpu"}, "expected cuda, mps or cpu"),
    ],
)
def test_flags_that_cannot_work_are_refused_before_loading(options, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        load_pretrained_model("there-is-no-such-folder", **options)


@pytest.mark.parametrize("option", ["load_4bit", "load_8bit"])
def test_without_bitsandbytes_the_way_to_install_it_is_named_before_anything_is_read(option, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r'pip install "bitsandbytes>=0.50,<0.51"'):
        load_pretrained_model("/nowhere/at/all", device="cpu", **{option: True})
