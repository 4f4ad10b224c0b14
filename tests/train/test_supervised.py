"""LLaVA's names for training data: what they give is what LLaVA's give, and our trainer takes it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llava import conversation as conversation_lib
from llava.constants import IGNORE_INDEX
from llava.conversation import conv_templates
from llava.model import LlavaLlamaForCausalLM
from llava.tokenizer import load_tokenizer
from llava.train import train as names
from llava.train.arguments import TrainingArguments
from llava.train.build import load_model
from llava.train.run import parse_arguments
from tests.hub_cache import put_into_cache

ORACLE = Path(__file__).parents[1] / "oracle"
LABELS = json.loads((ORACLE / "labels.json").read_text())["templates"]
DIFFERENT = ("two_placeholders", "long_text_truncated")
"""LLaVA joins several placeholders of a turn into one, and cuts long rows off."""
CASES = [
    pytest.param(name, case, id=f"{name}-{case['name']}-{case['tokenizer_legacy']}")
    for name, cases in LABELS.items()
    for case in cases
    # LLaVA drops all labels of a row where it cannot find its own turns again.
    if case["name"] not in DIFFERENT and any(label != IGNORE_INDEX for label in case["labels"])
]


@pytest.fixture
def template(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the template as LLaVA's `train` does."""
    return lambda name: monkeypatch.setattr(conversation_lib, "default_conversation", conv_templates[name])


@pytest.fixture
def data_args(tiny_model: Any) -> SimpleNamespace:
    """What LLaVA's `train` has in its data arguments when it makes the data module."""
    return SimpleNamespace(
        data_path=str(ORACLE / "train_data.json"),
        image_folder=str(ORACLE / "images"),
        is_multimodal=True,
        image_processor=tiny_model.get_vision_tower().image_processor,
        image_aspect_ratio="anyres",
        image_grid_pinpoints=tiny_model.config.image_grid_pinpoints,
        mm_use_im_start_end=False,
    )


@pytest.mark.parametrize(("name", "case"), CASES)
def test_ids_and_labels_are_the_recorded_ones(name: str, case: dict[str, Any], template: Any) -> None:
    template(name)
    tokenizer = load_tokenizer(ORACLE / "checkpoint", legacy=case["tokenizer_legacy"])
    own = {"v1": names.preprocess_v1, "plain": lambda sources, tokenizer, _: names.preprocess_plain(sources, tokenizer)}[name]
    sources = names.preprocess_multimodal([case["conversation"]], SimpleNamespace(is_multimodal=case["has_image"]))
    for found in (names.preprocess(sources, tokenizer, case["has_image"]), own(sources, tokenizer, case["has_image"])):
        assert found["input_ids"][0].tolist() == case["input_ids"]
        assert found["labels"][0].tolist() == case["labels"]
        assert isinstance(found["input_ids"], list) == (name == "plain")


def test_a_batch_of_unequal_conversations_is_padded(tokenizer: Any, template: Any) -> None:
    template("v1")
    turns = [[{"from": "human", "value": "Hi"}, {"from": "gpt", "value": answer}] for answer in ("Yes.", "Yes, of course it is.")]
    both, one = names.preprocess(turns, tokenizer), names.preprocess(turns[:1], tokenizer)
    length = one["input_ids"].shape[1]
    assert both["input_ids"].shape[0] == 2 and torch.equal(both["labels"][0, :length], one["labels"][0])
    assert set(both["input_ids"][0, length:].tolist()) == {tokenizer.pad_token_id}
    assert set(both["labels"][0, length:].tolist()) == {IGNORE_INDEX}


