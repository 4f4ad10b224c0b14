"""The kept LLaVA door, and the choice of a device."""

from __future__ import annotations

import asyncio

import pytest
import torch

from llava import utils


def test_disable_torch_init_leaves_layers_initialised() -> None:
    utils.disable_torch_init()
    assert torch.nn.LayerNorm(4).weight.tolist() == [1.0] * 4
    assert 0 < torch.nn.Linear(64, 64).weight.abs().max() <= 0.125 + 1e-6


@pytest.mark.parametrize(("cuda", "mps", "device"), [(1, 1, "cuda"), (0, 1, "mps"), (0, 0, "cpu")])
def test_device_by_availability(cuda: int, mps: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cuda))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: bool(mps))
    assert utils.pick_device() == device


def test_only_the_first_process_prints(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    utils.rank0_print("hello", 7)
    monkeypatch.setenv("RANK", "1")
    utils.rank0_print("again")
    assert capsys.readouterr().out == "hello 7\n"


def test_a_semaphore_in_llavas_words() -> None:
    assert utils.pretty_print_semaphore(None) == "None"
    assert utils.pretty_print_semaphore(asyncio.Semaphore(3)) == "Semaphore(value=3, locked=False)"
