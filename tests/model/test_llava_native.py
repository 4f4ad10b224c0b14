"""LLaVA's face over native folders: its contract, its names and its numbers, with the native layout on the disk."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPImageProcessorPil

from llava.images import load_image
from llava.inference import Assistant, Question
from llava.messages import Message, Options, RoutingRequest
from llava.model import AvgLlavaConfig, AvgLlavaForConditionalGeneration, AvgLlavaProcessor, LlavaLlamaForCausalLM
from llava.model.builder import load_pretrained_model
from llava.model.language_model.llava_native import LlavaNativeConfig, LlavaNativeForCausalLM
from tests.model.native.conftest import IMAGE, make_batch, native_twin

EVAL = Path(__file__).parents[2] / "playground" / "eval"


@pytest.fixture(scope="module")
def trio() -> tuple[LlavaLlamaForCausalLM, AvgLlavaForConditionalGeneration, LlavaNativeForCausalLM]:
    """One set of weights: LLaVA's classes, the native model, and LLaVA's face over that."""
    from tests.model.conftest import tiny_config

    torch.manual_seed(0)
    llava = LlavaLlamaForCausalLM(tiny_config()).eval()
    native = native_twin(llava)
    config = LlavaNativeConfig.from_dict(native.config.to_dict())
    config.image_aspect_ratio = "anyres"
    face = LlavaNativeForCausalLM(config).eval()
    face.load_state_dict(native.state_dict())
    for model in (llava, face):
        model.generation_config.pad_token_id = 0
        model.config.tokenizer_padding_side = "left"  # where the native model pads what is generated from
    return llava, native, face


def test_no_feature_depends_on_an_unused_weight(trio: Any) -> None:
    for model in (trio[0], trio[2]):
        tower = model.get_vision_tower()
        unused = {id(weight) for weight in tower.unused_weights()}
        tower(torch.rand(2, 3, tower.image_size, tower.image_size)).square().sum().backward()
        without = {id(weight) for weight in tower.encoder.parameters() if weight.grad is None}
        model.zero_grad(set_to_none=True)
        assert unused == without and unused


@pytest.mark.parametrize("granularity", [None, 4, 64])
def test_the_three_give_the_same_logits_and_answers(trio: Any, granularity: int | None) -> None:
    """Batches of unequal rows with one image, two, none; bit for bit, the image token aside, which is no answer."""
    llava, native, face = trio
    batch = make_batch([(9, ["square"]), (5, ["wide", "odd"]), (7, [])])
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "vis_token_granularity": granularity, "suppress_tokens": [IMAGE]}
    written = [model.generate(**batch.llava(), **settings) for model in (llava, face)]
    assert torch.equal(*written)
    assert torch.equal(native.generate(**batch.kwargs(), **settings)[:, batch.input_ids.shape[1] :], written[0])
    positions = {"position_ids": torch.zeros_like(batch.input_ids)}  # asks LLaVA's face for its own, which count from a row's first token
    logits = [model(**batch.llava(), **positions, vis_token_granularity=granularity).logits for model in (llava, face)]
    assert torch.equal(*logits)
    last = [
        model(**inputs, vis_token_granularity=granularity, logits_to_keep=1).logits
        for model, inputs in ((llava, {**batch.llava(), **positions}), (native, batch.kwargs()))
    ]
    assert torch.equal(*last)


def test_the_names_of_llava_are_there(trio: Any) -> None:
    llava, _, face = trio
    inner, tower = face.get_model(), face.get_vision_tower()
    assert inner.mm_projector is inner.multi_modal_projector and inner.embed_tokens is face.get_input_embeddings()
    theirs = llava.get_vision_tower()
    names = ("hidden_size", "patch_grid", "num_patches_per_side", "num_patches", "image_size", "dtype", "device", "is_loaded")
    assert [getattr(tower, name) for name in names] == [getattr(theirs, name) for name in names]
    assert [tower.select_layer, tower.num_layers_used] == [theirs.select_layer, theirs.num_layers_used]
    views = torch.randn(2, 3, 32, 32)
    assert torch.equal(tower(views), theirs(views)) and torch.equal(tower(list(views))[1], theirs(list(views))[1])
    assert torch.equal(face.encode_images(views), llava.encode_images(views))
    with pytest.raises(ValueError, match=r"expected \(3, 32, 32\)"):
        tower(torch.zeros(1, 3, 8, 8))
    fields = ("vocab_size", "hidden_size", "max_position_embeddings", "mm_hidden_size", "mm_vision_select_layer", "image_aspect_ratio")
    assert [getattr(face.config, name) for name in fields] == [getattr(llava.config, name) for name in fields[:3]] + [
        llava.config.mm_hidden_size, llava.config.mm_vision_select_layer, llava.config.image_aspect_ratio
    ]  # fmt: skip
    assert copy.deepcopy(face).get_vision_tower().hidden_size == theirs.hidden_size


def test_a_configuration_is_llavas_in_memory_and_native_on_the_disk(trio: Any) -> None:
    stored = {**trio[1].config.to_dict(), "image_grid_pinpoints": [[32, 96], [64, 64]]}
    stored["llava_fields"] = {"tokenizer_model_max_length": 512, "mm_use_im_start_end": True, "vocab_size": 63}
    config = LlavaNativeConfig.from_dict(stored)
    config.image_aspect_ratio = "anyres"
    assert config.image_grid_pinpoints == [[96, 32], [64, 64]] and config.canvases == [(96, 32), (64, 64)]
    assert config.tokenizer_model_max_length == 512 and config.mm_use_im_start_end
    written = json.loads(config.to_json_string())
    assert written["image_grid_pinpoints"] == stored["image_grid_pinpoints"]
    assert written["architectures"] == ["AvgLlavaForConditionalGeneration"] and "image_processor" not in written
    assert written["llava_fields"].items() >= stored["llava_fields"].items()
    native = AvgLlavaConfig.from_dict(written)
    assert native.canvases == config.canvases and native.text.to_dict() == config.text.to_dict()


@pytest.fixture(scope="module")
def assistants(native_micro: Path, llava_micro: Path) -> tuple[Assistant, Assistant]:
    """The micro model from a folder of each layout: native, LLaVA's."""
    return Assistant.load(str(native_micro), device="cpu"), Assistant.load(str(llava_micro), device="cpu")


