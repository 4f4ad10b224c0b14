"""Tokenizer and warm-ups: prompts stay short, labels cover answers only, training resumes where it stopped."""

from __future__ import annotations

import argparse
import copy
import random
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionModel, LlamaForCausalLM, PreTrainedTokenizerBase

from llava.inference import Assistant
from playground import common, pretrain_language, pretrain_reader, pretrain_vision, tokenizer, world


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.train_tokenizer(folder, rows=300)
    return tokenizer.load_tokenizer(folder)


def test_special_tokens_and_size(words: PreTrainedTokenizerBase) -> None:
    assert (words.pad_token_id, words.unk_token_id, words.bos_token_id, words.eos_token_id) == (0, 0, 1, 2)
    assert len(words) == tokenizer.VOCABULARY


@pytest.mark.parametrize("text", ["What number is on the sign?", "Grüße, 東京 ∆\n\tEnd", "row 2 column 3"])
def test_any_text_survives_a_round_trip(words: PreTrainedTokenizerBase, text: str) -> None:
    assert words.decode(words(text).input_ids, skip_special_tokens=True) == text


def test_digits_are_split_and_the_system_prompt_is_short(words: PreTrainedTokenizerBase) -> None:
    assert [token for token in words.tokenize("472") if token != "▁"] == ["4", "7", "2"]
    assert len(words(tokenizer.SYSTEM_PROMPT).input_ids) < 40


def test_labels_of_a_conversation_are_its_answers(words: PreTrainedTokenizerBase) -> None:
    scene = world.make_scene("train", 3)
    row = pretrain_language.conversation_row(scene, random.Random(0), words)
    assert len(row.ids) == len(row.labels) == len(row.positions)
    told = {world_q.family: world_q.answer for world_q in world.questions(scene, random.Random(0))}
    for family, first, last in row.answers:
        assert row.labels[first:last] == row.ids[first:last] and row.ids[last - 1] == words.eos_token_id
        if family not in ("poster", "pole_item"):
            assert words.decode(row.ids[first: last - 1]).strip() == told[family]
    asked = sum(last - first for _, first, last in row.answers)
    assert sum(label != pretrain_language.IGNORE for label in row.labels) == asked
    assert row.positions == sorted(set(row.positions))


def test_views_arrive_as_the_image_processor_gives_them(tmp_path: Path) -> None:
    from transformers import CLIPImageProcessor

    pretrain_vision.save_tower(CLIPVisionModel(pretrain_vision.tower_config()), tmp_path)
    view, _ = next(iter(world.views(world.make_scene("train", 0))))
    processor = CLIPImageProcessor.from_pretrained(tmp_path)
    expected = processor(images=view, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pretrain_vision.to_pixels(view[None]), expected, atol=1e-5, rtol=0)
    assert CLIPVisionModel.from_pretrained(tmp_path).config.patch_size == world.PATCH


def vision_arguments(output: Path, steps: int) -> argparse.Namespace:
    return argparse.Namespace(output=output, steps=steps, scenes=2, learning_rate=1e-3, save_every=2, seed=0,
                              bf16=False, settle_steps=0, settle_learning_rate=1e-3, settle_weight=5.0)


def test_vision_resumes_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain_vision, "f1_scores", lambda reader, seed: {})
    monkeypatch.setattr(pretrain_vision.common, "cosine_rate", lambda *args, **rest: 1e-3)
    (tmp_path / "a").mkdir()
    straight = pretrain_vision.train(vision_arguments(tmp_path / "a", 4)).state_dict()
    pretrain_vision.train(vision_arguments(tmp_path / "b", 2))
    resumed = pretrain_vision.train(vision_arguments(tmp_path / "b", 4)).state_dict()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_language_trains_and_reports_every_family(tmp_path: Path, words: PreTrainedTokenizerBase) -> None:
    args = argparse.Namespace(output=tmp_path, steps=2, tokens=300, learning_rate=1e-3, save_every=5, seed=0)
    model = pretrain_language.train(args, words)
    assert isinstance(model, LlamaForCausalLM)
    scores = pretrain_language.exact_match(model, words, seed=0, scenes=2)
    assert set(scores) == {*world.FAMILIES, "all"}