def test_each_style_has_its_name_and_refuses_the_others(tokenizer: Any, template: Any) -> None:
    turns = [[{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes."}]]
    styles = {"v1": names.preprocess_v1, "llava_llama_2": names.preprocess_llama_2, "mpt": names.preprocess_mpt}
    for name, function in styles.items():
        template(name)
        assert torch.equal(function(turns, tokenizer)["labels"], names.preprocess(turns, tokenizer)["labels"])
        for other in set(styles.values()) - {function}:
            with pytest.raises(ValueError, match=f"is of style {conv_templates[name].sep_style.name}, expected"):
                other(turns, tokenizer)


def test_an_image_that_was_not_announced_is_refused(tokenizer: Any, template: Any) -> None:
    template("v1")
    turns = [{"from": "human", "value": "<image>\nHi"}, {"from": "gpt", "value": "Yes."}]
    with pytest.raises(ValueError, match="has_image is False, but a turn has <image>"):
        names.preprocess([turns], tokenizer)


def test_preprocess_multimodal_puts_the_image_first_and_surrounds_it(template: Any) -> None:
    template("v1")
    turns = [{"from": "human", "value": "What is it? <image>"}, {"from": "gpt", "value": "A cat."}]
    found = names.preprocess_multimodal([turns], SimpleNamespace(is_multimodal=True, mm_use_im_start_end=True))
    assert found[0][0]["value"] == "<im_start><image><im_end>\nWhat is it?"
    assert names.preprocess_multimodal([turns], SimpleNamespace(is_multimodal=False)) == [turns]


def test_a_data_set_has_llavas_items_and_lengths(tokenizer: Any, data_args: SimpleNamespace, template: Any) -> None:
    template("v1")
    dataset = names.LazySupervisedDataset(data_path=data_args.data_path, tokenizer=tokenizer, data_args=data_args)
    rows = json.loads(Path(data_args.data_path).read_text())
    assert len(dataset) == len(rows) == len(dataset.list_data_dict)
    words = [sum(len(turn["value"].split()) for turn in row["conversations"]) for row in rows]
    has_image = ["image" in row for row in rows]
    assert dataset.lengths == [count + 128 * image for count, image in zip(words, has_image, strict=True)]
    assert dataset.modality_lengths == [count if image else -count for count, image in zip(words, has_image, strict=True)]
    for index, row in enumerate(rows):
        item = dataset[index]
        turns = names.preprocess_multimodal([row["conversations"]], data_args)
        assert torch.equal(item["input_ids"], names.preprocess(turns, tokenizer, has_image[index])["input_ids"][0])
        assert ("image" in item) == has_image[index]
        assert not has_image[index] or item["image"].ndim == 4
    data_args.image_aspect_ratio = "pad"
    first = has_image.index(True)
    assert names.LazySupervisedDataset(data_args.data_path, tokenizer, data_args)[first]["image"].shape == (3, 48, 48)


def test_batches_go_into_the_models_forward(tiny_model: Any, tokenizer: Any, data_args: SimpleNamespace, template: Any) -> None:
    template("v1")
    module = names.make_supervised_data_module(tokenizer=tokenizer, data_args=data_args)
    assert sorted(module) == ["data_collator", "eval_dataset", "train_dataset"] and module["eval_dataset"] is None
    items = [module["train_dataset"][index] for index in range(3)]
    batch = module["data_collator"](items)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert batch["attention_mask"].sum(dim=1).tolist() == [len(item["input_ids"]) for item in items]
    read = ("input_ids", "labels", "attention_mask", "images", "image_sizes")
    with torch.no_grad():
        loss = tiny_model(**{name: batch[name] for name in read}).loss
        assert torch.isfinite(loss) and torch.equal(tiny_model(**batch).loss, loss)


def test_a_callers_own_items_are_batched(tokenizer: Any) -> None:
    collator = names.DataCollatorForSupervisedDataset(tokenizer=tokenizer)
    text = {"input_ids": torch.tensor([1, 5, 6]), "labels": torch.tensor([-100, 5, 6])}
    single = {"input_ids": torch.tensor([1, -200]), "labels": torch.tensor([-100, -100]), "image": torch.zeros(3, 48, 48)}
    batch = collator([text, single])
    assert batch["input_ids"].tolist() == [[1, 5, 6], [1, -200, tokenizer.pad_token_id]] and batch["images_per_row"] == [0, 1]
    assert [views.shape for views in batch["images"]] == [(1, 3, 48, 48)] and batch["image_sizes"] == [(48, 48)]
    tiles = {**single, "image": torch.zeros(5, 3, 48, 48)}
    with pytest.raises(ValueError, match="item 1 has an image of 5 views and no image_sizes"):
        collator([text, tiles])
    assert collator([text, {**tiles, "image_sizes": [(90, 80)]}])["image_sizes"] == [(90, 80)]


def test_llavas_trainer_trains_on_llavas_data_module(
    tiny_model: Any, tokenizer: Any, data_args: SimpleNamespace, template: Any, tmp_path: Path
) -> None:
    template("v1")
    tiny_model.requires_grad_(False)
    tiny_model.get_model().mm_projector.requires_grad_(True)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), stage="instruct", max_steps=3, per_device_train_batch_size=2, use_cpu=True, report_to="none",
        learning_rate=1e-2, save_strategy="no", disable_tqdm=True, group_by_modality_length=True, logging_steps=1,
    )  # fmt: skip
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    module = names.make_supervised_data_module(tokenizer, data_args)
    trainer = names.LLaVATrainer(model=tiny_model, tokenizer=tokenizer, args=arguments, **module)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    changed = {name for name, value in tiny_model.state_dict().items() if not torch.equal(before[name], value)}
    assert len(losses) == 3 and changed and all("mm_projector" in name for name in changed)
    names.safe_save_model_for_hf_trainer(trainer=trainer, output_dir=str(tmp_path / "saved"))
    loaded = LlavaLlamaForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded.get_model().mm_projector[0].weight, tiny_model.get_model().mm_projector[0].weight)
    assert len(load_tokenizer(tmp_path / "saved")) == len(tokenizer)


