"""Every way of decoding on prompts with one token per image, against plain forward passes over the expanded prompt."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LlamaForCausalLM, StaticCache
from transformers.generation import BaseStreamer, GenerationMixin

from llava.messages import RoutingRequest
from llava.model.native import AvgLlavaForConditionalGeneration
from tests.model.native.conftest import IMAGE, Batch, make_batch, native_twin

NEW = 6
DECODING: dict[str, Any] = {"max_new_tokens": NEW, "eos_token_id": -1, "pad_token_id": 0, "do_sample": False}
KNOWS_ENCODED_IMAGES = hasattr(GenerationMixin, "_expand_multimodal_outputs")
"""Whether this transformers cuts encoded images along with the chunks of a prompt, and lets a text model assist."""


def greedy(model: AvgLlavaForConditionalGeneration, batch: Batch) -> Tensor:
    """(B, L + new): no cache and no `generate`, the whole prompt through the model for each token."""
    ids, mask, images = batch.input_ids, batch.attention_mask, (batch.pixel_values, batch.image_sizes)
    encoded = None
    if len(batch.pixel_values):
        prompt = model.model.expand(*images, ids, attention_mask=mask)
        ids, mask, encoded = prompt.input_ids, prompt.attention_mask, {"image": prompt.image}
    length = ids.shape[1]
    for _ in range(NEW):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(ids, attention_mask=mask, position_ids=positions, mm_encoder_outputs=encoded, use_cache=False).logits[:, -1]
        logits[:, IMAGE] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, torch.ones_like(ids[:, :1])], dim=1)
    return torch.cat([batch.input_ids, ids[:, length:]], dim=1)


def text_only_assistant(model: AvgLlavaForConditionalGeneration) -> LlamaForCausalLM:
    assistant = LlamaForCausalLM(model.config.text_config).eval()
    assistant.model.load_state_dict(model.model.language_model.state_dict())
    assistant.lm_head.load_state_dict(model.lm_head.state_dict())
    return assistant


BATCHED: dict[str, Callable[[Any], dict[str, Any]]] = {
    "plain": lambda model: {},
    "without a cache": lambda model: {"use_cache": False},
    "static cache": lambda model: {"cache_implementation": "static"},
    "own dynamic cache": lambda model: {"past_key_values": DynamicCache(config=model.config)},
    "own static cache": lambda model: {"past_key_values": StaticCache(config=model.config, max_cache_len=512)},
}


@pytest.mark.parametrize("mode", BATCHED)
def test_a_padded_batch_of_two_one_and_no_images_is_answered_as_by_forward(
    native: AvgLlavaForConditionalGeneration, mixed: Batch, mode: str
) -> None:
    assert torch.equal(native.generate(**mixed.kwargs(), **DECODING, **BATCHED[mode](native)), greedy(native, mixed))


@pytest.mark.skipif(not KNOWS_ENCODED_IMAGES, reason="this transformers cuts no encoded images")
def test_a_prompt_is_read_in_chunks(native: AvgLlavaForConditionalGeneration, mixed: Batch) -> None:
    cache = DynamicCache(config=native.config)
    assert torch.equal(native.generate(**mixed.kwargs(), **DECODING, prefill_chunk_size=7, past_key_values=cache), greedy(native, mixed))


SINGLE: dict[str, Callable[[Any], dict[str, Any]]] = {
    "prompt lookup": lambda model: {"prompt_lookup_num_tokens": 3},
    "assisted by the same model": lambda model: {"assistant_model": model},
    "assisted by the text model": lambda model: {"assistant_model": text_only_assistant(model)},
}


@pytest.mark.parametrize("mode", [mode for mode in SINGLE if KNOWS_ENCODED_IMAGES or mode != "assisted by the text model"])
def test_one_prompt_is_answered_with_drafted_tokens(native: AvgLlavaForConditionalGeneration, mode: str) -> None:
    batch = make_batch([(9, ["square"])])
    assert torch.equal(native.generate(**batch.kwargs(), **DECODING, **SINGLE[mode](native)), greedy(native, batch))


def test_a_prompt_may_come_without_its_mask_or_as_the_first_argument(native: AvgLlavaForConditionalGeneration, mixed: Batch) -> None:
    kwargs, expected = mixed.kwargs(), greedy(native, mixed)
    del kwargs["attention_mask"]
    assert torch.equal(native.generate(**kwargs, **DECODING), expected)
    assert torch.equal(native.generate(kwargs.pop("input_ids"), **kwargs, **DECODING), expected)


@pytest.mark.parametrize("shapes", [["square"], ["wide", "odd"]])
def test_beams_are_those_over_the_spliced_embeddings(native: AvgLlavaForConditionalGeneration, shapes: list[str]) -> None:
    batch = make_batch([(8, shapes), (5, shapes[:1]), (7, [])])
    beams = {"max_new_tokens": NEW, "num_beams": 3, "num_return_sequences": 2, "eos_token_id": -1, "pad_token_id": 0, "do_sample": False}
    found = native.generate(**batch.kwargs(), **beams)
    prompt = native.model.expand(batch.pixel_values, batch.image_sizes, batch.input_ids, attention_mask=batch.attention_mask)
    embeds = native.get_input_embeddings()(prompt.input_ids)
    _, embeds = native.model._with_images(prompt.image, prompt.input_ids, embeds)
    expected = native.generate(inputs_embeds=embeds, attention_mask=prompt.attention_mask, **beams)
    length = batch.input_ids.shape[1]
    assert torch.equal(found[:, length:], expected)
    assert torch.equal(found[:, :length], batch.input_ids.repeat_interleave(2, 0))


def test_sampling_draws_as_from_the_expanded_prompt(native: AvgLlavaForConditionalGeneration) -> None:
    batch = make_batch([(9, ["odd"])])
    sampling = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": NEW, "eos_token_id": -1, "pad_token_id": 0}
    torch.manual_seed(0)
    found = native.generate(**batch.kwargs(), **sampling)[:, batch.input_ids.shape[1] :]
    prompt = native.model.expand(batch.pixel_values, batch.image_sizes, batch.input_ids)
    images = {"pixel_values": batch.pixel_values, "image_sizes": batch.image_sizes}
    torch.manual_seed(0)
    again = native.generate(prompt.input_ids, attention_mask=prompt.attention_mask, **images, **sampling)
    assert torch.equal(found, again[:, prompt.input_ids.shape[1] :])


def test_a_length_counts_the_given_prompt(native: AvgLlavaForConditionalGeneration) -> None:
    batch = make_batch([(9, ["square"])])
    assert native.generate(**batch.kwargs(), max_length=20, eos_token_id=-1, pad_token_id=0).shape[1] == 20
    settings = GenerationConfig(max_length=20, eos_token_id=-1, pad_token_id=0)
    for given in ({"generation_config": settings}, {}):
        native.generation_config.max_length = None if given else 20
        try:
            assert native.generate(**batch.kwargs(), eos_token_id=-1, pad_token_id=0, **given).shape[1] == 20
        finally:
            native.generation_config.max_length = None


def test_an_image_token_is_never_answered(native: AvgLlavaForConditionalGeneration, mixed: Batch) -> None:
    head = native.lm_head.weight.detach().clone()
    with torch.no_grad():
        native.lm_head.weight[IMAGE] = 100 * native.lm_head.weight.abs().max()
    try:
        for use_cache in (True, False):
            assert not (native.generate(**mixed.kwargs(), **DECODING, use_cache=use_cache)[:, -NEW:] == IMAGE).any()
    finally:
        native.lm_head.weight.data.copy_(head)


class Streamed(BaseStreamer):
    """Keeps the ids that it is given."""

    def __init__(self) -> None:
        self.ids: list[int] = []

    def put(self, value: Tensor) -> None:
        self.ids += value.flatten().tolist()

    def end(self) -> None:
        pass


def test_new_tokens_are_streamed(native: AvgLlavaForConditionalGeneration) -> None:
    batch, streamer = make_batch([(9, ["square"])]), Streamed()
    answer = native.generate(**batch.kwargs(), **DECODING, streamer=streamer)
    assert streamer.ids[-NEW:] == answer[0, -NEW:].tolist()


@pytest.mark.parametrize("again", [False, True], ids=["images once", "images given again"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_conversation_continues_from_its_cache(native: AvgLlavaForConditionalGeneration, rows: int, again: bool) -> None:
    batch = make_batch([(9, ["square"]), (5, ["odd"]), (7, ["wide"])][:rows])
    first = native.generate(**batch.kwargs(), **DECODING, return_dict_in_generate=True)
    question = torch.randint(3, 59, (1, 5), generator=torch.Generator().manual_seed(9)).expand(rows, -1)
    ids = torch.cat([first.sequences, question], dim=1)
    added = ids.shape[1] - batch.input_ids.shape[1]
    mask = torch.cat([batch.attention_mask, torch.ones(rows, added, dtype=torch.long)], dim=1)
    images = {"pixel_values": batch.pixel_values, "image_sizes": batch.image_sizes}
    found = native.generate(ids, attention_mask=mask, past_key_values=first.past_key_values, **(images if again else {}), **DECODING)
    prompt = native.model.expand(*images.values(), batch.input_ids, attention_mask=batch.attention_mask)
    whole = torch.cat([prompt.input_ids, ids[:, -added:]], dim=1)
    whole_mask = torch.cat([prompt.attention_mask, mask[:, -added:]], dim=1)
    expected = native.generate(whole, attention_mask=whole_mask, **images, **DECODING)
    assert torch.equal(found, torch.cat([ids, expected[:, -NEW:]], dim=1))


def test_a_conversation_continues_with_a_further_image(native: AvgLlavaForConditionalGeneration) -> None:
    batch, more = make_batch([(9, ["square"])]), make_batch([(6, ["odd"])], seed=3)
    first = native.generate(**batch.kwargs(), **DECODING, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, more.input_ids], dim=1)
    images = {"pixel_values": more.pixel_values, "image_sizes": more.image_sizes}
    found, routing = native.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=first.past_key_values, **images, **DECODING, output_routing=True
    )
    assert found.shape[1] == ids.shape[1] + NEW and len(routing) == 1


@pytest.mark.parametrize("again", [False, True], ids=["new images", "all images"])
@pytest.mark.parametrize("first_has_images", [False, True])
def test_a_batch_of_conversations_continues_with_a_further_image_each(
    native: AvgLlavaForConditionalGeneration, first_has_images: bool, again: bool
) -> None:
    shapes = [["square"], ["wide"]] if first_has_images else [[], []]
    first, more = make_batch([(9, shapes[0]), (5, shapes[1])]), make_batch([(6, ["odd"]), (6, ["tall"])], seed=3)
    settings = {**DECODING, "vis_token_granularity": 16}
    begun = native.generate(**first.kwargs(), **settings, return_dict_in_generate=True)
    ids = torch.cat([begun.sequences, more.input_ids], dim=1)
    mask = torch.cat([first.attention_mask, torch.ones(2, ids.shape[1] - first.input_ids.shape[1], dtype=torch.long)], dim=1)
    every, pixels, sizes = [[0], [1]], more.pixel_values, more.image_sizes
    if first_has_images:
        order = [0, 2, 1, 3]  # in reading order: each row's first image, then its further one
        every = [[0, 1], [2, 3]]
        pixels, sizes = torch.cat([first.pixel_values, pixels])[order], torch.cat([first.image_sizes, sizes])[order]
    new = {"pixel_values": more.pixel_values, "image_sizes": more.image_sizes}
    given = {"pixel_values": pixels, "image_sizes": sizes} if again else new
    found = native.generate(ids, attention_mask=mask, past_key_values=begun.past_key_values, **given, **settings)
    for row, images in enumerate(every):
        alone = {"pixel_values": pixels[images], "image_sizes": sizes[images]}
        expected = native.generate(ids[row, mask[row].bool()][None], **alone, **settings)
        assert torch.equal(found[row, -NEW:], expected[0, -NEW:])


def test_the_cache_of_another_prompt_is_refused(native: AvgLlavaForConditionalGeneration) -> None:
    batch = make_batch([(9, ["square"])])
    first = native.generate(**batch.kwargs(), **DECODING, return_dict_in_generate=True)
    other = {**batch.kwargs(), "input_ids": batch.input_ids.roll(1, 1)}
    with pytest.raises(ValueError, match="input_ids do not continue what past_key_values holds"):
        native.generate(**other, past_key_values=first.past_key_values, **DECODING)


@pytest.mark.parametrize("shapes", [["square"], []])
def test_a_new_image_token_needs_its_image(native: AvgLlavaForConditionalGeneration, shapes: list[str]) -> None:
    """Behind a cache no forward pass would look for it, and its embedding means nothing."""
    first = native.generate(**make_batch([(6, shapes)]).kwargs(), **DECODING, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, torch.tensor([[5, IMAGE, 7]])], dim=1)
    with pytest.raises(ValueError, match="1 image tokens behind what past_key_values holds, but no image; give pixel_values"):
        native.generate(ids, past_key_values=first.past_key_values, **DECODING)


def test_pixels_alone_are_no_prompt(native: AvgLlavaForConditionalGeneration) -> None:
    batch = make_batch([(6, ["square"])])
    with pytest.raises(ValueError, match="inputs_embeds are missing, expected .*; give input_ids or embeddings"):
        native.generate(pixel_values=batch.pixel_values, image_sizes=batch.image_sizes, **DECODING)



def test_the_cost_is_set_by_argument_and_by_generation_config(native: AvgLlavaForConditionalGeneration, mixed: Batch) -> None:
    def spent(**settings: Any) -> list[int]:
        return [report.granularity for report in native.generate(**mixed.kwargs(), **DECODING, output_routing=True, **settings)[1]]

    assert spent(vis_token_granularity=16) == [16] * 4
    assert set(spent(vis_token_granularity=[8, 32])) <= {8, 32}
    assert spent(granularity_bias=-100.0) == [4] * 4
    budget = native.generate(**mixed.row(0).kwargs(), **DECODING, output_routing=True, max_visual_tokens=60)[1]
    assert budget[0].num_visual_tokens <= 60
    native.generation_config.vis_token_granularity = 32
    try:
        assert spent() == [32] * 4 and spent(vis_token_granularity=8) == [8] * 4
    finally:
        del native.generation_config.vis_token_granularity
    settings = GenerationConfig(**DECODING, vis_token_granularity=4)
    routing = native.generate(mixed.input_ids, settings, **{**mixed.kwargs(), "input_ids": None}, output_routing=True)[1]
    assert [report.granularity for report in routing] == [4] * 4


def test_a_level_that_does_not_exist_and_missing_images_are_refused(native: AvgLlavaForConditionalGeneration, mixed: Batch) -> None:
    with pytest.raises(ValueError, match="vis_token_granularity is 7, but this model has"):
        native.generate(**mixed.kwargs(), vis_token_granularity=7)
    with pytest.raises(ValueError, match="The prompts have 4 image tokens but no image"):
        native.generate(input_ids=mixed.input_ids, attention_mask=mixed.attention_mask, **DECODING)


def test_a_default_of_the_generation_config_gives_way_to_decided_prompts_and_an_argument_does_not(
    native: AvgLlavaForConditionalGeneration, mixed: Batch, tmp_path: Path
) -> None:
    GenerationConfig(**DECODING, vis_token_granularity=32, max_visual_tokens=900, granularity_bias=-0.5).save_pretrained(tmp_path)
    settings = GenerationConfig.from_pretrained(tmp_path)
    images = {"pixel_values": mixed.pixel_values, "image_sizes": mixed.image_sizes}
    request = RoutingRequest(8)
    prompt = native.model.expand(*images.values(), mixed.input_ids, attention_mask=mixed.attention_mask, request=request)
    decided = {"input_ids": prompt.input_ids, "attention_mask": prompt.attention_mask, **images}
    _, found = native.generate(**mixed.kwargs(), generation_config=settings, output_routing=True)
    assert [report.granularity for report in found] == [32] * 4
    output, found = native.generate(**decided, generation_config=settings, output_routing=True)
    assert [report.granularity for report in found] == [8] * 4
    expected = native.generate(**mixed.kwargs(), **DECODING, vis_token_granularity=8)
    assert torch.equal(output[:, -NEW:], expected[:, -NEW:])
    with pytest.raises(ValueError, match="so a granularity, budget or bias cannot count"):
        native.generate(**decided, generation_config=settings, max_visual_tokens=900)


def test_only_the_last_position_of_a_prompt_has_logits(native: AvgLlavaForConditionalGeneration, mixed: Batch) -> None:
    seen: list[int] = []
    handle = native.lm_head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    native.generate(**mixed.kwargs(), **DECODING)
    handle.remove()
    assert seen == [1] * NEW


def test_scores_are_per_new_token_and_states_those_of_the_expanded_prompt(
    pair: tuple[Any, AvgLlavaForConditionalGeneration], mixed: Batch
) -> None:
    native = copy.deepcopy(pair[1])
    native.set_attn_implementation("eager")
    wanted = ("output_scores", "output_logits", "output_attentions", "output_hidden_states", "return_dict_in_generate")
    found = native.generate(**mixed.kwargs(), **DECODING, **dict.fromkeys(wanted, True))
    prompt = native.model.expand(mixed.pixel_values, mixed.image_sizes, mixed.input_ids, attention_mask=mixed.attention_mask)
    rows, length = prompt.input_ids.shape  # type: ignore[union-attr]
    assert found.sequences.shape == (rows, mixed.input_ids.shape[1] + NEW)
    for scores in (found.scores, found.logits):
        assert [tuple(step.shape) for step in scores] == [(rows, 64)] * NEW
    assert found.hidden_states[0][0].shape == (rows, length, 32) and found.hidden_states[1][0].shape == (rows, 1, 32)
    assert found.attentions[0][0].shape == (rows, 4, length, length) and found.attentions[1][0].shape == (rows, 4, 1, length + 1)
    assert found.past_key_values.get_seq_length() == length + NEW - 1


@pytest.mark.parametrize("num_beams", [1, 2])
def test_embeddings_with_image_tokens_are_answered_as_ids(
    native: AvgLlavaForConditionalGeneration, mixed: Batch, num_beams: int
) -> None:
    kwargs, settings = mixed.kwargs(), {**DECODING, "num_beams": num_beams}
    expected = native.generate(**kwargs, **settings)
    embeds = native.get_input_embeddings()(kwargs.pop("input_ids"))
    assert torch.equal(native.generate(inputs_embeds=embeds, **kwargs, **settings), expected[:, -NEW:])


def test_a_model_is_copied_after_it_has_answered(pair: tuple[Any, AvgLlavaForConditionalGeneration], mixed: Batch) -> None:
    native = native_twin(pair[0])
    expected = native.generate(**mixed.kwargs(), **DECODING)
    native(**mixed.kwargs(), labels=mixed.input_ids).loss.backward()
    assert torch.equal(copy.deepcopy(native).generate(**mixed.kwargs(), **DECODING), expected)


def test_llavas_placeholder_is_no_token_and_images_need_one(native: AvgLlavaForConditionalGeneration) -> None:
    batch = make_batch([(6, ["square"])])
    placeholder = {**batch.kwargs(), "input_ids": batch.input_ids.masked_fill(batch.input_ids == IMAGE, -200)}
    without_image = {name: placeholder[name] for name in ("input_ids", "attention_mask")}
    without_token = {**batch.kwargs(), "input_ids": batch.input_ids.masked_fill(batch.input_ids == IMAGE, 5)}
    for ask in (native, lambda **kwargs: native.generate(**kwargs, **DECODING)):
        for wrong, message in (
            (placeholder, r"The prompts have -200, LLaVA's placeholder .* write the image token, 60"),
            (without_image, r"The prompts have -200, LLaVA's placeholder"),
            (without_token, r"Image features and image tokens do not match: .* runs of \[\] image tokens, and the 1 images"),
        ):
            with pytest.raises(ValueError, match=message):
                ask(**wrong)