def asked(step: int) -> list[Question]:
    rows = [json.loads(line) for line in (EVAL / "test.jsonl").read_text().splitlines()[::step]]
    return [Question([load_image(EVAL / row["image"])], row["text"]) for row in rows]


def test_load_pretrained_model_keeps_llavas_contract(native_micro: Path) -> None:
    tokenizer, model, image_processor, context = load_pretrained_model(str(native_micro), None, "any name", device="cpu")
    assert isinstance(model, LlavaNativeForCausalLM) and not model.training and context == 2048
    assert isinstance(image_processor, CLIPImageProcessorPil) and tokenizer.eos_token_id == 2


def test_a_folder_of_either_layout_answers_alike(assistants: tuple[Assistant, Assistant]) -> None:
    questions, options = asked(40), Options(max_new_tokens=16)
    native, llava = ([assistant.answer(each.images, each.messages, options) for each in questions] for assistant in assistants)
    batch = assistants[0].answer_batch(questions, options)
    for ours, theirs, together in zip(native, llava, batch, strict=True):
        assert ours.token_ids == theirs.token_ids == together.token_ids
        assert torch.equal(ours.reports[0].logits, theirs.reports[0].logits)
    scores = [assistant.log_likelihoods(questions[:3], ["red"] * 3) for assistant in assistants]
    assert [each.log_probability for each in scores[0]] == pytest.approx([each.log_probability for each in scores[1]], abs=1e-4)


