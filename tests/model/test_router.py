"""The router against the recorded one, its published peculiarities, and the right behaviour where the reference is wrong."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from llava.model.granularity import granularity_levels
from llava.model.router import EncoderLayer, GranularityRouter, name_in_checkpoint, name_in_memory, select_text

BATCHED = ("batch_", "multi_image", "stack4d")
"""Cases in which the reference pairs text by image number or reads padding; ours equals each row alone instead."""


def cases(oracle):
    return json.loads((oracle / "router_cases.json").read_text())["cases"]


def _ids(case):
    ids = case["input_ids"]
    return torch.tensor(ids if isinstance(ids[0], list) else [ids])


def test_logits_and_choices_equal_the_recorded_ones(oracle, released, images):
    checked, counts = 0, dict.fromkeys((9, 18, 36, 72, 144), 0)
    for case in cases(oracle):
        if case["name"].startswith(BATCHED):
            continue
        report = released.route(_ids(case), images.views(case["images"]), images.sizes_of(case["images"]))[0]
        expected = case["per_image"][0]
        torch.testing.assert_close(report.logits, torch.tensor(expected["logits"]), atol=1e-4, rtol=0)
        assert report.granularity == expected["granularity"], case["name"]
        counts[report.granularity] += case["name"].startswith("v1")
        checked += 1
    assert checked >= 39 and list(counts.values()) == [10, 11, 3, 6, 6]


def test_the_text_that_the_router_reads_equals_the_recorded_text(oracle):
    recorded = load_file(oracle / "router_cases.safetensors")
    for name in ("v1_wide_p0", "v1_tiny_p0", "short_wide"):
        text, mask = recorded[f"{name}/0/text_embeds"], recorded[f"{name}/0/text_mask"].bool()
        chosen = select_text(text[mask], torch.ones(int(mask.sum()), dtype=torch.bool), recorded[f"{name}/0/full_features"][0], 24)
        torch.testing.assert_close(chosen, recorded[f"{name}/0/filtered_text"], atol=0, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_row_of_a_batch_is_routed_as_alone(oracle, released, images, side):
    by_name = {case["name"]: case for case in cases(oracle)}
    alone = [by_name["short_wide"], by_name["v1_tall_p1"], by_name["v1_square_p3"]]
    rows = [_ids(case)[0] for case in alone]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    names = [case["images"][0] for case in alone]
    for report, case in zip(released.route(ids, images.views(names), images.sizes_of(names), mask), alone, strict=True):
        torch.testing.assert_close(report.logits, torch.tensor(case["per_image"][0]["logits"]), atol=1e-4, rtol=0)


def test_two_images_of_one_row_both_read_its_text(oracle, released, images):
    case = next(case for case in cases(oracle) if case["name"] == "multi_image")
    row = _ids(case)[:1]
    both = released.route(row, images.views(case["images"][:2]), images.sizes_of(case["images"][:2]))
    words = row[row != -200][None]
    for report, name in zip(both, case["images"], strict=False):
        alone = torch.cat([words[:, :1], torch.tensor([[-200]]), words[:, 1:]], dim=1)
        expected = released.route(alone, images.views([name]), images.sizes_of([name]))[0].logits
        torch.testing.assert_close(report.logits, expected, atol=1e-5, rtol=0)


def test_the_answer_is_hidden_from_the_router_while_scoring_candidates(released, images):
    prompt, views, sizes = [1, -200, 302, 267, 322, 270], images.views(["wide"]), images.sizes_of(["wide"])
    released.config.router_text_fill = "zeros"
    try:
        features, logits = released.encode_views(views), []
        for answer in ([300, 376, 2], [5, 6, 2], [7, 8, 9, 2]):
            ids = torch.tensor([prompt + answer])
            labels = ids.clone()
            labels[0, : len(prompt)] = -100
            logits.append(released.route_logits(ids, None, labels, features))
        alone = released.route(torch.tensor([prompt]), views, sizes)[0].logits
    finally:
        released.config.router_text_fill = "answer"
    for scored in logits:
        torch.testing.assert_close(scored[0], alone)


def test_select_text_ranks_by_similarity_and_fills_as_told():
    first_view = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    text = torch.tensor([[0.0, 1.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 1.0]])
    eligible = torch.tensor([True, True, False, True])
    assert select_text(text, eligible, first_view, 2).tolist() == [[1, 0], [1, 1]]
    assert select_text(text, eligible, first_view, 5).tolist() == [[1, 0], [1, 1], [0, 1], [0, 0], [0, 0]]
    assert select_text(text, eligible, first_view, 5, fill_hidden=True).tolist() == [[1, 0], [1, 1], [0, 1], [-1, 0], [0, 0]]
    assert select_text(text, eligible, first_view, 0).shape == (0, 2)


def router(axis: str, width: int | None = None) -> GranularityRouter:
    torch.manual_seed(0)
    return GranularityRouter(8, (4, 4), granularity_levels((4, 4), [4, 16]), 3, axis, width, dropout=0.0).eval()


@pytest.mark.parametrize(("axis", "others_change"), [("views", False), ("tokens", True)])
def test_what_attends_to_what(axis, others_change):
    tokens = torch.randn(1, 2, 6, 8)
    module, touched = router(axis), tokens.clone()
    touched[0, 0, 2] += torch.randn(8)  # more than a constant, which a layer norm would take away
    with torch.no_grad():
        changed = (module._attend(tokens) - module._attend(touched)).abs().sum(-1)[0] > 1e-6
    assert changed[0, 2]
    assert changed[0, [0, 1, 3, 4, 5]].any() == others_change  # other tokens of the same view
    assert changed[1, 2] == (not others_change)  # the same position of the other view


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("counts", [None, [5, 3]])
def test_the_layer_is_torchs_own_bit_for_bit_gradients_too(training, counts):
    torch.manual_seed(0)
    theirs = torch.nn.TransformerEncoderLayer(32, 8, 32, dropout=0.3).train(training)
    ours = EncoderLayer(32, 0.3).train(training)
    ours.load_state_dict({name_in_memory(f"router.merger.{name}")[14:]: tensor for name, tensor in theirs.state_dict().items()})
    tokens, results = torch.randn(5, 2, 32), []
    absent = None if counts is None else torch.arange(5) >= torch.tensor(counts)[:, None]
    for layer in (theirs, ours):
        torch.manual_seed(1)  # of the dropout
        result = layer(tokens, src_key_padding_mask=absent) if layer is theirs else layer(tokens, absent)
        result.square().sum().backward()
        results.append(result)
    assert torch.equal(*results)
    gradients = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        assert torch.equal(gradients[name_in_memory(f"router.merger.{name}")[14:]].grad, parameter.grad), name


def test_every_product_is_a_linear_on_at_most_three_axes():
    module, widths = router("views", 16), []
    for part in module.modules():
        if isinstance(part, torch.nn.Linear):
            part.register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].ndim))
    module(torch.randn(2, 3, 16, 8), torch.randn(2, 3, 8), [3, 2])
    assert len(widths) == 2 + 4 + 2 and max(widths) == 3
    bare = {name for name, _ in module.named_parameters()} - {f"{name}.{kind}" for name, part in module.named_modules()
            if isinstance(part, (torch.nn.Linear, torch.nn.LayerNorm)) for kind in ("weight", "bias")}  # fmt: skip
    assert bare == {"voter"}  # of the router itself, and read in its own forward


def test_a_checkpoint_of_torchs_own_layer_is_gone_on_with():
    """Optimizers store their state by number, DeepSpeed the weights by the names in memory."""
    ours = [name_in_checkpoint(f"router.{name}") for name, _ in router("views").named_parameters() if name.startswith("merger.")]
    theirs = torch.nn.TransformerEncoderLayer(8, 8, 8)
    assert ours == [f"router.merger.{name}" for name, _ in theirs.named_parameters()]
    layer = EncoderLayer(8, 0.0)
    layer.load_state_dict(theirs.state_dict())
    assert all(torch.equal(*both) for both in zip(layer.state_dict().values(), theirs.state_dict().values(), strict=True))


def test_names_go_to_the_released_ones_and_come_back(oracle):
    stored = set(json.loads((oracle / "checkpoint" / "model.safetensors.index.json").read_text())["weight_map"])
    routers = {name for name in stored if name.startswith("model.router.")}
    assert {f"model.router.merger.self_attn.in_proj_{kind}" for kind in ("weight", "bias")} < routers
    own = {f"model.router.{name}" for name in router("views").state_dict()}
    assert {name_in_memory(name) for name in routers} == own and {name_in_checkpoint(name) for name in own} == routers


@pytest.mark.parametrize("axis", ["views", "tokens"])
@pytest.mark.parametrize("width", [None, 16])
def test_a_batch_of_images_scores_as_each_alone_in_both_forms(axis, width):
    module, features, text = router(axis, width), torch.randn(3, 2, 16, 8), torch.randn(3, 3, 8)
    with torch.no_grad():
        together = module(features, text)
        for index in range(3):
            torch.testing.assert_close(module(features[index : index + 1], text[index : index + 1])[0], together[index])
    assert together.shape == (3, 2)


def test_every_part_of_a_fresh_router_learns():
    module = router("tokens", 16)
    module(torch.randn(2, 2, 16, 8), torch.randn(2, 3, 8))[:, 0].sum().backward()
    silent = [name for name, parameter in module.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert silent == []
