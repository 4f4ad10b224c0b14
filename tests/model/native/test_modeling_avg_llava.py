"""The native model against LLaVA's face on the same weights, bit for bit, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from llava.messages import RoutingRequest
from llava.model import LlavaLlamaForCausalLM
from llava.model.native import AvgLlavaForConditionalGeneration
from llava.model.splice import IGNORE_INDEX, ContextLengthError
from tests.model.native.conftest import IMAGE, Batch, make_batch, native_twin

Pair = tuple[LlavaLlamaForCausalLM, AvgLlavaForConditionalGeneration]


@pytest.mark.parametrize("granularity", [None, 4, 16, 64])
def test_logits_are_those_of_llavas_face_in_a_mixed_batch(pair: Pair, mixed: Batch, granularity: int | None) -> None:
    llava, native = pair
    request = RoutingRequest(granularity)
    inputs = llava.encode_prompt(**mixed.llava(), request=request).inputs  # type: ignore[arg-type]
    expected = llava(inputs_embeds=inputs.inputs_embeds, attention_mask=inputs.attention_mask, position_ids=inputs.position_ids).logits
    images = mixed.pixel_values, mixed.image_sizes
    prompt = native.model.expand(*images, mixed.input_ids, attention_mask=mixed.attention_mask, request=request)
    assert torch.equal(prompt.attention_mask.bool(), inputs.attention_mask)
    found = native(prompt.input_ids, *images, prompt.attention_mask, position_ids=inputs.position_ids).logits
    assert torch.equal(found[inputs.attention_mask], expected[inputs.attention_mask])
    collapsed = native(**mixed.kwargs(), vis_token_granularity=granularity).logits
    assert collapsed.shape[:2] == mixed.input_ids.shape and prompt.last is not None
    behind = expected.gather(1, prompt.last[..., None].expand(-1, -1, expected.shape[-1]))
    keep = mixed.attention_mask.bool()
    torch.testing.assert_close(collapsed[keep], behind[keep], rtol=0, atol=1e-6)  # the head reads fewer rows at once


def test_the_router_chooses_as_under_llavas_face_and_not_always_the_same(pair: Pair) -> None:
    llava, native = pair
    chosen = set()
    for seed in range(8):
        batch = make_batch([(6 + seed, ["square"]), (5, ["wide", "odd"])], seed)
        expected = llava.route(**batch.llava())  # type: ignore[arg-type]
        found = native(**batch.kwargs()).routing
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours.logits, theirs.logits)
            assert (ours.granularity, ours.num_visual_tokens) == (theirs.granularity, theirs.num_visual_tokens)
            chosen.add(ours.granularity)
    assert len(chosen) > 1


def test_a_released_model_answers_with_the_recorded_numbers_under_both_faces(released: LlavaLlamaForCausalLM) -> None:
    spare = 5  # a token that no prompt below has
    batch = make_batch([(6, ["square"])])
    side = released.config.vision_config["image_size"]
    image = torch.randn(1, 5, 3, side, side, generator=torch.Generator().manual_seed(1))
    ids = batch.input_ids.masked_fill(batch.input_ids == IMAGE, -200).clamp(max=released.config.vocab_size - 1)
    ids = torch.where(ids == spare, spare + 1, ids)
    size = (2 * side, 2 * side)
    native = native_twin(released, spare)
    for granularity in [None, *released.config.vis_token_granularity]:
        expected, theirs = released.generate(
            ids, images=[image[0]], image_sizes=[size], vis_token_granularity=granularity, max_new_tokens=5, output_routing=True
        )
        found, ours = native.generate(
            ids.masked_fill(ids == -200, spare),
            pixel_values=image,
            image_sizes=torch.tensor([size]),
            vis_token_granularity=granularity,
            max_new_tokens=5,
            output_routing=True,
        )
        assert torch.equal(found[:, ids.shape[1] :], expected)
        assert ours[0].granularity == theirs[0].granularity


def test_a_batch_gives_the_logits_of_its_rows_alone(native: AvgLlavaForConditionalGeneration, mixed: Batch) -> None:
    together = native(**mixed.kwargs()).logits
    for index, keep in enumerate(mixed.attention_mask.bool()):
        alone = native(**mixed.row(index).kwargs()).logits[0]
        torch.testing.assert_close(together[index][keep], alone, rtol=0, atol=2e-6)


def test_ids_that_decide_are_read_and_no_router_is_asked(native: AvgLlavaForConditionalGeneration, mixed: Batch) -> None:
    for granularity in (4, 32):
        prompt = native.model.expand(
            mixed.pixel_values, mixed.image_sizes, mixed.input_ids, attention_mask=mixed.attention_mask, request=RoutingRequest(granularity)
        )
        output = native(
            input_ids=prompt.input_ids, attention_mask=prompt.attention_mask, pixel_values=mixed.pixel_values, image_sizes=mixed.image_sizes
        )
        assert [report.granularity for report in output.routing] == [granularity] * 4
        assert all(report.logits is None for report in output.routing)
        collapsed = native(**mixed.kwargs(), vis_token_granularity=granularity).logits
        assert prompt.last is not None
        kept = mixed.attention_mask.bool()
        expanded = output.logits.gather(1, prompt.last[..., None].expand(-1, -1, output.logits.shape[-1]))
        torch.testing.assert_close(expanded[kept], collapsed[kept], rtol=0, atol=2e-6)


def test_embeddings_in_place_of_ids_give_the_same(native: AvgLlavaForConditionalGeneration, mixed: Batch) -> None:
    kwargs = mixed.kwargs()
    expected = native(**kwargs).logits
    embeds = native.get_input_embeddings()(kwargs.pop("input_ids"))
    assert torch.equal(native(inputs_embeds=embeds, **kwargs).logits, expected)


def test_logits_to_keep_are_the_last(native: AvgLlavaForConditionalGeneration, mixed: Batch) -> None:
    whole = native(**mixed.kwargs()).logits
    assert torch.equal(native(**mixed.kwargs(), logits_to_keep=2).logits, whole[:, -2:])
    assert torch.equal(native(**mixed.kwargs(), logits_to_keep=torch.tensor([0, -1])).logits, whole[:, [0, -1]])


def test_an_answer_with_labels_is_hidden_from_the_router(native: AvgLlavaForConditionalGeneration) -> None:
    batch = make_batch([(12, ["square"])])
    labels = batch.input_ids.clone()
    labels[:, :-6] = IGNORE_INDEX
    before = native(**batch.kwargs(), labels=labels).routing[0].logits
    batch.input_ids[:, -6:] = batch.input_ids[:, -6:].roll(1, -1) % 50 + 3
    after = native(**batch.kwargs(), labels=labels).routing[0].logits
    assert torch.equal(before, after)


@pytest.mark.parametrize("training", [False, True])
def test_the_loss_of_a_batch_is_that_of_its_rows(pair: Pair, mixed: Batch, training: bool) -> None:
    """Labels on image tokens and padding count for nothing, on whichever side the padding is."""
    llava, native = pair
    native.train(training)
    try:
        loss = native(**mixed.kwargs(), labels=mixed.input_ids.clone(), vis_token_granularity=16).loss
        total, count = 0.0, 0
        for index in range(len(mixed.input_ids)):
            row = mixed.row(index)
            labels = row.input_ids.masked_fill(row.input_ids == IMAGE, IGNORE_INDEX)
            alone = native(**row.kwargs(), labels=labels, **({"vis_token_granularity": 16} if len(row.pixel_values) else {})).loss
            supervised = int((labels[:, 1:] != IGNORE_INDEX).sum())
            total, count = total + alone.item() * supervised, count + supervised
    finally:
        native.eval()
    assert loss.item() == pytest.approx(total / count, abs=2e-6)
    labels = mixed.input_ids.masked_fill((mixed.input_ids == IMAGE) | (mixed.attention_mask == 0), IGNORE_INDEX)
    theirs = llava(**mixed.llava(), labels=labels, vis_token_granularity=16).loss  # type: ignore[arg-type]
    assert loss.item() == pytest.approx(theirs.item(), abs=2e-6)


def test_a_mask_of_booleans_hides_nothing_from_the_router(native: AvgLlavaForConditionalGeneration, mixed: Batch) -> None:
    kwargs = mixed.kwargs()
    embeds = native.get_input_embeddings()(kwargs.pop("input_ids"))
    expected = [report.logits for report in native(**mixed.kwargs()).routing]
    kwargs["attention_mask"] = kwargs["attention_mask"].bool()
    for report, logits in zip(native(inputs_embeds=embeds, **kwargs).routing, expected, strict=True):
        assert torch.equal(report.logits, logits)


def test_a_prompt_longer_than_the_context_is_refused(native: AvgLlavaForConditionalGeneration) -> None:
    batch = make_batch([(6, ["square"] * 4)])
    with pytest.raises(ContextLengthError, match=r"Row 0 has \d+ tokens \(\d+ of them visual\), but the context of this model is 1024"):
        native(**batch.kwargs(), vis_token_granularity=64)
    with pytest.raises(ContextLengthError, match="but the context of this model is 1024"):
        native.generate(**batch.kwargs(), vis_token_granularity=64)


def test_images_behind_a_cache_stand_at_its_positions(native: AvgLlavaForConditionalGeneration) -> None:
    first, second = make_batch([(6, [])]), make_batch([(5, ["odd"])], seed=2)
    whole = torch.cat([first.input_ids, second.input_ids], dim=1)
    images = {"pixel_values": second.pixel_values, "image_sizes": second.image_sizes, "vis_token_granularity": 16}
    expected = native(whole, **images).logits[:, first.input_ids.shape[1] :]
    for mask in (None, torch.ones_like(second.input_ids), torch.ones_like(whole)):
        cache = native(first.input_ids, use_cache=True).past_key_values
        found = native(second.input_ids, attention_mask=mask, past_key_values=cache, **images).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_gradients_reach_every_part_but_the_router(pair: Pair, mixed: Batch) -> None:
    native = native_twin(pair[0]).train()
    labels = mixed.input_ids.masked_fill((mixed.input_ids == IMAGE) | (mixed.attention_mask == 0), IGNORE_INDEX)
    native(**mixed.kwargs(), labels=labels).loss.backward()
    gradients = {name: parameter.grad for name, parameter in native.named_parameters() if parameter.grad is not None}
    reached = {name.split(".")[1] for name, gradient in gradients.items() if gradient.abs().sum() > 0}
    assert reached == {"vision_tower", "multi_modal_projector", "image_newline", "language_model", "weight"}


def test_image_features_are_visual_tokens_of_a_level(native: AvgLlavaForConditionalGeneration, mixed: Batch) -> None:
    finest = native.get_image_features(mixed.pixel_values, mixed.image_sizes)
    coarse = native.get_image_features(mixed.pixel_values, mixed.image_sizes, vis_token_granularity=4)
    reports = native(**mixed.kwargs()).routing
    assert [len(tokens) for tokens in finest.pooler_output] == [report.full_visual_tokens for report in reports]
    assert [len(tokens) for tokens in coarse.pooler_output] == [report.tokens_per_level[4] for report in reports]


def test_a_saved_model_is_loaded_by_transformers_auto_class(native: AvgLlavaForConditionalGeneration, mixed: Batch, tmp_path: Path) -> None:
    native.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert isinstance(again, AvgLlavaForConditionalGeneration)
    assert torch.equal(again(**mixed.kwargs()).logits, native(**mixed.kwargs()).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values": torch.zeros(1, 5, 3, 8, 8)}, r"shape \(1, 5, 3, 8, 8\), expected \(images, views, 3, 32, 32\)"),
        ({"image_sizes": torch.tensor([[64, 64], [64, 64]])}, "1 images came with 2 image_sizes"),
        ({"image_sizes": torch.tensor([64, 64])}, r"image_sizes have the shape \(2,\), expected \(1, 2\)"),
        ({"image_sizes": torch.ones(1, 3)}, r"image_sizes have the shape \(1, 3\), expected \(1, 2\)"),
        ({"attention_mask": torch.ones(1, 3)}, r"attention_mask \(1, 3\), expected \(rows, positions\) of both"),
        ({"attention_mask": torch.ones(1, 1, 6, 6)}, r"attention_mask \(1, 1, 6, 6\), expected"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(1, 6, 7)}, r"inputs_embeds are of the shape \(1, 6, 7\), expected"),
        ({"vis_token_granularity": 7}, "vis_token_granularity is 7, but this model has"),
        ({"max_visual_tokens": 1}, "max_visual_tokens is 1"),
        ({"pixel_values": None}, "The prompts have 1 image tokens but no image"),
        ({"inputs_embeds": torch.zeros(1, 3, 32)}, "You must specify exactly one of input_ids or inputs_embeds"),
    ],
)
def test_input_that_cannot_work_is_named(native: AvgLlavaForConditionalGeneration, change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        native(**{**make_batch([(5, ["square"])]).kwargs(), **change})


def test_two_images_for_one_token_are_refused(native: AvgLlavaForConditionalGeneration) -> None:
    batch, two = make_batch([(5, ["square"])]), make_batch([(5, ["square", "odd"])])
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        native(batch.input_ids, two.pixel_values, two.image_sizes)
