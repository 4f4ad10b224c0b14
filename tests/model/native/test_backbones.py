"""Text models and towers of transformers' Auto classes, not a line written for any: batches, granularities, routing, saving, training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

from llava.inference import Assistant, Question
from llava.messages import Options, RoutingRequest
from llava.model.front import front_of
from llava.model.language_model.llava_native import LlavaNativeConfig, LlavaNativeForCausalLM
from llava.model.native import AvgLlavaConfig, AvgLlavaForConditionalGeneration
from llava.serve.protocol import Sampling
from tests.model.native.conftest import IMAGE, Batch, make_batch
from tests.serve.engine.test_embedded import all_at_once, request, serve

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TEXT |= {"head_dim": 8, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 1024}
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 4}
PAIRS = [
    ("mistral", "siglip_vision_model"),
    ("qwen2", "dinov2"),
    ("qwen3", "siglip_vision_model"),
    ("gemma3_text", "clip_vision_model"),
    ("phi3", "dinov2_with_registers"),
    ("smollm3", "clip_vision_model"),
]


@pytest.fixture(scope="module", params=PAIRS, ids=" and ".join)
def model(request: pytest.FixtureRequest) -> AvgLlavaForConditionalGeneration:
    text, tower = request.param
    torch.manual_seed(0)
    config = AvgLlavaConfig(
        text_config={"model_type": text, **TEXT},
        vision_config={"model_type": tower, **TOWER},
        image_token_id=IMAGE,
        image_grid_pinpoints=[[64, 64], [32, 64], [64, 32]],
        vis_token_granularity=[4, 16, 64],
        router_select=True,
        router_hidden_size=16,
        filtered_text_num=4,
    )
    return AvgLlavaForConditionalGeneration(config).eval()


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


@pytest.fixture
def batch() -> Batch:
    return make_batch([(9, ["square"]), (5, ["wide", "odd"]), (7, [])])


@pytest.mark.parametrize("granularity", [None, 4, 64])
def test_a_batch_answers_as_its_rows(model: AvgLlavaForConditionalGeneration, batch: Batch, granularity: int | None) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 4, "eos_token_id": -1, "pad_token_id": 0, "do_sample": False}
    together = model.generate(**batch.kwargs(), **settings, vis_token_granularity=granularity)
    for index in range(3):
        row = batch.row(index)
        alone = model.generate(**row.kwargs(), **settings, vis_token_granularity=granularity)
        assert torch.equal(together[index, -4:], alone[0, -4:])


def test_it_is_saved_and_loaded(model: AvgLlavaForConditionalGeneration, batch: Batch, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert torch.equal(again(**batch.kwargs()).logits, model(**batch.kwargs()).logits)


def test_a_step_of_training_reaches_tower_and_text_model(model: AvgLlavaForConditionalGeneration, batch: Batch) -> None:
    model.zero_grad()
    model(**batch.kwargs(), labels=batch.input_ids.clone()).loss.backward()
    for part in (model.model.vision_tower, model.model.multi_modal_projector, model.model.language_model):
        assert sum(parameter.grad.abs().sum() for parameter in part.parameters() if parameter.grad is not None) > 0


@pytest.mark.parametrize("granularity", [None, 4, [4, 64]])
def test_the_engine_and_the_assistant_answer_as_each_question_alone(assistant: Assistant, granularity: Any) -> None:
    """Whatever runs beside a question, whoever runs it: the same ids, chosen level and text."""
    routing = RoutingRequest(granularity)
    sizes = [(64, 64), (30, 64), (61, 50)]
    asked = [Question([scene(*size, seed)], f"w{9 + seed} w5 w{20 - seed}") for seed, size in enumerate(sizes)] + [Question([], "w7 w8")]
    options = Options(max_new_tokens=5, min_new_tokens=5, routing=routing)
    alone = [assistant.answer(each.images, each.messages, options) for each in asked]
    together = assistant.answer_batch(asked, options)
    assert [each.token_ids for each in together] == [each.token_ids for each in alone]
    levels = [[report.granularity for report in each.reports] for each in alone]
    assert [[report.granularity for report in each.reports] for each in together] == levels
    chosen = {level for row in levels for level in row}
    assert chosen <= ({4, 16, 64} if granularity is None else {4} if granularity == 4 else {4, 64})
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
    prompt = assistant.prompt_row("w7 w8 w9", 1)
    image = assistant.image_input(scene(64, 64, 3))
    [ours], [theirs] = ([row.reports[0] for row in model.compose([prompt], [image])] for model in (front, whole))
    assert torch.equal(ours.logits, theirs.logits) and ours.granularity == theirs.granularity
