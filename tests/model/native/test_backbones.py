"""Text models and towers of transformers' Auto classes, not a line written for any: one suite over pairs of them.

A few pairs run always, the others with `-m slow`.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedTokenizerFast

from llava.inference import Assistant, Question
from llava.messages import Options, RoutingRequest
from llava.model.front import front_of
from llava.model.language_model.llava_native import LlavaNativeConfig, LlavaNativeForCausalLM
from llava.model.native import AvgLlavaConfig, AvgLlavaForConditionalGeneration
from llava.serve.protocol import Sampling
from tests.model.native.conftest import IMAGE, Batch, make_batch
from tests.serve.engine.test_embedded import all_at_once, request, serve

# bitsandbytes packs 4-bit weights on a CPU in blocks of 64 inputs.
TEXT = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TEXT |= {"head_dim": 16, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 8192}
TEXTS: dict[str, dict[str, Any]] = {
    **{kind: {} for kind in ("llama", "qwen2", "qwen3", "phi3", "smollm3")},
    # The embedded engine's batches cannot attend to a window that is shorter than the context.
    "mistral": {"sliding_window": None},
    "gemma3_text": {"sliding_window": 8192},
    "qwen3_moe": {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2},
}
"""Model type of a text model -> what its configuration says beside `TEXT`."""

VISION = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 4}
HALVED = {"vis_token_granularity": [4, 16, 64]}
TOWERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "CLIP": ("clip_vision_model", {}, HALVED),
    "SigLIP": (
        "siglip_vision_model",
        {"image_size": 54, "patch_size": 2},  # 27x27, which no halving divides
        {"vis_token_granularity": [9, 81, 729], "vis_token_grids": [[3, 3], [9, 9], [27, 27]]},
    ),
    "SigLIP2": ("siglip_vision_model", {"patch_size": 2}, {"vis_token_granularity": [16, 64, 256]}),  # of one resolution: SigLIP's class
    "DINOv2": ("dinov2", {}, HALVED),
    "DINOv2 with registers": ("dinov2_with_registers", {"num_register_tokens": 4}, HALVED),
    "DINOv3": ("dinov3_vit", {"num_register_tokens": 4}, HALVED),
}
"""Name -> model type, what its configuration says beside `VISION`, and the granularities of its grid."""

FAST = [("mistral", "SigLIP2"), ("qwen2", "DINOv2"), ("gemma3_text", "CLIP"), ("phi3", "DINOv2 with registers")]
SLOW = [
    ("llama", "CLIP"),
    ("llama", "DINOv3"),
    ("mistral", "SigLIP"),
    ("qwen2", "SigLIP"),
    ("qwen3", "SigLIP2"),
    ("qwen3", "DINOv2 with registers"),
    ("gemma3_text", "DINOv3"),
    ("phi3", "CLIP"),
    ("qwen3_moe", "SigLIP2"),
    ("smollm3", "DINOv2"),
]
PAIRS = [*FAST, *(pytest.param(pair, marks=pytest.mark.slow) for pair in SLOW)]
PARTS = ("vision_tower", "language_model")
GENERATE: dict[str, Any] = {"max_new_tokens": 4, "eos_token_id": -1, "pad_token_id": 0, "do_sample": False}


@pytest.fixture(scope="module", params=PAIRS, ids=" and ".join)
def model(request: pytest.FixtureRequest) -> AvgLlavaForConditionalGeneration:
    text, (tower, vision, granularities) = request.param[0], TOWERS[request.param[1]]
    side = {**VISION, **vision}["image_size"]
    torch.manual_seed(0)
    config = AvgLlavaConfig(
        text_config={"model_type": text, **TEXT, **TEXTS[text]},
        vision_config={"model_type": tower, **VISION, **vision},
        image_token_id=IMAGE,
        image_grid_pinpoints=[[2 * side, 2 * side], [side, 2 * side], [2 * side, side]],
        router_select=True,
        router_hidden_size=16,
        filtered_text_num=4,
        **granularities,
    )
    model = AvgLlavaForConditionalGeneration(config).eval()
    router = model.model.router
    assert router is not None
    for parameter in (router.voter, *(layer.weight for layer in router.modules() if isinstance(layer, torch.nn.Linear))):
        torch.nn.init.normal_(parameter, std=0.7)  # so that its logits hang on the prompt
    return model


@pytest.fixture(scope="module")
def folder(model: AvgLlavaForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    saved = tmp_path_factory.mktemp("pair") / "model"
    model.save_pretrained(saved)
    return saved


@pytest.fixture(scope="module")
def assistant(model: AvgLlavaForConditionalGeneration) -> Assistant:
    """The same weights under LLaVA's face, with a tokenizer of as many words."""
    config = LlavaNativeConfig.from_dict(model.config.to_dict())
    config.image_aspect_ratio = "anyres"
    face = LlavaNativeForCausalLM(config).eval()
    face.load_state_dict(model.state_dict())
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(4, IMAGE)), "<image>", "USER:", "ASSISTANT:", "\n"]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return Assistant(PreTrainedTokenizerFast(tokenizer_object=backend, **names), face, face.get_vision_tower().image_processor)


