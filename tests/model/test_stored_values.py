"""Whatever stands in a checkpoint's files, loading it works or ends in one sentence, at once."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig

from llava.checkpoint_files import read_headers, read_object, weight_files
from llava.model import LlavaConfig, LlavaLayoutProcessor, LlavaLlamaForCausalLM
from llava.model.adapter import attach_adapter, load_lora, read_lora_config
from llava.model.builder import load_pretrained_model
from llava.model.config import MultimodalFields, check_generation_fields, check_language_fields
from llava.model.loading import read_tower_config
from llava.model.shapes import check_shapes
from llava.model.vision_tower import make_image_processor
from llava.tokenizer import load_tokenizer
from tests.micro import llava_micro_folder

MICRO = llava_micro_folder()
STORED = json.loads((MICRO / "config.json").read_text())
MULTIMODAL = [each.name for each in fields(MultimodalFields)]


def nested(depth: int) -> Any:
    value: Any = 1
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


WRONG: list[Any] = [
    None, True, 0, 1, -1, 7, 2**31, 2**63, 10**9, 10**400, 0.0, 0.5, -0.5, 1e-320, 1e308, math.nan, math.inf, -math.inf, "", "a", "1", "\0",
    "é" * 5000, [], [0], [-1], [[]], ["a"], [[1, 1]], [[10**9, 10**9]], [None], list(range(5000)), {}, {"a": 1}, {"": []}, nested(30),
]  # fmt: skip
"""Of every type, at the edges of every range."""


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a JSON value: every field, and the first item of every list."""
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else [(0, value[0])] if isinstance(value, list) and value else []
    for name, item in inner:
        yield from places(item, (*path, name))


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copied = list(value) if isinstance(value, list) else dict(value)
    copied[path[0]] = replaced(value[path[0]], path[1:], new)
    return copied


def ends_well(judge: Callable[[], Any]) -> Any:
    """What `judge` gives; `None` where it refuses in one sentence; anything else fails the test."""
    start = perf_counter()
    try:
        return judge()
    except (ValueError, OSError) as error:
        text = str(error)
        assert text and "\n" not in text and len(text) < 4000, text
    finally:
        assert perf_counter() - start < 2
    return None


@pytest.fixture(scope="module")
def headers() -> dict[str, Any]:
    return read_headers(weight_files(MICRO))


def judge_config(stored: dict[str, Any], headers: dict[str, Any]) -> LlavaConfig:
    config = LlavaConfig.from_dict(stored)
    check_shapes(config, headers, "the micro model")
    if config.vision_config is not None:
        make_image_processor(config.image_processor, config.vision_config["image_size"])
    return config


@pytest.mark.parametrize("path", list(places(STORED)), ids=lambda path: ".".join(map(str, path)))
def test_every_value_of_config_json(path: tuple[Any, ...], headers: dict[str, Any]) -> None:
    for value in WRONG:
        stored = replaced(STORED, path, value)
        config = ends_well(lambda stored=stored: judge_config(stored, headers))
        if config is not None:
            with torch.device("meta"):
                LlavaLlamaForCausalLM(config)


OLD_DUMP: dict[str, Any] = {
    "_name_or_path": "", "add_cross_attention": False, "attn_implementation": "flash_attention_2", "freeze_mm_mlp_adapter": False,
    "id2label": {"0": "LABEL_0"}, "image_token_id": 10**6, "is_decoder": False, "label2id": {"LABEL_0": 0}, "max_length": 4096,
    "mm_projector_lr": None, "mm_resampler_type": None, "name_token_id": "a", "num_beams": 1, "output_attentions": False,
    "output_hidden_states": False, "prefix": None, "pruned_heads": {}, "return_dict": True, "task_specific_params": None,
    "temperature": 1.0, "tokenizer_class": None, "torchscript": False, "transformers_version": "4.37.0.dev0", "use_bfloat16": False,
    "use_mm_proj": True,
}  # fmt: skip
"""Fields that older versions of transformers and LLaVA wrote into every config.json."""


@pytest.mark.parametrize(
    "given",
    [
        OLD_DUMP,
        {"vision_config": {**CLIPVisionConfig(**STORED["vision_config"]).to_dict(), **OLD_DUMP}},
        {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}},
        {"tokenizer_model_max_length": int(1e30), "torch_dtype": None},
        {"quantization_config": {"load_in_8bit": True, "llm_int8_threshold": 6.0}},
    ],
    ids=["older fields", "older fields of the tower", "older positions", "a tokenizer without an end", "bitsandbytes by its bits"],
)
def test_what_published_checkpoints_hold_is_taken(given: dict[str, Any], headers: dict[str, Any]) -> None:
    assert judge_config({**STORED, **given}, headers).hidden_size == STORED["hidden_size"]