def test_both_parts_fit_the_budget() -> None:
    tower = CLIPVisionModel(pretrain_vision.tower_config())
    model = LlamaForCausalLM(pretrain_language.language_config(tokenizer.VOCABULARY))
    assert sum(p.numel() for part in (tower, model) for p in part.parameters()) < 3_500_000


def test_distance_to_code_is_zero_for_additive_features_only() -> None:
    torch.manual_seed(0)
    labels = (torch.rand(8, 64, world.NUM_ATTRIBUTES) < 0.2).float()
    weights, code = torch.ones(world.NUM_ATTRIBUTES), torch.randn(world.NUM_ATTRIBUTES + 1, 16)
    additive = labels @ code[:-1] + code[-1]
    assert pretrain_vision.distance_to_code(additive, labels, weights, code) < 1e-6
    assert pretrain_vision.distance_to_code(additive.flip(0), labels, weights, code) > 0.5


def test_rescaling_multiplies_the_features_and_nothing_else() -> None:
    tower = CLIPVisionModel(pretrain_vision.tower_config())
    pretrain_vision.common.scaled_init(tower)
    pixels = pretrain_vision.make_batch(0, 1, seed=0)[0]
    before = tower(pixels, output_hidden_states=True).hidden_states[-1]
    pretrain_vision.rescale_tower(tower, 0.5)
    after = tower(pixels, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(after, 0.5 * before, atol=1e-3, rtol=1e-3)


def test_labels_of_views_are_those_of_the_drawn_views() -> None:
    for layout in ((2, 2), (2, 1), (1, 2)):
        scene = world.make_scene("train", 5, layout=layout)
        drawn = torch.stack([torch.from_numpy(labels) for _, labels in world.views(scene)]).flatten(1, 2).float()
        assert torch.equal(pretrain_reader.view_labels(scene, one_view=False), drawn)
    assert pretrain_reader.view_labels(world.make_scene("train", 5, layout=(1, 1)), one_view=True).shape[:2] == (1, 64)


@pytest.fixture(scope="module")
def micro() -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    assistant = Assistant.load(world.__file__.replace("world.py", "avg-llava-micro"), device="cpu")
    return assistant.model, assistant.tokenizer


def reader_arguments(output: Path, steps: int) -> argparse.Namespace:
    return argparse.Namespace(output=output, steps=steps, learning_rate=1e-3, save_every=1, seed=0, projector_steps=3)


def test_reading_resumes_to_the_same_weights_and_reports_every_family(
    micro: tuple[torch.nn.Module, PreTrainedTokenizerBase], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = pretrain_reader.Phase(1.0, ((2, 2),), 2, False, (0, 4))
    monkeypatch.setattr(pretrain_reader, "PHASES", (small,))
    monkeypatch.setattr(pretrain_reader, "_report", lambda *_: None)
    monkeypatch.setattr(common, "cosine_rate", lambda *args, **rest: 1e-3)
    model, words = micro

    def fresh() -> torch.nn.Module:
        return copy.deepcopy(model)

    straight_model = fresh()
    straight = pretrain_reader.learn_to_read(straight_model, words, reader_arguments(tmp_path / "a", 3))
    pretrain_reader.learn_to_read(fresh(), words, reader_arguments(tmp_path / "b", 1))
    resumed_model = fresh()
    resumed = pretrain_reader.learn_to_read(resumed_model, words, reader_arguments(tmp_path / "b", 3))
    assert torch.equal(straight, resumed)
    weights = resumed_model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in straight_model.state_dict().items())
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, weights[name])}
    assert changed and not any("vision_tower" in name or "mm_projector" in name or "router" in name for name in changed)
    reading = pretrain_reader.make_reading("x", small, words, seed=0)
    scores = pretrain_reader.exact_match(model, [labels @ straight for labels in reading.labels], reading, 64)
    assert set(scores) == set(world.FAMILIES)


def test_the_projector_learns_the_table(
    micro: tuple[torch.nn.Module, PreTrainedTokenizerBase], tmp_path: Path
) -> None:
    model = copy.deepcopy(micro[0])
    table = torch.randn(world.NUM_ATTRIBUTES, model.config.hidden_size)
    args = reader_arguments(tmp_path, 1)
    args.projector_steps = 1
    first = pretrain_reader.fit_projector(model, table, args)
    args.projector_steps = 12
    assert pretrain_reader.fit_projector(model, table, args) < 0.9 * first
