"""transformers' Trainer with this model's batches, losses, learning rates and checkpoints.

Differences from the stock Trainer: the loss comes from the stage's function in `objectives.py`, not from the model's forward; it is a mean
over the whole step, over all processes and accumulated batches; parameter groups follow the parts of the model; batches may be grouped by
modality; checkpoints are complete or absent; a loss that is not finite stops the run and names the rows of its batch.
"""

from __future__ import annotations

import logging
import math
import resource
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from llava.durable import publish, remove_folder, room_for, staging_folder, whole_folder
from llava.train.arguments import TrainingArguments
from llava.train.checkpoint import FINISHED, checkpoints, keep_newest, publish_into, restore_weights, save_projector, write_manifest
from llava.train.distributed import call_through
from llava.train.features import FeatureCache
from llava.train.objectives import STAGE_LOSSES, Batch, RouterSettings, StageLoss, count_items, image_features
from llava.train.run_folder import random_state_file
from llava.train.sampler import GroupedSampler
from llava.train.stages import part_of

logger = logging.getLogger(__name__)

OWN_RATE_PARTS = ("projector", "vision_tower")
"""Parts that can have a learning rate of their own, in the order of their groups."""


def decayed_names(model: nn.Module) -> set[str]:
    """Parameters that weight decay applies to: all but biases and the weights of normalisation layers."""
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
    """Parameter groups of the trainable parameters: with and without decay, for each part with its own rate and for the rest.

    Args:
        model: frozen parameters are left out, and so are empty groups.
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


def peak_memory_gb() -> float:
    """Peak memory of this process so far: of its GPU where it has one, otherwise resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class _EpochOfSampler(TrainerCallback):
    """Tells the sampler which epoch begins, which the wrappers around it in a distributed or resumed run do not."""

    def __init__(self, trainer: LlavaTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the epoch; the state's is a fraction within an epoch and an integer, up to rounding, between two."""
        if self.trainer._sampler is not None:
            self.trainer._sampler.set_epoch(int((state.epoch or 0.0) + 1e-6))


class LlavaTrainer(Trainer):
    """Trains one stage.

    Args:
        router_settings: how stage 4 trains the router.
        feature_cache: tower features by image; the tower must be frozen.
        kwargs: the stock Trainer's.

    Attributes:
        steps_without_items: steps of this run without any item in the loss.
        lost_state: state files of a checkpoint that are missing or damaged; that state is initialised again.
    """

    args: TrainingArguments
    model: Any
    train_dataset: Any

    def __init__(
        self, *, router_settings: RouterSettings | None = None, feature_cache: FeatureCache | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        # Our losses are divided by the items of the whole step, so the Trainer must not divide them by the accumulated batches.
        self.model_accepts_loss_kwargs = True
        self.router_settings = router_settings or RouterSettings()
        self.feature_cache = feature_cache
        self._metrics: dict[str, list[Tensor | float]] = defaultdict(lambda: [0.0, 0.0])
        self._counted_since = time.monotonic()
        self._tokens_read = 0.0
        self._loss_is_finite = True
        self._step_is_broken = False
        self.steps_skipped = 0
        self.steps_without_items = 0
        self._evaluated = [0.0, 0.0]
        self._run_dir: Path | None = None
        self.lost_state: frozenset[str] = frozenset()
        self._sampler: GroupedSampler | None = None
        self.add_callback(_EpochOfSampler(self))
        self._vision_trains = any(
            parameter.requires_grad
            for name, parameter in self.model.named_parameters()
            if part_of(name) in ("projector", "vision_tower")
        )

    # ---- batches and optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not self.args.group_by_modality_length or dataset is None:
            return super()._get_train_sampler(dataset)
        self._sampler = GroupedSampler(
            dataset.modality_lengths,
            self.args.train_batch_size,
            self.args.world_size * self.args.gradient_accumulation_steps,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
        )
        return self._sampler

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer over the groups of `optimizer_groups`."""
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

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Tensor:
        """Number of items that the loss of a step is a mean over, in all accumulated batches of all processes."""
        own = sum(count_items(batch, self.args.stage_plan.loss) for batch in batch_samples)
        items = self.accelerator.reduce(torch.tensor(float(own), device=device), reduction="sum")
        if not items:
            self.steps_without_items += 1
            if self.steps_without_items == 1:
                logger.warning(
                    "step %d has a loss of 0 and trains nothing, because rows %s have nothing to train on in stage %s; further such "
                    "steps are only counted",
                    self.state.global_step + 1, [name for batch in batch_samples for name in batch["ids"]], self.args.stage,
                )  # fmt: skip
        return items

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The stage's loss of one batch; its parts go to the log.

        Args:
            num_items_in_batch: items of the whole step. The gradients of the processes are averaged afterwards, so each process
                contributes its share times the number of processes; `None` gives the batch's own mean.

        Raises:
            FloatingPointError: the loss is not finite, unless such steps are to be skipped.
        """
        bare = self.accelerator.unwrap_model(model)
        computed: list[StageLoss] = []
        items = None if num_items_in_batch is None else float(num_items_in_batch) / self.accelerator.num_processes

        def work() -> Tensor:
            computed.append(self._stage_loss(bare, inputs, items))
            return computed[0].loss

        loss = call_through(model, bare, work)
        self._check_finite(loss, inputs)
        self._record(computed[0], "" if model.training else "eval_")
        return (loss, {}) if return_outputs else loss

    def _stage_loss(self, bare: Any, batch: Batch, items: float | None) -> StageLoss:
        with self.accelerator.autocast():
            with torch.set_grad_enabled(self._vision_trains and torch.is_grad_enabled()):
                features = image_features(bare, batch, self.feature_cache)
            return STAGE_LOSSES[self.args.stage_plan.loss](bare, batch, features, self.router_settings, items)

    def _check_finite(self, loss: Tensor, batch: Batch) -> None:
        value = float(loss.detach())
        self._loss_is_finite = math.isfinite(value)
        if self._loss_is_finite:
            return
        finding = f"the loss is {value} at step {self.state.global_step + 1}, rows {batch['ids']} (numbers {batch['rows']})"
        if self.args.on_nonfinite_loss == "raise":
            raise FloatingPointError(
                f"{finding}; look at these rows, lower --learning_rate, or use --bf16 instead of --fp16 "
                "(--on_nonfinite_loss skip drops such steps and continues)."
            )
        logger.warning("skipping a step: %s", finding)

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        """One batch forward and backward; with `--on_nonfinite_loss skip`, a loss that is not finite drops the gradients of the whole step.

        All processes decide together, since they share their gradients.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.args.on_nonfinite_loss == "raise":
            return loss
        broken = self.accelerator.reduce(torch.tensor(float(not self._loss_is_finite), device=loss.device), reduction="sum")
        self._step_is_broken |= bool(broken)
        if self._step_is_broken:
            for parameter in model.parameters():
                parameter.grad = None
        if self.accelerator.sync_gradients:
            self.steps_skipped += self._step_is_broken
            self._step_is_broken = False
        return torch.zeros_like(loss) if broken else loss

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """The loss of one evaluation batch."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            # The stock loop passes the bare model; under ZeRO-3 its weights are gathered in the engine's forward only.
            loss = self.compute_loss(self.model_wrapped if self.is_deepspeed_enabled else model, inputs).detach()
        items = count_items(inputs, self.args.stage_plan.loss)
        self._evaluated = [self._evaluated[0] + float(loss) * items, self._evaluated[1] + items]
        return loss, None, None

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """The stock loop, with the loss as a mean over the items of all batches and processes."""
        self._evaluated = [0.0, 0.0]
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        total, items = self._sum_over_processes(self._evaluated)
        metrics = {**(output.metrics or {}), f"{metric_key_prefix}_loss": total / max(items, 1.0)}
        return output._replace(metrics=metrics)

    # ---- the log

    def _record(self, loss: StageLoss, prefix: str) -> None:
        for name, (total, weight) in loss.metrics.items():
            entry = self._metrics[prefix + name]
            entry[0] = entry[0] + total
            entry[1] = entry[1] + weight
        if not prefix and "padding_share" in loss.metrics:
            padding, positions = loss.metrics["padding_share"]
            self._tokens_read += positions - float(padding)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the mean over all processes of each metric since the last call.

        Also logged: tokens (text and visual) per second of all processes together, memory, and skipped steps.
        """
        for prefix, present in (("eval_", "eval_loss" in logs), ("", "loss" in logs)):
            names = sorted(name for name in self._metrics if name.startswith("eval_") == (prefix == "eval_"))
            if present and names:
                sums = self._sum_over_processes([float(part) for name in names for part in self._metrics.pop(name)])
                for name, total, weight in zip(names, sums[::2], sums[1::2], strict=True):
                    logs[name] = round(total / max(weight, 1.0), 6)
        if "loss" in logs:
            logs |= self._speed_and_memory()
        super().log(logs, start_time)

    def _speed_and_memory(self) -> dict[str, float]:
        now = time.monotonic()
        tokens = self._sum_over_processes([self._tokens_read])[0]
        seconds, self._counted_since, self._tokens_read = now - self._counted_since, now, 0.0
        figures = {"memory_gb": round(peak_memory_gb(), 3)}
        if tokens:  # stage 4 does not run the language model when it trains on scores
            figures["tokens_per_second"] = round(tokens / seconds, 1)
        if self.args.on_nonfinite_loss == "skip":
            figures["steps_skipped"] = float(self.steps_skipped)
        return figures

    def _sum_over_processes(self, values: list[float]) -> list[float]:
        if self.accelerator.num_processes == 1:
            return values
        together = torch.tensor(values, device=self.accelerator.device, dtype=torch.float32)
        return self.accelerator.reduce(together, reduction="sum").tolist()

    # ---- checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._run_dir) if self._run_dir is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint under a hidden name and rename it when every process is done with it.

        Raises:
            NoSpaceError: the disk is full; nothing incomplete is left.
        """
        name = f"checkpoint-{self.state.global_step}"
        staging = staging_folder(self.args.output_folder / name)
        try:
            with room_for(self.args.output_folder / name):
                self._write_checkpoint(model, trial, staging, name)
        finally:
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _write_checkpoint(self, model: nn.Module, trial: Any, staging: Path, name: str) -> None:
        output = self.args.output_folder
        self._run_dir = staging
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._run_dir = None
        self.accelerator.wait_for_everyone()
        if self.state.best_model_checkpoint:
            self.state.best_model_checkpoint = str(output / Path(self.state.best_model_checkpoint).name)
        if self.args.should_save:
            self.state.save_to_json(str(staging / name / TRAINER_STATE_NAME))
            write_manifest(staging / name, self.args.stage_plan.name, self.state.global_step)
            publish(staging / name, output / name)
            keep_newest(output, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if state_dict is not None and not state_dict:
            raise ValueError(
                "DeepSpeed gave no full weights to save; set stage3_gather_16bit_weights_on_model_save to true in its configuration."
            )
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        folder, model = Path(output_dir or self.args.output_folder), self.accelerator.unwrap_model(self.model)
        processor = model.processor(self.processing_class)
        if processor is not self.processing_class:  # the stock trainer has saved that
            processor.save_pretrained(folder)
        if self.args.stage == "align":
            save_projector(model.state_dict() if state_dict is None else state_dict, folder)

    def save_final(self) -> None:
        """Write the finished model, its tokenizer, config and trainer state into the output folder, complete or not at all.

        Raises:
            NoSpaceError: the disk is full; nothing incomplete is left.
        """
        output = self.args.output_folder
        self.model.config.use_cache = True  # transformers' trainer switches it off while it trains
        with whole_folder(output / FINISHED, self.args.should_save) as staging:
            self.save_model(str(staging))
            if self.args.should_save:
                self.state.save_to_json(str(staging / TRAINER_STATE_NAME))
                write_manifest(staging, self.args.stage_plan.name, self.state.global_step)
        if self.args.should_save:
            publish_into(output / FINISHED, output)
        self.accelerator.wait_for_everyone()

    # ---- resuming

    def planned_steps(self) -> int:
        """Steps of this run from first to last."""
        return self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]

    def _run_epoch(self, *arguments: Any, **options: Any) -> None:
        """An epoch, unless the run was resumed after its last step: the stock loop checks for the end only after a step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*arguments, **options)

    def _finalize_training(self, *arguments: Any, **options: Any) -> Any:
        """The stock end, after removing, whole or not at all, the checkpoints beside the best one where only one is kept."""
        best = self.state.best_model_checkpoint
        if self.args.should_save and best is not None and self.args.save_total_limit == 1:
            for folder in checkpoints(self.args.output_folder):
                if folder.name != Path(best).name:
                    remove_folder(folder)
        if self.steps_without_items:
            logger.warning("%d steps trained nothing; look at the rows, or group them with larger batches", self.steps_without_items)
        return super()._finalize_training(*arguments, **options)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The stock loading, which takes both or neither; where one was lost and that was accepted, load the other alone."""
        if checkpoint is None or not {OPTIMIZER_NAME, SCHEDULER_NAME} & self.lost_state:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        if self.is_deepspeed_enabled:  # it has already loaded its own optimizer, and the schedule is what was lost
            return
        assert self.optimizer is not None and self.lr_scheduler is not None
        for name, target in ((OPTIMIZER_NAME, self.optimizer), (SCHEDULER_NAME, self.lr_scheduler)):
            if name not in self.lost_state:
                target.load_state_dict(torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True))
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def _load_scaler(self, checkpoint: str | None) -> None:
        if SCALER_NAME not in self.lost_state:
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if random_state_file(self.args) not in self.lost_state:
            super()._load_rng_state(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        restore_weights(self.accelerator.unwrap_model(model or self.model), Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if self.is_deepspeed_enabled or best is None:
            super()._load_best_model()
        else:
            restore_weights(self.accelerator.unwrap_model(self.model), Path(best))


class LLaVATrainer(LlavaTrainer):
    """`LlavaTrainer` under LLaVA's name and with its argument `tokenizer`; it trains what requires gradients."""

    def __init__(self, model: Any = None, args: Any = None, *, tokenizer: Any = None, **kwargs: Any) -> None:
        if tokenizer is not None:
            kwargs["processing_class"] = tokenizer
        super().__init__(model=model, args=args, **kwargs)
