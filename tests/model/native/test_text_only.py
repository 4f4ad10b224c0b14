"""A batch of text trains beside batches with images: the parts behind an image get gradients of zero, not none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForImageTextToText

from llava.model import LlavaLlamaForCausalLM
from llava.model.native import AvgLlavaForConditionalGeneration
from tests.model.native.conftest import Batch, make_batch, native_twin

Pair = tuple[LlavaLlamaForCausalLM, AvgLlavaForConditionalGeneration]


def batch_of(rank: int) -> Batch:
    return make_batch([(9, ["square"])]) if rank == 0 else make_batch([(7, [])], seed=1)


def loss_of(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """At a fixed level, as the router's dropout makes its choice a random one."""
    return model(**batch.kwargs(), labels=batch.input_ids.clone(), vis_token_granularity=16).loss


def trainable(model: AvgLlavaForConditionalGeneration) -> AvgLlavaForConditionalGeneration:
    """Without what no batch trains: the router, whose choice has no gradient, and the tower behind the chosen layer."""
    for name, parameter in model.named_parameters():
        behind = ("model.vision_tower.encoder.layers.1.", "model.vision_tower.post_layernorm.", "model.router.")
        parameter.requires_grad_(not name.startswith(behind))
    return model.train()


def test_text_gives_gradients_of_zero_and_the_loss_that_it_had(pair: Pair) -> None:
    text, model = batch_of(1), trainable(native_twin(pair[0]))
    loss = loss_of(model, text)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(gradient is not None for gradient in gradients.values())
    silent = {name.split(".")[1] for name, gradient in gradients.items() if not gradient.any()}  # type: ignore[union-attr]
    assert silent == {"vision_tower", "multi_modal_projector", "image_newline"}
    assert loss.item() == loss_of(model.eval(), text).item()


def _train(rank: int, folder: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    model = trainable(AutoModelForImageTextToText.from_pretrained(folder / "model"))
    together = DistributedDataParallel(model)
    batch = batch_of(rank)
    for _ in range(2):  # a gradient that is missing in one step is an error of the next
        model.zero_grad()
        loss_of(together, batch).backward()
    if rank == 0:
        torch.save({name: parameter.grad for name, parameter in model.named_parameters()}, folder / "gradients.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_of_which_one_has_text_only(pair: Pair, tmp_path: Path) -> None:
    """Without `find_unused_parameters`; the gradients are the means of those of each process alone."""
    pair[1].save_pretrained(tmp_path / "model")
    spawn(_train, (tmp_path,), nprocs=2)
    found = torch.load(tmp_path / "gradients.pt")
    alone = [trainable(native_twin(pair[0])) for _ in range(2)]
    for rank, model in enumerate(alone):
        loss_of(model, batch_of(rank)).backward()
    first, second = (dict(model.named_parameters()) for model in alone)
    for name, gradient in found.items():
        assert (gradient is None) == (not first[name].requires_grad)
        if gradient is not None:
            torch.testing.assert_close(gradient, (first[name].grad + second[name].grad) / 2)
