"""The models under transformers' tests: LlavaNext, and the native face in each form that a prompt can have.

Imported once transformers' `tests` can be (see `source.enter`).
"""

from __future__ import annotations

import json
import unittest
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextModel,
    LlavaNextProcessor,
    set_seed,
)

from llava.constants import DEFAULT_IMAGE_TOKEN, MICRO_MODEL
from llava.model.chat_template import add_image_token
from llava.model.native import (
    AvgLlavaConfig,
    AvgLlavaForConditionalGeneration,
    AvgLlavaImageProcessor,
    AvgLlavaModel,
    AvgLlavaProcessor,
)
from llava.tokenizer import load_tokenizer

IMAGE, SIDE, PATCH, VIEWS = 3, 8, 4, 2
FINEST, COARSEST = 4 + 2 * 3, 1 + 2
"""Visual tokens of a square image of two views: a grid, and a grid with a newline vector behind each row, at 2 x 2 and at 1."""

TEXT: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "projection_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}
ROUTED: dict[str, Any] = {"vis_token_granularity": [1, 4], "router_select": True, "filtered_text_num": 4, "router_hidden_size": 16}


class Tester:
    """What the mixins ask of a model: its configuration and inputs.

    Rows of one square image among words: as many as the tests take at most, since they would fill up with random ones, and with words on
    both sides of the image, since they hide the ends of rows.
    """

    batch_size, num_words = 7, 8
    hidden_size, num_hidden_layers, num_attention_heads = TEXT["hidden_size"], TEXT["num_hidden_layers"], TEXT["num_attention_heads"]
    image_size, patch_size, is_training = SIDE, PATCH, True
    config_class: type
    settings: dict[str, Any] = {}
    num_image_tokens = FINEST

    def __init__(self, parent: unittest.TestCase) -> None:
        self.parent = parent
        self.seq_length = self.encoder_seq_length = self.num_words + self.num_image_tokens

    def get_config(self) -> Any:
        return self.config_class(
            text_config=LlamaConfig(**TEXT),
            vision_config=CLIPVisionConfig(**TOWER),
            vision_feature_layer=-1,
            image_grid_pinpoints=[[SIDE, SIDE]],
            **self.settings,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        """The configuration, and a call of the model."""
        words = torch.randint(IMAGE + 1, TEXT["vocab_size"], (self.batch_size, self.num_words))
        image = torch.full((self.batch_size, self.num_image_tokens), IMAGE)
        ids = torch.cat([words[:, :4], image, words[:, 4:]], dim=1)
        return self.get_config(), {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.rand(self.batch_size, VIEWS, 3, SIDE, SIDE),
            "image_sizes": torch.tensor([[SIDE, SIDE]] * self.batch_size),
        }


class LlavaNextTester(Tester):
    config_class = LlavaNextConfig
    settings = {"image_token_id": IMAGE}


class SingleTester(Tester):
    """A model of one granularity."""

    config_class = AvgLlavaConfig
    settings = {"image_token_id": IMAGE}


class DecidedTester(SingleTester):
    """A model with a router, and prompts that have an image's tokens."""

    settings = {**SingleTester.settings, **ROUTED}


class CoarseTester(DecidedTester):
    """Prompts that have an image's tokens at the coarsest granularity."""

    num_image_tokens = COARSEST


class UndecidedTester(DecidedTester):
    """Prompts of one token per image, which the router decides."""

    num_image_tokens = 1


FORMS: dict[str, type[Tester]] = {
    "LlavaNext": LlavaNextTester,
    "single": SingleTester,
    "decided": DecidedTester,
    "coarse": CoarseTester,
    "undecided": UndecidedTester,
}
"""The first is what the others are compared with."""
REFERENCE = "LlavaNext"
PROCESSORS = (REFERENCE, "single")
"""Whose processor is tested; the forms of ours share one."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% if message['content'] is string %}{{ message['content'] }} {% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ part['text'] }} {% endgeneration %}{% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


TINY_MODELS = "TRANSFORMERS_TINY_MODEL_PATH"
"""The variable that names the folder of the models which the pipeline tests load."""


def classes(form: str) -> tuple[Any, Any, Any, Any]:
    """Model without and with its head, processor, and image processor of a form."""
    if form == REFERENCE:
        return LlavaNextModel, LlavaNextForConditionalGeneration, LlavaNextProcessor, LlavaNextImageProcessorPil
    return AvgLlavaModel, AvgLlavaForConditionalGeneration, AvgLlavaProcessor, AvgLlavaImageProcessor


def tokenizer() -> Any:
    """The micro model's, with an image token."""
    loaded = load_tokenizer(MICRO_MODEL)
    add_image_token(loaded)
    loaded._set_model_specific_special_tokens({"image_token": DEFAULT_IMAGE_TOKEN})
    return loaded


def model_case(form: str, root: Path) -> type[unittest.TestCase]:
    """The test case of a form: the mixins for models, generation and pipelines, as far as they were fetched."""
    from tests.generation.test_utils import GenerationTesterMixin
    from tests.test_modeling_common import ModelTesterMixin
    from tests.test_pipeline_mixin import PipelineTesterMixin

    inner, whole, _, _ = classes(form)
    pipelines = (PipelineTesterMixin,) if (root / "tests" / "pipelines").is_dir() else ()

    class Case(ModelTesterMixin, GenerationTesterMixin, *pipelines, unittest.TestCase):  # type: ignore[misc]
        all_model_classes = (inner, whole)
        additional_model_inputs = ["pixel_values", "image_sizes"]
        pipeline_model_mapping = {"image-text-to-text": whole}
        _is_composite = True
        skip_test_image_features_output_shape = True  # a list, of as many tokens as each image has
        test_can_init_all_missing_weights_before_2023 = True  # our files have no year by which it would be told

        def setUp(self) -> None:
            set_seed(0)
            self.model_tester = FORMS[form](self)

    return Case


def processor_case(form: str) -> type[unittest.TestCase]:
    """The test case of a form's processor."""
    from tests.test_processing_common import ProcessorTesterMixin

    _, _, processor, image_processor = classes(form)

    class Case(ProcessorTesterMixin, unittest.TestCase):  # type: ignore[misc]
        processor_class = processor

        @classmethod
        def _setup_tokenizer(cls) -> Any:
            return tokenizer()

        @classmethod
        def _setup_image_processor(cls) -> Any:
            return image_processor()

        @staticmethod
        def prepare_processor_dict() -> dict[str, Any]:
            return {"chat_template": CHAT_TEMPLATE, "patch_size": 128}

    return Case


def write_tiny_model(form: str, folder: Path) -> None:
    """The model of a form that the pipeline tests load, in place of one on the hub; its name is the same for every form of ours."""
    _, whole, processor, image_processor = classes(form)
    words = tokenizer()
    config = FORMS[form](unittest.TestCase()).get_config()
    config.text_config.vocab_size, config.image_token_id = len(words), words.convert_tokens_to_ids(DEFAULT_IMAGE_TOKEN)
    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    views = image_processor(image_grid_pinpoints=config.image_grid_pinpoints, **size)
    granularity = {} if form == REFERENCE else {"granularity_tokens": config.vis_token_granularity}
    target = folder / config.model_type / whole.__name__
    whole(config).save_pretrained(target)
    processor(views, words, patch_size=PATCH, chat_template=CHAT_TEMPLATE, **granularity).save_pretrained(target)


def write_summary(folder: Path) -> None:
    """The list of the models that the pipeline tests may load, read when they are imported."""
    summary = {}
    for form in FORMS:
        _, whole, _, image_processor = classes(form)
        summary[whole.__name__] = {"tokenizer_classes": [type(tokenizer()).__name__], "processor_classes": [image_processor.__name__]}
    report = folder / "reports" / "tiny_model_summary.json"
    report.parent.mkdir()
    report.write_text(json.dumps(summary))


def prepare_tests() -> None:
    """Make the tests find our classes by name, as they find transformers' own, and draw no image token among random ids."""
    from transformers.models.auto import modeling_auto

    from tests import test_modeling_common, test_pipeline_mixin

    inner, whole, processor, image_processor = classes("single")
    modeling_auto.MODEL_MAPPING_NAMES[AvgLlavaConfig.model_type] = inner.__name__
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[AvgLlavaConfig.model_type] = whole.__name__
    test_pipeline_mixin.PROCESSOR_MAPPING_NAMES[AvgLlavaConfig.model_type] = processor.__name__
    for known in (processor, image_processor):
        setattr(test_pipeline_mixin.transformers_module, known.__name__, known)
    draw = test_modeling_common.ids_tensor

    def words_only(*args: Any, **kwargs: Any) -> torch.Tensor:
        ids = draw(*args, **kwargs)
        return ids.masked_fill(ids == IMAGE, IMAGE + 1)

    test_modeling_common.ids_tensor = words_only