def scene(width: int, height: int, seed: int) -> Image.Image:
    pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.numpy())


def tokens(model: AvgLlavaForConditionalGeneration) -> list[int]:
    """Tokens per view of its levels, coarse to fine."""
    return [level.tokens for level in model.config.levels]


@pytest.fixture(scope="module")
def batch(model: AvgLlavaForConditionalGeneration) -> Batch:
    return make_batch([(9, ["square"]), (5, ["wide", "odd"]), (7, [])], side=model.config.view_side)


@pytest.mark.parametrize("level", [None, 0, -1], ids=["routed", "coarsest", "finest"])
def test_a_batch_answers_as_its_rows(model: AvgLlavaForConditionalGeneration, batch: Batch, level: int | None) -> None:
    settings = {**GENERATE, "output_routing": True, "vis_token_granularity": None if level is None else tokens(model)[level]}
    together, reports = model.generate(**batch.kwargs(), **settings)
    alone = [model.generate(**batch.row(index).kwargs(), **settings) for index in range(3)]
    for index, (ids, _) in enumerate(alone):
        assert torch.equal(together[index, -4:], ids[0, -4:])
    expected = [report for _, own in alone for report in own or []]
    assert [report.granularity for report in reports] == [report.granularity for report in expected]
    assert [report.num_visual_tokens for report in reports] == [report.num_visual_tokens for report in expected]
    if level is not None:
        assert {report.granularity for report in reports} == {tokens(model)[level]}


def test_wishes_bound_the_routers_choice_which_hangs_on_the_prompt(model: AvgLlavaForConditionalGeneration) -> None:
    coarse, middle, fine = tokens(model)
    prompts = [make_batch([(6 + seed, ["wide"])], seed, model.config.view_side) for seed in range(4)]

    def chosen(**wish: Any) -> list[int]:
        return [model(**prompt.kwargs(), **wish).routing[0].granularity for prompt in prompts]

    assert len({tuple(model(**prompt.kwargs()).routing[0].logits.tolist()) for prompt in prompts}) == len(prompts)
    assert set(chosen(vis_token_granularity=[coarse, middle])) <= {coarse, middle}
    assert set(chosen(granularity_bias=-100.0)) == {coarse} and set(chosen(granularity_bias=100.0)) == {fine}
    costs = [model(**prompt.kwargs(), max_visual_tokens=5 * middle).routing[0].num_visual_tokens for prompt in prompts]
    assert max(costs) <= 5 * middle


def test_it_is_saved_and_loaded(model: AvgLlavaForConditionalGeneration, batch: Batch, folder: Path) -> None:
    again = AutoModelForImageTextToText.from_pretrained(folder).eval()
    assert torch.equal(again(**batch.kwargs()).logits, model(**batch.kwargs()).logits)


def test_steps_of_training_reach_what_the_answer_hangs_on_and_lower_the_loss(model: AvgLlavaForConditionalGeneration, batch: Batch) -> None:
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(**batch.kwargs(), labels=batch.input_ids, vis_token_granularity=tokens(model)[0]).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[0] > losses[1] > losses[2]
    names = [name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()]
    assert {name.split(".")[1] for name in names if name.startswith("model.")} == {
        "vision_tower",
        "multi_modal_projector",
        "image_newline",
        "language_model",
    }
    layers = {part: {match[1] for name in names if (match := re.search(rf"{part}.*\.layers?\.(\d+)\.", name))} for part in PARTS}
    assert layers == {"vision_tower": {"0"}, "language_model": {"0", "1"}}  # the features are those before the tower's last layer


