"""Logging by rank, the kept LLaVA door, and the choice of a device."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from llava import utils


@pytest.fixture
def package_logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger("llava")
    before = list(logger.handlers), logger.level, logger.propagate
    logger.handlers = []
    yield logger
    logger.handlers, logger.level, logger.propagate = before


def test_setting_up_twice_writes_each_record_once(
    package_logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    utils.setup_logging()
    utils.setup_logging("DEBUG")
    logging.getLogger("llava.test").debug("hello %d", 7)
    assert capsys.readouterr().err.count("hello 7") == 1


def test_other_ranks_only_warn_and_say_who_they_are(
    package_logger: logging.Logger, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    utils.setup_logging()
    monkeypatch.setenv("RANK", "3")
    logging.getLogger("llava.test").info("quiet")
    logging.getLogger("llava.test").warning("loud")
    written = capsys.readouterr().err
    assert "quiet" not in written
    assert "[rank 3] loud" in written


def test_disable_torch_init_leaves_layers_initialised() -> None:
    utils.disable_torch_init()
    assert torch.nn.LayerNorm(4).weight.tolist() == [1.0] * 4
    assert 0 < torch.nn.Linear(64, 64).weight.abs().max() <= 0.125 + 1e-6


@pytest.mark.parametrize(("cuda", "mps", "device"), [(1, 1, "cuda"), (0, 1, "mps"), (0, 0, "cpu")])
def test_device_by_availability(cuda: int, mps: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cuda))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: bool(mps))
    assert utils.pick_device() == device
