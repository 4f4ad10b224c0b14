"""How a native model is run: which attention its parts use, layers computed again for their gradients, a compiled forward."""

from __future__ import annotations

import copy
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from llava.model.native import AvgLlavaForConditionalGeneration
from tests.model.native.conftest import Batch, make_batch

GRANULARITIES = [None, 4, 64]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, native: AvgLlavaForConditionalGeneration) -> Path:
    saved = tmp_path_factory.mktemp("native") / "model"
    native.save_pretrained(saved)
    return saved


def used(model: Any) -> tuple[str, str]:
    """The attention of tower and text model, as their own layers see it."""
    inner = model.model
    found = tuple(
        {module.config._attn_implementation for module in part.modules() if hasattr(module, "config")}
        for part in (inner.vision_tower, inner.language_model)
    )
    assert all(len(names) == 1 for names in found)
    return found[0].pop(), found[1].pop()


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("eager", ("eager", "eager")),
        ("sdpa", ("sdpa", "sdpa")),
        ({"vision_config": "eager", "text_config": "sdpa"}, ("eager", "sdpa")),
        ({"vision_config": "sdpa", "text_config": "eager"}, ("sdpa", "eager")),
    ],
    ids=str,
)
def test_the_attention_asked_for_reaches_tower_and_text_model(
    folder: Path, native: AvgLlavaForConditionalGeneration, mixed: Batch, asked: Any, expected: tuple[str, str]
) -> None:
    loaded = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation=asked).eval()
    changed = copy.deepcopy(native)
    changed.set_attn_implementation(asked)
    for model in (loaded, changed):
        assert used(model) == expected
        keep = mixed.attention_mask.bool()
        logits, expected_logits = (each(**mixed.kwargs()).logits[keep] for each in (model, native))
        torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-5)  # the same sums in another order
    features = loaded.get_image_features(mixed.pixel_values, mixed.image_sizes, output_attentions=True)
    assert bool(features.attentions and features.attentions[0] is not None) == (expected[0] == "eager")  # only eager has them to give


def count(calls: Counter[str], name: str, *_: Any) -> None:
    calls[name] += 1


def test_layers_computed_again_give_the_same_gradients(native: AvgLlavaForConditionalGeneration, mixed: Batch) -> None:
    gradients, runs = [], []
    for again in (False, True):
        model = copy.deepcopy(native).train()
        assert model.model.router is not None
        model.model.router.set_dropout(0.0)
        if again:
            model.gradient_checkpointing_enable()
        calls: Counter[str] = Counter()
        for name, module in model.named_modules():
            if name.endswith(".layers.0.self_attn"):
                module.register_forward_pre_hook(partial(count, calls, name.split(".")[1]))
        model(**mixed.kwargs(), labels=mixed.input_ids).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        runs.append(calls)
    assert runs == [{"vision_tower": 1, "language_model": 1}, {"vision_tower": 2, "language_model": 2}]
    whole, recomputed = gradients
    assert any(gradient is not None and gradient.any() for gradient in whole.values())
    for name, gradient in whole.items():
        if gradient is None:
            assert recomputed[name] is None
        else:
            assert torch.equal(recomputed[name], gradient), name  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_forward_compiled_for_every_length_gives_the_same_logits(native: AvgLlavaForConditionalGeneration, backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(native, dynamic=True, backend=backend)
    batches = [make_batch([(9, ["square"])]), make_batch([(6, ["wide", "odd"]), (12, [])], 1), make_batch([(7, []), (11, [])], 2)]
    with torch.no_grad():
        for batch in batches:
            for granularity in GRANULARITIES if len(batch.pixel_values) else [None]:
                wish = {} if granularity is None else {"vis_token_granularity": granularity}
                keep = batch.attention_mask.bool()
                found, expected = (model(**batch.kwargs(), **wish).logits[keep] for model in (compiled, native))
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch._dynamo.reset()