def test_new_special_tokens_begin_as_the_mean(tiny_model: Any) -> None:
    tokenizer = load_tokenizer(ORACLE / "checkpoint")
    old = {name: part.weight.detach().clone() for name, part in (("in", tiny_model.get_input_embeddings()), ("out", tiny_model.lm_head))}
    names.smart_tokenizer_and_embedding_resize({"pad_token": "[PAD]"}, tokenizer, tiny_model)
    assert tokenizer.pad_token_id == 420
    for part, before in ((tiny_model.get_input_embeddings(), old["in"]), (tiny_model.get_output_embeddings(), old["out"])):
        assert torch.equal(part.weight[:420], before)
        torch.testing.assert_close(part.weight[420], before.mean(dim=0))
    rows = len(tiny_model.get_input_embeddings().weight)
    names.smart_tokenizer_and_embedding_resize({"pad_token": "[PAD]"}, tokenizer, tiny_model)
    assert len(tiny_model.get_input_embeddings().weight) == rows == 421


def test_lora_names_are_the_language_models(tiny_model: Any) -> None:
    assert names.find_all_linear_names(tiny_model) == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def test_cache_dir_reaches_whatever_training_reads(tmp_path: Path, run_flags: Any, language_model: Path) -> None:
    cache = tmp_path / "cache"
    put_into_cache(cache, "someone/llama", language_model)
    put_into_cache(cache, "someone/tower", ORACLE / "tiny-clip")
    flags = {"vision_tower": "someone/tower", "mm_projector_type": "linear", "image_grid_pinpoints": "[[96, 96]]"}
    arguments = parse_arguments(run_flags(tmp_path / "out", "align", "someone/llama", cache_dir=cache, **flags))
    model, tokenizer = load_model(*arguments)
    assert len(tokenizer) == 420 and model.config.mm_vision_tower == "someone/tower"
    stored = model.get_vision_tower().state_dict()
    tower = LlavaLlamaForCausalLM.from_pretrained  # the released checkpoint's tower differs from tiny-clip on purpose
    other = tower(ORACLE / "checkpoint").get_vision_tower().state_dict()
    assert not all(torch.equal(stored[name], value) for name, value in other.items())
    with pytest.raises(ValueError):
        load_model(*parse_arguments(run_flags(tmp_path / "out", "align", "someone/llama", **flags)))
