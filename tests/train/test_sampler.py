"""Grouped orders equal the recorded ones, and a sampler repeats itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llava.train.sampler import GroupedSampler, length_grouped_indices, modality_length_grouped_indices, split_evenly

RECORDS = json.loads((Path(__file__).parents[1] / "oracle" / "samplers.json").read_text())


@pytest.mark.parametrize("case", RECORDS["cases"], ids=lambda c: f"{c['lengths']}-w{c['world_size']}-s{c['seed']}")
def test_recorded_orders(case: dict) -> None:
    lengths, sizes = RECORDS["lengths"][case["lengths"]], (case["batch_size"], case["world_size"])
    torch.manual_seed(case["seed"])
    assert modality_length_grouped_indices(lengths, *sizes) == case["modality_grouped"]
    torch.manual_seed(case["seed"])
    assert length_grouped_indices([abs(length) for length in lengths], *sizes) == case["length_grouped"]
    torch.manual_seed(case["seed"] + 1)
    private = torch.Generator().manual_seed(case["seed"])
    order = modality_length_grouped_indices(lengths, *sizes, private)
    assert order == case["modality_grouped_generator_seed_and_global_seed_plus1"]


def test_sampler_depends_on_seed_and_epoch_alone() -> None:
    lengths = RECORDS["lengths"]["mixed37"]
    sampler = GroupedSampler(lengths, 4, 2, seed=7)
    first = list(sampler)
    torch.rand(3)
    assert list(sampler) == first and sorted(first) == list(range(len(lengths))) and len(sampler) == len(lengths)
    sampler.set_epoch(1)
    assert list(sampler) != first
    torch.manual_seed(7)
    assert first == modality_length_grouped_indices(lengths, 4, 2)
    assert sorted(GroupedSampler([3, 1, 2], 2, 1, 0, by_modality=False)) == [0, 1, 2]


def test_groups_do_not_mix_modalities() -> None:
    lengths = [10] * 8 + [-10] * 8
    order = modality_length_grouped_indices(lengths, 4, 1)
    for start in range(0, 8, 4):
        assert len({lengths[index] > 0 for index in order[start : start + 4]}) == 1


def test_edges() -> None:
    assert split_evenly([4, 3, 2, 1], [0, 1, 2, 3, 4], 2) == [[4, 1], [3, 2]]
    with pytest.raises(ValueError, match="row 1 has length 0"):
        modality_length_grouped_indices([1, 0], 1, 1)
