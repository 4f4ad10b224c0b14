"""transformers' Trainer with this model's batches, losses, learning rates and checkpoints.

What is unlike the stock Trainer: the loss comes from the stage's lesson and not from the model's forward; parameter groups
follow the parts of the model; batches may be grouped by modality; checkpoints are complete or absent; a loss that is not
finite stops the run and says which rows made it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer

from llava.train.arguments import TrainingArguments
from llava.train.checkpoint import (
    complete_or_absent,
    keep_newest,
    publish,
    publish_into,
    restore_weights,
    save_projector,
    staging_folder,
)
from llava.train.features import FeatureCache
from llava.train.objectives import LESSONS, Batch, Lesson, RouterSettings, image_features
from llava.train.sampler import GroupedSampler
from llava.train.stages import part_of

OWN_RATE_PARTS = ("projector", "vision_tower")
"""Parts that can have a learning rate of their own, in the order of their groups."""


def decayed_names(model: nn.Module) -> set[str]:
    """Parameters that weight decay acts on: all but biases and the weights of normalisation layers."""
    names = set()
    for module_name, module in model.named_modules():
        if type(module).__name__.endswith("Norm"):
            continue
        for name, _ in module.named_parameters(recurse=False):
            if not name.endswith("bias"):
                names.add(f"{module_name}.{name}" if module_name else name)
    return names


def optimizer_groups(
    model: nn.Module, learning_rate: float, own_rates: Mapping[str, float], weight_decay: float
) -> list[dict[str, Any]]:
    """Parameter groups of what trains: with and without decay, for the model at large and for each part with its own rate.

    Args:
        model: parameters without a gradient are left out, and so are groups without parameters.
        learning_rate: of parts without a rate of their own.
        own_rates: part -> learning rate, for some of `OWN_RATE_PARTS`.
        weight_decay: of the decayed half of each pair of groups.

    Returns:
        Groups with `params`, `names`, `lr` and `weight_decay`.
    """
    decayed = decayed_names(model)
    pairs: dict[str, dict[bool, list[str]]] = {part: {True: [], False: []} for part in ("rest", *OWN_RATE_PARTS)}
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name in parameters:
        part = part_of(name)
        pairs[part if part in own_rates else "rest"][name in decayed].append(name)
    return [
        {
            "params": [parameters[name] for name in pair[decays]],
            "names": pair[decays],
            "lr": own_rates.get(part, learning_rate),
            "weight_decay": weight_decay if decays else 0.0,
        }
        for part, pair in pairs.items()
        for decays in (True, False)
        if pair[decays]
    ]


class LlavaTrainer(Trainer):
    """Trains one stage.

    Args:
        router_settings: how stage 4 teaches the router.
        feature_cache: tower features by picture; the tower must be frozen.
        kwargs: the stock Trainer's.
    """

    args: TrainingArguments
    model: Any
    train_dataset: Any
    loss_is_scaled_for_ga = False

    def __init__(
        self, *, router_settings: RouterSettings | None = None, feature_cache: FeatureCache | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        # Our losses are means over a micro-batch; without this the Trainer would scale them by the number of processes.
        self.model_accepts_loss_kwargs = False
        self.router_settings = router_settings or RouterSettings()
        self.feature_cache = feature_cache
        self._metrics: dict[str, list[Tensor | float]] = defaultdict(lambda: [0.0, 0.0])
        self._run_dir: Path | None = None
        self._vision_learns = any(
            parameter.requires_grad
            for name, parameter in self.model.named_parameters()
            if part_of(name) in ("projector", "vision_tower")
        )

    # ---- batches and optimiser

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not self.args.group_by_modality_length or dataset is None:
            return super()._get_train_sampler(dataset)
        return GroupedSampler(
            dataset.modality_lengths,
            self.args.train_batch_size,
            self.args.world_size * self.args.gradient_accumulation_steps,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimiser over the groups of `optimizer_groups`."""
        if self.optimizer is None:
            groups = optimizer_groups(
                self.model if model is None else model,
                self.args.learning_rates["llm"],
                self.own_rates(),
                self.args.weight_decay,
            )
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            plain = [{key: value for key, value in group.items() if key != "names"} for group in groups]
            self.optimizer = optimizer_class(plain, **options)
        return self.optimizer

    def own_rates(self) -> dict[str, float]:
        """The learning rates that parts have of their own in this run."""
        rates = {"projector": self.args.mm_projector_lr, "vision_tower": self.args.mm_vision_tower_lr}
        return {part: rate for part, rate in rates.items() if rate is not None}

    # ---- the loss

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The stage's loss of one batch; its parts go to the log.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        lesson = self._lesson(model, inputs)
        loss = float(lesson.loss.detach())
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} at step {self.state.global_step + 1}, rows {inputs['ids']} (numbers "
                f"{inputs['rows']}); look at these rows, lower --learning_rate, or use --bf16 instead of --fp16."
            )
        self._record(lesson, "" if model.training else "eval_")
        return (lesson.loss, {}) if return_outputs else lesson.loss

    def _lesson(self, model: nn.Module, batch: Batch) -> Lesson:
        bare = self.accelerator.unwrap_model(model)
        with self.accelerator.autocast():
            with torch.set_grad_enabled(self._vision_learns and torch.is_grad_enabled()):
                features = image_features(bare, batch, self.feature_cache)
            return LESSONS[self.args.stage_plan.loss](bare, batch, features, self.router_settings)

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """The loss of one evaluation batch."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            return self.compute_loss(model, inputs).detach(), None, None

    # ---- the log

    def _record(self, lesson: Lesson, prefix: str) -> None:
        for name, (total, weight) in lesson.metrics.items():
            entry = self._metrics[prefix + name]
            entry[0] = entry[0] + total
            entry[1] = entry[1] + weight

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the means of what the lessons reported since the last time."""
        for prefix, present in (("eval_", "eval_loss" in logs), ("", "loss" in logs)):
            names = [name for name in self._metrics if name.startswith("eval_") == (prefix == "eval_")]
            if present:
                for name in names:
                    total, weight = self._metrics.pop(name)
                    logs[name] = round(float(total) / max(float(weight), 1.0), 6)
        super().log(logs, start_time)

    # ---- checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._run_dir) if self._run_dir is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint under a hidden name and rename it when every process is done with it."""
        output = self.args.output_folder
        name = f"checkpoint-{self.state.global_step}"
        self._run_dir = staging_folder(output / name)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            run_dir, self._run_dir = self._run_dir, None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            publish(run_dir / name, output / name)
            run_dir.rmdir()
            if self.state.best_model_checkpoint:
                self.state.best_model_checkpoint = str(output / Path(self.state.best_model_checkpoint).name)
            keep_newest(output, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save and self.args.stage == "align":
            save_projector(self.accelerator.unwrap_model(self.model), Path(output_dir or self.args.output_folder))

    def save_final(self) -> None:
        """Put the finished model, its tokenizer and its config into the output folder, complete or not at all."""
        output = self.args.output_folder
        self.model.config.use_cache = True  # transformers' trainer switches it off while it trains
        with complete_or_absent(output / "final") as staging:
            self.save_model(str(staging))
        if self.args.should_save:
            publish_into(output / "final", output)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        restore_weights(self.accelerator.unwrap_model(model or self.model), Path(resume_from_checkpoint))
