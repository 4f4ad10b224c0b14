"""The four stages of training as a table: what is trained, with which loss and which defaults.

The defaults are the published hyper-parameters of AVG-LLaVA (arXiv 2410.02745 and the scripts of
`DeepLearnXMU/AVG-LLaVA`). A run logs what it trains, and a flag that contradicts the stage is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

PARTS = ("llm", "lora", "projector", "newline", "vision_tower", "router")
"""Parts of a model that stages train or freeze; `lora` exists where an adapter is attached to the `llm`."""

_PART_OF_PREFIX = {
    "model.mm_projector": "projector",
    "model.multi_modal_projector": "projector",
    "model.image_newline": "newline",
    "model.vision_tower": "vision_tower",
    "model.router": "router",
}


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    Attributes:
        name: value of `--stage`.
        trains: the parts that are trained unless a flag freezes one; an adapter is trained in place of its `llm`.
        loss: its key in `objectives.STAGE_LOSSES`.
        version: conversation template unless `--version` names another.
        learning_rate: of everything without a rate of its own.
        mm_vision_tower_lr: of the vision tower, `None` where it does not train.
        needs_granularities: whether a model with one granularity only is refused.
    """

    name: str
    trains: frozenset[str]
    loss: str
    version: str
    learning_rate: float
    mm_vision_tower_lr: float | None
    needs_granularities: bool


_ALL_BUT_ROUTER = frozenset({"llm", "projector", "newline", "vision_tower"})

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("align", frozenset({"projector"}), "token_mean", "plain", 1e-3, None, False),
        Stage("instruct", _ALL_BUT_ROUTER, "token_mean", "v1", 2e-5, 2e-6, False),
        Stage("multi_granularity", _ALL_BUT_ROUTER, "multi_granularity", "v1", 1e-5, 2e-5, True),
        Stage("rglf", frozenset({"router"}), "rglf", "v1", 1e-3, None, True),
    )
}


@dataclass(frozen=True)
class PartSummary:
    """A line of the table that a run logs: one part of the model."""

    part: str
    parameters: int
    trainable: int


def get_stage(name: str) -> Stage:
    """Look a stage up by name.

    Raises:
        ValueError: there is no such stage.
    """
    if name not in STAGES:
        raise ValueError(f"unknown stage {name!r}; choose one of {', '.join(STAGES)}.")
    return STAGES[name]


def part_of(parameter_name: str) -> str:
    """The part that a parameter belongs to, by its name in the model."""
    for prefix, part in _PART_OF_PREFIX.items():
        if parameter_name.startswith(prefix):
            return part
    return "lora" if ".lora_" in parameter_name else "llm"


def apply_stage(model: nn.Module, stage: Stage, frozen: Collection[str] = ()) -> list[PartSummary]:
    """Make exactly the parts of `stage` that are not in `frozen` trainable; an attached adapter stands for its `llm`.

    Of the vision tower, weights that no feature depends on stay frozen: they would never get a gradient, yet DDP would wait for one, weight
    decay would shrink them and the optimizer would keep their averages.

    Args:
        model: the multimodal language model.
        stage: a line of `STAGES`.
        frozen: parts that a flag takes out of the stage.

    Returns:
        Parameters and trained parameters of each part.

    Raises:
        ValueError: nothing is left to train.
    """
    training = stage.trains - set(frozen)
    if "llm" in training and any(part_of(name) == "lora" for name, _ in model.named_parameters()):
        training = (training - {"llm"}) | {"lora"}
    totals = dict.fromkeys(PARTS, 0)
    trainable = dict.fromkeys(PARTS, 0)
    unused = model.get_vision_tower().unused_weights() if "vision_tower" in training else []  # type: ignore[operator]
    never_read = {id(weight) for weight in unused}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        trains = part in training and id(parameter) not in never_read
        parameter.requires_grad_(trains)
        totals[part] += _elements(parameter)
        trainable[part] += _elements(parameter) if trains else 0
    if not sum(trainable.values()):
        raise ValueError(
            f"stage {stage.name} trains {', '.join(sorted(training)) or 'nothing'}, of which this model has no "
            "parameter; choose another stage or drop the flags that freeze its parts."
        )
    return [PartSummary(part, totals[part], trainable[part]) for part in PARTS if totals[part] or part != "lora"]


def _elements(parameter: nn.Parameter) -> int:
    """Number of weights in a parameter; bitsandbytes packs two 4-bit ones into a byte."""
    packed = getattr(parameter, "quant_state", None)
    return parameter.numel() if packed is None else packed.shape.numel()


def log_training_table(
    stage: Stage, summaries: Iterable[PartSummary], learning_rates: Mapping[str, float], weight_decay: float
) -> None:
    """Log which parts train, how many parameters they have, and their learning rate and weight decay."""
    lines = [f"stage {stage.name}, loss {stage.loss}", f"{'part':<14}{'parameters':>14}{'trained':>14}{'lr':>10} decay"]
    for line in summaries:
        rate = f"{learning_rates[line.part]:.3g}" if line.trainable else "-"
        decay = f"{weight_decay:g}" if line.trainable else "-"
        lines.append(f"{line.part:<14}{line.parameters:>14,}{line.trainable:>14,}{rate:>10} {decay}")
    logger.info("\n".join(lines))