def test_an_adapter_on_every_linear_layer_counts_the_same_merged_and_unmerged(
    model: AvgLlavaForConditionalGeneration, batch: Batch, folder: Path, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=4, target_modules="all-linear")).eval()
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    wrapped = {name.split(".")[3] for name, _ in adapted.named_parameters() if ".lora_B." in name}
    assert wrapped == {"vision_tower", "multi_modal_projector", "router", "language_model"}

    def outputs(model: Any) -> torch.Tensor:
        logits = model(**batch.kwargs(), vis_token_granularity=tokens(model)[0]).logits[batch.attention_mask.bool()]
        return torch.cat([logits.flatten(), *(report.logits for report in model(**batch.kwargs()).routing)]).detach()

    expected = outputs(adapted)
    assert (expected - outputs(model)).abs().max() > 1e-2
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(folder), tmp_path).eval()
    weights, loaded = adapted.state_dict(), again.state_dict()
    assert weights.keys() == loaded.keys() and all(torch.equal(weights[name], loaded[name]) for name in weights)
    torch.testing.assert_close(outputs(again), expected, rtol=0, atol=5e-6)  # weights at other addresses, sums in another order
    torch.testing.assert_close(outputs(adapted.merge_and_unload()), expected, rtol=0, atol=5e-5)  # (W + s B A) x, in float32


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_weights_answer_nearly_as_whole_ones(model: AvgLlavaForConditionalGeneration, batch: Batch, folder: Path, bits: int) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    packed = AutoModelForImageTextToText.from_pretrained(folder, quantization_config=config, dtype=torch.float32).eval()
    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    found = {name.split(".")[1] for name, module in packed.named_modules() if isinstance(module, kinds)}
    assert found == {"vision_tower", "multi_modal_projector", "language_model"}
    level = tokens(model)[0]
    keep = batch.attention_mask.bool()
    logits = [each(**batch.kwargs(), vis_token_granularity=level).logits[keep].flatten() for each in (packed, model)]
    assert torch.cosine_similarity(*logits, dim=0) > (0.99 if bits == 8 else 0.9)
    assert packed.generate(**batch.kwargs(), **GENERATE).shape[1] == batch.input_ids.shape[1] + 4


@pytest.mark.parametrize("levels", [None, [0], [0, -1]], ids=["routed", "coarsest", "either"])
def test_the_engine_the_assistant_and_the_native_model_answer_as_each_question_alone(
    model: AvgLlavaForConditionalGeneration, assistant: Assistant, levels: list[int] | None
) -> None:
    """Whatever runs beside a question, whoever runs it: the same ids, chosen level and text."""
    side = model.config.view_side
    granularity: Any = levels and [tokens(model)[level] for level in levels]
    routing = RoutingRequest(granularity)
    sizes = [(2 * side, 2 * side), (side - 2, 2 * side), (2 * side - 3, side + 18)]
    asked = [Question([scene(*size, seed)], f"w{9 + seed} w5 w{20 - seed}") for seed, size in enumerate(sizes)] + [Question([], "w7 w8")]
    options = Options(max_new_tokens=5, min_new_tokens=5, routing=routing)
    alone = [assistant.answer(each.images, each.messages, options) for each in asked]
    together = assistant.answer_batch(asked, options)
    assert [each.token_ids for each in together] == [each.token_ids for each in alone]
    chosen = [[report.granularity for report in each.reports] for each in alone]
    assert [[report.granularity for report in each.reports] for each in together] == chosen
    assert {level for row in chosen for level in row} <= set(granularity or tokens(model))
    for question, answer, levels_alone in zip(asked, alone, chosen, strict=True):
        row = assistant.prompt_row(question.messages, len(question.images))
        images = [assistant.image_input(image) for image in question.images]
        inputs: dict[str, Any] = {"input_ids": row.ids.masked_fill(row.is_image, IMAGE)[None]}
        if images:
            sizes_of = [[image.size[1], image.size[0]] for image in images if image.size]
            inputs |= {"pixel_values": torch.stack([image.views for image in images]), "image_sizes": torch.tensor(sizes_of)}
        wanted = {"max_new_tokens": 5, "min_new_tokens": 5, "eos_token_id": 2, "pad_token_id": 0, "suppress_tokens": [IMAGE]}
        ids, reports = model.generate(**inputs, **wanted, do_sample=False, vis_token_granularity=granularity, output_routing=True)
        assert ids[0, -5:].tolist() == answer.token_ids
        assert [report.granularity for report in reports or []] == levels_alone
    requests = [
        request(
            each.images[0] if each.images else None,
            str(each.messages),
            sampling=Sampling(max_new_tokens=5, min_new_tokens=5),
            routing=routing,
        )
        for each in asked
    ]
    outcomes = serve(assistant, all_at_once(*requests))
    assert [outcome.text.strip() for outcome in outcomes] == [each.text for each in alone]


def test_the_front_of_a_model_routes_as_the_whole(assistant: Assistant) -> None:
    whole = assistant.model
    front = front_of(LlavaNativeForCausalLM)(whole.config).eval()
    front.load_state_dict(whole.state_dict(), strict=False)
    assert not any(".layers." in name for name, _ in front.model.language_model.named_parameters())
    side = whole.config.view_side
    prompt = assistant.prompt_row("w7 w8 w9", 1)
    image = assistant.image_input(scene(2 * side, 2 * side, 3))
    [ours], [theirs] = ([row.reports[0] for row in model.compose([prompt], [image])] for model in (front, whole))
    assert torch.equal(ours.logits, theirs.logits) and ours.granularity == theirs.granularity


def test_a_tower_of_changing_resolution_is_refused() -> None:
    with pytest.raises(ValueError, match=r"vision_config.image_size of a siglip2_vision_model is None"):
        AvgLlavaConfig(vision_config={"model_type": "siglip2_vision_model", "hidden_size": 64})
