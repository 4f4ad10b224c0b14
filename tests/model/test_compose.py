"""The composer on parts made by hand: what is encoded, how it is laid out, and what a plan says beforehand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from llava.crops import get_anyres_image_grid_shape
from llava.messages import RoutingRequest
from llava.model.compose import Composer, ImageInput
from llava.model.granularity import granularity_levels
from llava.model.llava_arch import image_inputs
from llava.model.routing import RoutingError
from llava.model.splice import ContextLengthError, prompt_rows

CONFIG = SimpleNamespace(
    levels=granularity_levels((2, 2), [1, 4], [[1, 1], [2, 2]]),
    patch_grid=(2, 2),
    mm_patch_merge_type="spatial_unpad",
    unpad_rule="picture",
    tiles_of=lambda size: get_anyres_image_grid_shape(size, [[2, 4], [4, 2], [4, 4]], 2),
    context_length=30,
)


class Parts(Composer):
    """A model of width 1: a patch is a pixel's red, a token its id, the newline -1. `<image>` is the token 9, as no LLaVA model has it."""

    router = None

    def __init__(self) -> None:
        self.config: Any = CONFIG
        self.newline = torch.tensor([-1.0])
        self.calls: list[int] = []

    def encode_images(self, images: Tensor) -> Tensor:  # type: ignore[override]
        self.calls.append(len(images))
        return images[:, 0].flatten(1)[..., None]

    def embed_text(self, ids: Tensor) -> Tensor:  # type: ignore[override]
        return ids[:, None].float()


def rows(*texts: list[int]) -> Any:
    return [prompt_rows(torch.tensor([ids]), None, None, image_token=9)[0] for ids in texts]


def views(count: int, value: float) -> Tensor:
    return torch.full((count, 3, 2, 2), value)


def test_an_image_object_is_encoded_once_and_an_encoded_one_not_at_all():
    model = Parts()
    shared = ImageInput(views(2, 0.5), (4, 2))
    known = ImageInput(torch.full((1, 4, 1), 0.25), is_encoded=True)
    first, again, same = model.with_features([shared, known, shared])
    assert model.calls == [2] and again is known and first.tensor is same.tensor
    assert first.is_encoded and first.size == (4, 2) and first.features.flatten().tolist() == [0.5] * 8
    assert model.with_features([first, again]) == [first, again] and model.calls == [2]


def test_a_single_view_without_the_axis_of_views_is_laid_out_flat():
    """LLaVA's 4-D tensor; the same view in a list, or with an axis of one view, ends with the newline vector."""
    model, prompt, fixed = Parts(), rows([9]), RoutingRequest(granularity=1)
    view = views(1, 0.5)
    for container, expected in ((view, [0.5]), ([view[0]], [0.5, -1.0]), (view[None], [0.5, -1.0]), ([view], [0.5, -1.0])):
        [image] = image_inputs(container)
        [encoded] = model.with_features([image])
        assert (image.is_flat, encoded.is_flat) == (len(expected) == 1,) * 2 and encoded.features.shape == (1, 4, 1)
        for given in (image, encoded):
            [composed] = model.compose(prompt, [given], fixed)
            assert composed.row.inputs_embeds.flatten().tolist() == expected
            assert composed.reports[0].num_visual_tokens == len(expected)


def test_containers_and_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"shapes \[\(1, 2, 2\)\], expected"):
        image_inputs([torch.zeros(2, 2)])
    with pytest.raises(ValueError, match="2 images came with 1 image_sizes"):
        image_inputs([views(1, 0.0)] * 2, [(2, 2)])
    assert image_inputs(None) == []


def test_a_plan_knows_the_costs_before_anything_is_computed():
    model = Parts()
    prompts, images = rows([1, 9, 9], [2], [9, 3]), [ImageInput(views(count, 0.0), (4, 2)) for count in (3, 1, 3)]
    plan = model.plan(prompts, images, [RoutingRequest(), RoutingRequest(), RoutingRequest(granularity=[4])])
    assert plan.owners == [range(0, 2), range(2, 2), range(2, 3)] and model.calls == []
    assert plan.costs(0) == [[4, 14], [2, 5]]  # 1 or 4 per view, and a newline per row of tiles, or one for a single view
    assert plan.cost_ranges(0) == [(4, 14), (2, 5)] and plan.cost_ranges(1) == [] and plan.cost_ranges(2) == [(14, 14)]
    assert [plan.asks_router(row) for row in range(3)] == [True, False, False]
    with pytest.raises(RoutingError, match="coarsest granularity allowed costs 6"):
        model.plan(prompts, images, RoutingRequest(max_visual_tokens=5))
    assert plan.choose({}) == [1, 1, 1]  # no router: the finest


def test_rows_and_reports_of_a_batch_by_hand():
    model = Parts()
    requests = [RoutingRequest(granularity=1), RoutingRequest(), RoutingRequest(granularity=4)]
    images = [ImageInput(views(3, 0.25), (4, 2)), ImageInput(views(1, 0.5), (2, 2))]
    first, second, third = model.compose(rows([1, 9], [2], [9, 3]), images, requests)
    assert first.row.inputs_embeds.flatten().tolist() == [1.0, 0.25, 0.25, 0.25, -1.0]
    assert second.row.inputs_embeds.flatten().tolist() == [2.0] and second.reports == []
    assert third.row.inputs_embeds.flatten().tolist() == [*[0.5] * 4, -1.0, 3.0]
    [report] = first.reports
    assert (report.granularity, report.num_visual_tokens, report.full_visual_tokens) == (1, 4, 14) and report.logits is None
    assert model.calls == [4]
    with pytest.raises(ContextLengthError, match="Row 0 has 32 tokens"):
        model.compose(rows([1] * 18 + [9]), images[:1], RoutingRequest(granularity=4))
    with pytest.raises(ValueError, match=r"The granularity is 2, but this model has \[1, 4\]"):
        model.level_of(2)
