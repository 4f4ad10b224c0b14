"""The whole path: recorded generations, batches that equal their rows, one tower call, and refusals."""

from __future__ import annotations

import json

import pytest
import torch

from llava.model import LlavaConfig, LlavaLlamaForCausalLM, LlavaMistralConfig, LlavaMistralForCausalLM

GREEDY = {"do_sample": False, "max_new_tokens": 8}


def test_generation_equals_the_recorded_tokens(oracle, released, images):
    for case in json.loads((oracle / "generate.json").read_text())["cases"]:
        mask = None if case["attention_mask"] is None else torch.tensor(case["attention_mask"])
        out = released.generate(
            torch.tensor(case["input_ids"]),
            images=images.views(case["images"]) if case["images"] else None,
            image_sizes=images.sizes_of(case["images"]) if case["images"] else None,
            attention_mask=mask,
            vis_token_granularity=case["granularity"],
            max_new_tokens=case["max_new_tokens"],
            num_beams=case["num_beams"],
            do_sample=False,
        )
        expected = case["new_token_ids"]
        if case["padding_side"] == "right" and mask is not None:
            # The reference generates wrongly from right-padded rows; ours gives what the left-padded record says.
            expected = _recorded(oracle, case["name"].replace("right", "left"))["new_token_ids"]
        assert out.tolist() == expected, case["name"]


def _recorded(oracle, name):
    return next(case for case in json.loads((oracle / "generate.json").read_text())["cases"] if case["name"] == name)


def mixed_rows():
    """(ids, number of images) of rows with one, no and two images."""
    return [([1, -200, 5, 6, 7, 8, 9], 1), ([1, 10, 11, 12], 0), ([1, -200, 13, -200, 14], 2), ([1, 15, 16, 17, 18, 19, 20, 21, -200], 1)]


def pictures():
    torch.manual_seed(1)
    return [torch.randn(views, 3, 32, 32) for views in (5, 3, 3, 5)], [(60, 60), (30, 64), (64, 31), (50, 64)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("wish", [None, 16, [4, 64]])
def test_a_mixed_batch_generates_what_its_rows_generate_alone(new_model, side, wish):
    views, sizes = pictures()
    rows = [torch.tensor(ids) for ids, _ in mixed_rows()]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    together, reports = new_model.generate(
        ids, images=views, image_sizes=sizes, attention_mask=mask, vis_token_granularity=wish, output_routing=True, **GREEDY
    )
    start = 0
    for index, (row, (_, count)) in enumerate(zip(rows, mixed_rows(), strict=True)):
        stop = start + count
        alone, own = new_model.generate(
            row[None],
            images=views[start:stop] or None,
            image_sizes=sizes[start:stop] or None,
            vis_token_granularity=wish,
            output_routing=True,
            **GREEDY,
        )
        assert together[index, : alone.shape[1]].tolist() == alone[0].tolist()
        assert [report.granularity for report in reports[start:stop]] == [report.granularity for report in own]
        start = stop


def test_rows_of_one_batch_may_have_different_granularities(released, images):
    """The router of the recorded model chooses 72 and 18 here; each row still answers as alone."""
    names = ["wide", "tall"]
    ids = torch.tensor([[1, -200, 302, 267, 322, 270], [1, -200, 300, 376, 364, 275]])
    together, reports = released.generate(
        ids, images=images.views(names), image_sizes=images.sizes_of(names), output_routing=True, **GREEDY
    )
    assert len({report.granularity for report in reports}) == 2
    for index, name in enumerate(names):
        alone = released.generate(ids[index : index + 1], images=images.views([name]), image_sizes=images.sizes_of([name]), **GREEDY)
        assert together[index, : alone.shape[1]].tolist() == alone[0].tolist()


def test_an_image_is_encoded_once_however_many_granularities_are_scored(new_model):
    views, sizes = pictures()
    calls = []
    new_model.get_vision_tower().register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[0]))
    ids = torch.tensor([[1, -200, 5, -200, 6]])
    new_model.generate(ids, images=views[:2], image_sizes=sizes[:2], **GREEDY)
    assert calls == [8]  # both images' views in one call
    calls.clear()
    features = new_model.encode_views(views[:2])
    new_model.splice_levels(ids, None, None, features, sizes[:2], [4, 8, 16, 32, 64])
    new_model.route_logits(ids, None, None, features)
    assert calls == [8]


def test_routing_reports_and_the_callers_wishes(new_model):
    views, sizes = pictures()
    ids = torch.tensor([[1, -200, 5, 6]])
    report = new_model.route(ids, views[:1], sizes[:1])[0]
    torch.testing.assert_close(report.probabilities, report.logits.softmax(-1))
    assert report.tokens_per_level == {4: 4 + 16 + 4, 8: 8 + 32 + 8, 16: 16 + 64 + 8, 32: 32 + 128 + 16, 64: 64 + 256 + 16}
    assert report.full_visual_tokens == 336 and report.num_visual_tokens == report.tokens_per_level[report.granularity]
    assert report.granularity == list(report.tokens_per_level)[int(report.logits.argmax())]
    assert new_model.route(ids, views[:1], sizes[:1], granularity_bias=100.0)[0].granularity == 64
    assert new_model.route(ids, views[:1], sizes[:1], granularity_bias=-100.0)[0].granularity == 4
    assert new_model.route(ids, views[:1], sizes[:1], granularity_bias=100.0, max_visual_tokens=100)[0].num_visual_tokens == 88
    fixed = new_model.route(ids, views[:1], sizes[:1], vis_token_granularity=32)[0]
    assert fixed.granularity == 32 and torch.equal(fixed.logits, report.logits)


