"""A tiny native model, the same weights under LLaVA's face, and prompts with images of several shapes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model import LlavaLlamaForCausalLM
from llava.model.native import AvgLlavaForConditionalGeneration
from llava.model.native.llava_layout import TO_NATIVE, native_config, rename
from tests.model.conftest import tiny_config

IMAGE = 60
"""A token of the tiny vocabulary that no prompt uses otherwise."""


def native_twin(model: LlavaLlamaForCausalLM, image_token_id: int = IMAGE) -> AvgLlavaForConditionalGeneration:
    """The native model with the weights of one under LLaVA's face, whose vocabulary has a row to spare."""
    config = native_config(model.config, image_token_id, model.config.vocab_size)
    config.attn_implementation = model.config._attn_implementation
    twin = AvgLlavaForConditionalGeneration._from_config(config, attn_implementation=model.config._attn_implementation)
    twin.load_state_dict({rename(name, TO_NATIVE): tensor for name, tensor in model.state_dict().items()})
    twin.generation_config.pad_token_id = 0
    return twin.eval()


@dataclass
class Batch:
    """Prompts as the native processor gives them.

    input_ids, attention_mask: (B, L), padded on the left. pixel_values: (N, C, 3, S, S), zeros where an image has fewer views.
    image_sizes: (N, 2), (height, width).
    """

    input_ids: Tensor
    attention_mask: Tensor
    pixel_values: Tensor
    image_sizes: Tensor

    def kwargs(self) -> dict[str, Tensor]:
        return dict(vars(self)) if len(self.pixel_values) else {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    def row(self, index: int) -> Batch:
        """One prompt alone, without padding."""
        counts = (self.input_ids == IMAGE).sum(-1).tolist()
        images = slice(sum(counts[:index]), sum(counts[: index + 1]))
        keep = self.attention_mask[index].bool()
        ids, mask = self.input_ids[index, keep], self.attention_mask[index, keep]
        return Batch(ids[None], mask[None], self.pixel_values[images], self.image_sizes[images])

    def llava(self) -> dict[str, object]:
        """The same under LLaVA's contract."""
        views = [5 if height > 32 and width > 32 else 3 for height, width in self.image_sizes.tolist()]
        return {
            "input_ids": self.input_ids.masked_fill(self.input_ids == IMAGE, IMAGE_TOKEN_INDEX),
            "attention_mask": self.attention_mask,
            "images": [image[:count] for image, count in zip(self.pixel_values, views, strict=True)],
            "image_sizes": [(width, height) for height, width in self.image_sizes.tolist()],
        }


SIZES = {"square": (64, 64), "wide": (30, 64), "tall": (64, 28), "odd": (50, 61)}
"""(height, width) in pixels, for views of 32."""


def make_batch(rows: list[tuple[int, list[str]]], seed: int = 0, side: int = 32) -> Batch:
    """Prompts of random words.

    Args:
        rows: words of each prompt, and the shapes of its images, which stand one after the other behind the first word.
        side: of a view in pixels, for which the shapes are scaled.
    """
    draw = torch.Generator().manual_seed(seed)
    prompts = []
    for words, shapes in rows:
        text = torch.randint(3, 59, (words,), generator=draw)
        prompts.append(torch.cat([text[:1], torch.full((len(shapes),), IMAGE), text[1:]]))
    width = max(map(len, prompts))
    ids = torch.stack([torch.cat([torch.zeros(width - len(prompt), dtype=torch.long), prompt]) for prompt in prompts])
    mask = torch.stack([torch.arange(width) >= width - len(prompt) for prompt in prompts]).long()
    shapes = [shape for _, shapes in rows for shape in shapes]
    pixels = torch.randn(len(shapes), 5, 3, side, side, generator=draw)
    for index, shape in enumerate(shapes):
        if min(SIZES[shape]) <= 32:
            pixels[index, 3:] = 0
    return Batch(ids, mask, pixels, torch.tensor([SIZES[shape] for shape in shapes]).reshape(-1, 2) * side // 32)


@pytest.fixture(scope="module")
def pair() -> tuple[LlavaLlamaForCausalLM, AvgLlavaForConditionalGeneration]:
    """One set of weights under both faces. Shared: a test that changes it changes it back."""
    torch.manual_seed(2)
    model = LlavaLlamaForCausalLM(tiny_config()).eval()
    router = model.model.router
    for parameter in (router.voter, *(layer.weight for layer in router.modules() if isinstance(layer, torch.nn.Linear))):
        torch.nn.init.normal_(parameter, std=0.7)  # so that different prompts get different levels
    model.generation_config.pad_token_id = 0
    return model, native_twin(model)


@pytest.fixture(scope="module")
def native(pair: tuple[LlavaLlamaForCausalLM, AvgLlavaForConditionalGeneration]) -> AvgLlavaForConditionalGeneration:
    return pair[1]


@pytest.fixture
def mixed() -> Batch:
    """Prompts of unequal length with one image, two, none, and one."""
    return make_batch([(9, ["square"]), (5, ["wide", "odd"]), (7, []), (4, ["tall"])])