def test_null_in_a_multimodal_field_says_nothing() -> None:
    names = [name for name in MULTIMODAL if name not in ("vision_config", "image_grid_pinpoints", "vis_token_granularity")]
    bare = {name: value for name, value in STORED.items() if name not in names}
    assert LlavaConfig.from_dict({**bare, **dict.fromkeys(names)}).to_dict() == LlavaConfig.from_dict(bare).to_dict()


@pytest.mark.parametrize("value", WRONG, ids=lambda value: repr(value)[:20])
def test_every_name_and_the_whole_of_config_json(value: Any, headers: dict[str, Any], tmp_path: Path) -> None:
    """A missing field, an unknown one, one that a class has as a method, and a file that holds something else."""
    for name in STORED:
        ends_well(lambda name=name: judge_config({key: value for key, value in STORED.items() if key != name}, headers))
    for name in ("__class__", "to_dict", "levels", "sub_configs", "per_layer_config", "auto_map", "num_labels", "torch_dtype", "unknown"):
        ends_well(lambda name=name: judge_config({**STORED, name: value}, headers))
        ends_well(lambda name=name: judge_config({**STORED, "vision_config": {**STORED["vision_config"], name: value}}, headers))
        ends_well(lambda name=name: judge_config({**STORED, "image_processor": {**STORED["image_processor"], name: value}}, headers))
    file = tmp_path / "config.json"
    file.write_text(json.dumps(value) if value != 10**400 else "1" * 5000)
    ends_well(lambda: read_object(file))


NO_OBJECTS = ["", "{", "[" * 100_000, '{"a":' * 40 + "1" + "}" * 40, "\x00\xff", "[]", '{"a": ' + "1" * 5000 + "}", "null"]