def test_generation_with_a_fixed_granularity_does_not_run_the_router(new_model):
    views, sizes = pictures()
    new_model.model.router.register_forward_pre_hook(lambda *_: pytest.fail("the router ran"))
    _, reports = new_model.generate(
        torch.tensor([[1, -200, 5, 6]]), images=views[:1], image_sizes=sizes[:1], vis_token_granularity=16, output_routing=True, **GREEDY
    )
    assert reports[0].granularity == 16 and reports[0].logits is None


def test_a_cached_step_and_text_come_back_untouched(new_model):
    ids, mask = torch.tensor([[7]]), torch.ones(1, 1)
    prepare = new_model.prepare_inputs_labels_for_multimodal
    assert prepare(ids, None, mask, "cache", None, [torch.zeros(1, 3, 32, 32)]) == (ids, None, mask, "cache", None, None)
    text = torch.tensor([[1, 5, 6]])
    assert prepare(text, None, None, None, text, None) == (text, None, None, None, None, text)


def test_the_loss_covers_supervised_tokens_only_and_reaches_every_part(new_model):
    new_model.model.router = None
    new_model.get_vision_tower().requires_grad_(True)
    views, sizes = pictures()
    ids = torch.tensor([[1, -200, 5, 6, 7]])
    labels = torch.tensor([[-100, -100, -100, 6, 7]])
    out = new_model(ids, labels=labels, images=views[:1], image_sizes=sizes[:1])
    expected = torch.nn.functional.cross_entropy(out.logits[0, -3:-1].float(), labels[0, -2:])
    torch.testing.assert_close(out.loss, expected)
    out.loss.backward()
    silent = {name.split(".")[1] for name, parameter in new_model.named_parameters() if parameter.grad is not None and parameter.grad.any()}
    assert {"vision_tower", "mm_projector", "image_newline", "layers", "embed_tokens"} <= silent


@pytest.mark.parametrize(
    ("ids", "count", "message"),
    [
        ([1, -200, -200, 5], 1, r"hold 2 image placeholders \(\[2\] by row\), but 1 images were given"),
        ([1, 5, 6], 1, "hold 0 image placeholders"),
        ([1, -200, 5], 0, "hold 1 image placeholders"),
        ([1, -200] + [5] * 1100, 1, r"Row 0 has 1\d\d\d tokens \(\d+ of them visual\), but the context of this model is 1024"),
    ],
)
def test_counts_that_disagree_and_rows_too_long_are_refused(new_model, ids, count, message):
    views, sizes = pictures()
    with pytest.raises(ValueError, match=message):
        new_model.generate(torch.tensor([ids]), images=views[:count] or None, image_sizes=sizes[:count] or None, **GREEDY)


def test_a_tiled_image_needs_its_size(new_model):
    views, _ = pictures()
    with pytest.raises(ValueError, match="An image of 5 views came without its size"):
        new_model.generate(torch.tensor([[1, -200]]), images=views[:1], **GREEDY)
    with pytest.raises(ValueError, match="2 images came with 1 image_sizes"):
        new_model.generate(torch.tensor([[1, -200, -200]]), images=views[:2], image_sizes=[(60, 60)], **GREEDY)


def test_non_finite_logits_stop_generation(new_model):
    new_model.lm_head.weight.data[3] = torch.nan
    with pytest.raises(FloatingPointError, match="non-finite logits"):
        new_model.generate(torch.tensor([[1, 5, 6]]), **GREEDY)


def test_images_in_half_precision_are_taken(new_model):
    """Stock lmms-eval hands float16 images over, on CPU too."""
    views, sizes = pictures()
    out = new_model.generate(inputs=torch.tensor([[1, -200, 5]]), images=[views[0].half()], image_sizes=sizes[:1], **GREEDY)
    assert out.shape[0] == 1


def test_a_language_model_without_a_tower_says_so():
    config = LlavaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    model = LlavaLlamaForCausalLM(config)
    with pytest.raises(ValueError, match="no vision tower"):
        model.encode_views([torch.zeros(1, 3, 32, 32)])


def test_mistral_takes_the_same_path(new_config):
    prefixes = ("mm_", "image_", "vis", "router", "filtered")
    shared = {name: getattr(new_config, name) for name in LlavaMistralConfig.__dataclass_fields__ if name.startswith(prefixes)}
    config = LlavaMistralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=64, **shared
    )
    model = LlavaMistralForCausalLM(config).eval()
    views, sizes = pictures()
    out, reports = model.generate(torch.tensor([[1, -200, 5]]), images=views[:1], image_sizes=sizes[:1], output_routing=True, **GREEDY)
    assert out.shape[1] <= 8 and reports[0].granularity in (4, 8, 16, 32, 64)