def test_both_layouts_and_both_faces_decide_alike_in_a_later_turn(
    assistants: tuple[Assistant, Assistant], native_micro: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An earlier answer is hidden from the router wherever the configuration has the ids around one, and shown, as published, without."""
    model, processor = AutoModelForImageTextToText.from_pretrained(native_micro).eval(), AutoProcessor.from_pretrained(native_micro)
    first, *rest = asked(100)
    options = Options(max_new_tokens=8)
    for later in rest[:3]:
        talk = [("user", first.messages), ("assistant", "It is blue, like all the digits in the row."), ("user", later.messages)]
        turns = [Message(role, str(text)) for role, text in talk]
        native, llava = (assistant.answer(first.images, turns, options) for assistant in assistants)
        parts: list[Any] = [{"role": role, "content": text} for role, text in talk]
        parts[0]["content"] = [{"type": "image"}, {"type": "text", "text": talk[0][1]}]
        prompt = processor.apply_chat_template(parts, add_generation_prompt=True)
        inputs = processor(images=list(first.images), text=prompt, return_tensors="pt")
        output, (report,) = model.generate(**inputs, max_new_tokens=8, do_sample=False, output_routing=True)
        assert native.token_ids == llava.token_ids == output[0, inputs["input_ids"].shape[1] :].tolist()
        assert torch.equal(native.reports[0].logits, llava.reports[0].logits) and torch.equal(native.reports[0].logits, report.logits)
    with monkeypatch.context() as patched:
        patched.setattr(assistants[1].model.config, "answer_start", None)
        published = assistants[1].answer(first.images, turns, options)
    assert not torch.equal(published.reports[0].logits, llava.reports[0].logits)


def test_the_image_token_is_never_drawn(assistants: tuple[Assistant, Assistant]) -> None:
    """Its row is the mean of the others, so that a hot temperature would draw it as often as any word."""
    native = assistants[0].model
    hidden = torch.randn(4, native.config.hidden_size)
    assert native.answer_logits(hidden)[:, native.config.image_token_id].tolist() == [float("-inf")] * 4
    assert native.answer_logits(hidden).isfinite().sum() == 4 * (native.config.vocab_size - 1)
    options = Options(max_new_tokens=64, min_new_tokens=64, temperature=100.0, seed=1)
    assert native.config.image_token_id not in assistants[0].answer([], "Name a colour.", options).token_ids


@pytest.mark.slow
@pytest.mark.parametrize(("granularity", "step"), [(None, 1), (4, 20), (64, 20)])
def test_the_processor_and_generate_equal_the_command_on_every_question(native_micro: Path, granularity: int | None, step: int) -> None:
    """Token for token, one by one, as `eval_model` asks and as a script of transformers does."""
    assistant = Assistant.load(str(native_micro), device="cpu")
    processor = AutoProcessor.from_pretrained(native_micro)
    model = AutoModelForImageTextToText.from_pretrained(native_micro).eval()
    options = Options(max_new_tokens=32, routing=RoutingRequest(granularity))
    for question in asked(step):
        ours = assistant.answer(question.images, question.messages, options)
        parts = [{"type": "image"}, {"type": "text", "text": question.messages}]
        prompt = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
        inputs = processor(images=list(question.images), text=prompt, return_tensors="pt")
        output, routing = model.generate(
            **inputs, max_new_tokens=32, do_sample=False, vis_token_granularity=granularity, output_routing=True
        )
        assert output[0, inputs["input_ids"].shape[1] :].tolist() == ours.token_ids, question.messages
        assert routing[0].granularity == ours.reports[0].granularity


@pytest.fixture
def trained(native_micro: Path, tmp_path: Path) -> Iterator[Path]:
    """Rows to train on, with the images of the evaluation."""
    rows = [json.loads(line) for line in (EVAL / "test.jsonl").read_text().splitlines()[:4]]
    turns = [[{"from": "human", "value": f"<image>\n{row['text']}"}, {"from": "gpt", "value": row["answer"]}] for row in rows]
    data = [{"id": str(index), "image": row["image"], "conversations": turns[index]} for index, row in enumerate(rows)]
    (tmp_path / "rows.json").write_text(json.dumps(data))
    yield tmp_path


@pytest.mark.parametrize("flags", [[], ["--lora_enable", "True", "--lora_r", "2"]], ids=["whole", "lora"])
def test_training_on_a_native_folder_gives_one_that_both_faces_load(
    trained: Path, native_micro: Path, llava_micro: Path, flags: list[str]
) -> None:
    """The same losses as on LLaVA's layout, and a native folder out of a native folder."""
    from llava.train.run import train

    losses = []
    for layout, source in (("native", native_micro), ("llava", llava_micro)):
        trainer = train(
            ["--model_name_or_path", str(source), "--data_path", str(trained / "rows.json"), "--image_folder", str(EVAL), "--output_dir",
             str(trained / layout), "--stage", "instruct", "--max_steps", "2", "--per_device_train_batch_size", "2",
             "--use_cpu", "True",
             "--save_strategy", "no", "--report_to", "none", "--logging_steps", "1", "--disable_tqdm", "True", "--bf16", "False",
             "--learning_rate", "1e-3", *flags]
        )  # fmt: skip
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0]
    folder = trained / "native"
    processor = AutoProcessor.from_pretrained(folder)
    assert isinstance(processor, AvgLlavaProcessor) and processor.tokenizer.padding_side == "left"
    again = Assistant.load(str(folder), device="cpu")
    assert isinstance(again.model, LlavaNativeForCausalLM)
    assert again.model.config.tokenizer_model_max_length == 2048 and again.model.config.conv_version == "v1"
    if not flags:
        native = AutoModelForImageTextToText.from_pretrained(folder)
        assert isinstance(native, AvgLlavaForConditionalGeneration)
        assert all(torch.equal(tensor, native.state_dict()[name]) for name, tensor in again.model.state_dict().items())
    else:
        names = load_file(folder / "adapter_model.safetensors")
        assert all(name.startswith("base_model.model.model.language_model.layers.") for name in names)
    trained_weight = again.model.model.layers[0].mlp.up_proj.weight
    theirs = Assistant.load(str(trained / "llava"), device="cpu").model.model.layers[0].mlp.up_proj.weight
    assert torch.allclose(trained_weight, theirs, atol=1e-5)
    before = AutoModelForImageTextToText.from_pretrained(native_micro).model.language_model
    assert not torch.equal(trained_weight, before.layers[0].mlp.up_proj.weight)