@pytest.mark.parametrize("text", NO_OBJECTS, ids=lambda text: text[:10])
def test_a_file_that_is_no_object(text: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(text.encode("latin-1"))
    assert ends_well(lambda: read_object(file)) is None
    file.write_bytes(b"{}" + b" " * 2**25)
    with pytest.raises(ValueError, match="at most"):
        read_object(file)


GENERATION = {
    **json.loads((MICRO / "generation_config.json").read_text()),
    "temperature": 0.5, "top_p": 0.9, "top_k": 5, "num_beams": 1, "max_length": 20, "stop_strings": ["a"], "suppress_tokens": [1],
    "watermarking_config": {"bias": 1.0}, "to_dict": None, "compile_config": None,
}  # fmt: skip


@pytest.mark.parametrize("path", list(places(GENERATION)), ids=lambda path: ".".join(map(str, path)))
def test_every_value_of_generation_config_json(path: tuple[Any, ...]) -> None:
    for value in WRONG:
        ends_well(lambda value=value: check_generation_fields(replaced(GENERATION, path, value), 640, "generation_config.json"))


PLAIN = {"model_type": "llama", **LlamaConfig(hidden_size=8, num_attention_heads=2, vocab_size=9).to_dict()}


@pytest.mark.parametrize("path", list(places(PLAIN)), ids=lambda path: ".".join(map(str, path)))
def test_every_value_of_a_plain_models_config_json(path: tuple[Any, ...]) -> None:
    for value in WRONG:
        ends_well(lambda value=value: check_language_fields(replaced(PLAIN, path, value), LlamaConfig))


TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")
BACKEND = json.loads((MICRO / "tokenizer.json").read_text())
SMALL: dict[str, Any] = {
    "tokenizer_config.json": json.loads((MICRO / "tokenizer_config.json").read_text()),
    "tokenizer.json": {**BACKEND, "model": {**BACKEND["model"], "vocab": {"a": 0}, "merges": BACKEND["model"]["merges"][:1]}},
}
TOKENIZER_CASES = [(name, path) for name in TOKENIZER_FILES for path in places(SMALL[name])]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    for name in ("config.json", *TOKENIZER_FILES):
        shutil.copy(MICRO / name, folder)
    return folder


def named(value: Any) -> str:
    return value if isinstance(value, str) else ".".join(map(str, value))


@pytest.mark.parametrize(("name", "path"), TOKENIZER_CASES, ids=named)
def test_every_value_of_the_tokenizers_files(name: str, path: tuple[Any, ...], tokenizer_folder: Path) -> None:
    whole = json.loads((MICRO / name).read_text())
    for value in WRONG:
        if value == 10**400:
            continue
        (tokenizer_folder / name).write_text(json.dumps(replaced(SMALL[name] if path[:2] == ("model", "vocab") else whole, path, value)))
        tokenizer = ends_well(lambda: load_tokenizer(tokenizer_folder))
        assert tokenizer is None or tokenizer("Which colour?").input_ids
    shutil.copy(MICRO / name, tokenizer_folder)


def altered(folder: Path, name: str) -> Iterator[tuple[str, Any]]:
    """Every wrong value in every place of a file, which lies in the folder while the caller looks; afterwards it is whole again."""
    whole = json.loads((folder / name).read_text())
    for path in places(whole):
        for value in WRONG:
            if value != 10**400:
                (folder / name).write_text(json.dumps(replaced(whole, path, value)))
                yield named(path), value
    (folder / name).write_text(json.dumps(whole))


def test_every_value_of_a_towers_preprocessor_config_json(oracle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(oracle / "tiny-clip", tmp_path / "tower")
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": stored["vision_config"]}))
    for name in ("preprocessor_config.json", "config.json"):
        for _ in altered(folder, name):
            read = ends_well(lambda: read_tower_config(str(folder)))
            if read is not None:
                ends_well(lambda read=read: LlavaConfig(vision_config=read[0], image_processor=read[1], image_aspect_ratio="pad"))


def test_every_value_of_a_processor_saved_alone(tmp_path: Path) -> None:
    LlavaLayoutProcessor.from_pretrained(MICRO).save_pretrained(tmp_path)
    for place, value in altered(tmp_path, "processor_config.json"):
        processor = ends_well(lambda: LlavaLayoutProcessor.from_pretrained(tmp_path))
        assert processor is None or processor.image_processor.crop_size, (place, value)


LAYERS = r"model[.]layers[.][0-9]+[.].*[.](q_proj)"


@pytest.fixture(scope="module")
def adapted() -> LlavaLlamaForCausalLM:
    return LlavaLlamaForCausalLM.from_pretrained(MICRO, dtype=torch.float32)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_value_of_adapter_config_json(adapted: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=4, lora_dropout=0.1, target_modules=LAYERS, base_model_name_or_path=str(MICRO))
    attach_adapter(adapted, config)
    adapted.save_pretrained(tmp_path)
    adapted.delete_adapter("default")

    def judge() -> None:
        config = read_lora_config(tmp_path)
        attach_adapter(adapted, config)
        load_lora(adapted, tmp_path)

    for _ in altered(tmp_path, "adapter_config.json"):
        ends_well(judge)
        if getattr(adapted, "peft_config", None):
            adapted.delete_adapter("default")


def test_adapters_of_other_trainers_are_read(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    stored = {"peft_type": "LORA", "r": 2, "lora_alpha": 4.0, "lora_dropout": 0, "target_modules": LAYERS, "base_model_name_or_path": "",
              "rank_pattern": {r"^model\.layers\.0\.self_attn\.q_proj$": 4}, "modules_to_save": [], "loftq_config": {}}  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(stored))
    assert read_lora_config(tmp_path).rank_pattern == stored["rank_pattern"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(stored | {"rank_pattern": {"(a+)+": 4}}))
    with pytest.raises(ValueError, match=r"names '\(a\+\)\+', expected a layer's name"):
        read_lora_config(tmp_path)


HOSTILE: list[tuple[str, Any]] = [
    ("config.json", {"num_hidden_layers": 10**7}),
    ("config.json", {"filtered_text_num": 10**9}),
    ("config.json", {"rope_parameters": {"rope_type": "yarn"}}),
    ("config.json", {"image_grid_pinpoints": [[64 * 99, 64 * 99]]}),
    ("config.json", {"a": nested(40)}),
    ("generation_config.json", {"num_beams": 10**9}),
    ("tokenizer_config.json", {"bos_token": ["<s>"]}),
    ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": 2**40}, "merges": []}}),
]


@pytest.mark.parametrize(("name", "changes"), HOSTILE, ids=lambda value: value if isinstance(value, str) else next(iter(value)))
def test_a_hostile_folder_is_refused_by_the_door(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    for file in MICRO.iterdir():
        (tmp_path / file.name).symlink_to(file)
    stored = json.loads((MICRO / name).read_text())
    (tmp_path / name).unlink()
    (tmp_path / name).write_text(json.dumps({**stored, **changes}))
    assert ends_well(lambda: load_pretrained_model(str(tmp_path), device="cpu")) is None
