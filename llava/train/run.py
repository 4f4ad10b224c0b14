"""One training run: flags, model, data, trainer, finished model. `llava.train.train` is its program.

The finished model is written to `--output_dir` itself and loads with `load_pretrained_model`; checkpoints to resume from lie in
folders under it. `llava/train/train_mem.py` is the same program under LLaVA's name.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from transformers import TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from llava.interrupts import keeping, sentence_of
from llava.log import setup_logging
from llava.train.arguments import TrainingArguments, check_arguments, ignored_flags, whole_parser
from llava.train.build import load_model
from llava.train.data import Collator, ConversationDataset, check_rows, make_dataset
from llava.train.distributed import full_weights_on_load, init_cpu_deepspeed, is_lost_process, lost_process_message
from llava.train.features import FeatureCache
from llava.train.flags import DataArguments, ModelArguments
from llava.train.llava_trainer import LlavaTrainer
from llava.train.objectives import RouterSettings, granularities
from llava.train.run_folder import held, kept, prepare, resume_newest
from llava.train.scores import GranularityScores, data_fingerprint, model_fingerprint
from llava.train.stages import apply_stage, log_training_table

logger = logging.getLogger(__name__)

Arguments = tuple[ModelArguments, DataArguments, TrainingArguments]


def parse_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """Read and check the flags of a run; `None` reads the command line.

    Raises:
        ValueError: flags that contradict each other, all of them at once.
    """
    model_args, data_args, training_args = whole_parser().parse_args_into_dataclasses(args=argv)
    check_arguments(model_args, data_args, training_args)
    return model_args, data_args, training_args


def make_trainer(arguments: Arguments) -> LlavaTrainer:
    """Build the model, the data and the trainer of a run."""
    model_args, data_args, training_args = arguments
    set_seed(training_args.seed)
    with full_weights_on_load(training_args):
        model, tokenizer = load_model(model_args, data_args, training_args)
    stage = training_args.stage_plan
    summaries = apply_stage(model, stage, training_args.frozen_parts)
    log_training_table(stage, summaries, training_args.learning_rates, training_args.weight_decay)
    version = model_args.version or stage.version
    cache = None
    if data_args.cache_image_features_gb:
        cache = FeatureCache(int(data_args.cache_image_features_gb * 2**30))
    dataset = make_dataset(data_args.data_path, model, tokenizer, version, data_args, cache)
    check_rows(dataset, "rows", needs_images=stage.loss == "rglf")
    evaluation = None
    if data_args.eval_data_path:
        evaluation = make_dataset(data_args.eval_data_path, model, tokenizer, version, data_args, cache)
        check_rows(evaluation, "rows for evaluation", needs_images=stage.loss == "rglf")
    return LlavaTrainer(
        model=model,
        args=training_args,
        train_dataset=dataset,
        eval_dataset=evaluation,
        data_collator=Collator(tokenizer.pad_token_id or 0),
        processing_class=tokenizer,
        router_settings=router_settings(model, dataset, training_args, data_args),
        feature_cache=cache,
    )


def router_settings(
    model: Any, dataset: ConversationDataset, training_args: TrainingArguments, data_args: DataArguments
) -> RouterSettings:
    """How stage 4 trains the router, with the scores of an offline pass where they are given.

    Raises:
        ValueError: scores of another model or other data.
    """
    scores = None
    if training_args.granularity_scores:
        table = GranularityScores.load(
            training_args.granularity_scores,
            model_fingerprint(model),
            data_fingerprint(dataset),
            granularities(model),
        )
        scores = table.lookup
    return RouterSettings(
        margin=training_args.margin,
        rank_loss_weight=training_args.rank_loss_weight,
        ce_loss_weight=training_args.ce_loss_weight,
        granularity_cost_weight=training_args.granularity_cost_weight,
        scores=scores,
    )


def train(argv: Sequence[str] | None = None, attn_implementation: str | None = None) -> LlavaTrainer:
    """Run one stage from flags to the finished model.

    Args:
        argv: the flags; `None` reads the command line.
        attn_implementation: attention kernel where `--attn_implementation` names none; LLaVA's programs pass it.

    Returns:
        The trainer, after the model was saved.

    Raises:
        ValueError: flags, data or checkpoints that cannot work.
        FloatingPointError: a loss that is not finite.
    """
    arguments = parse_arguments(argv)
    model_args, _, training_args = arguments
    model_args.attn_implementation = model_args.attn_implementation or attn_implementation
    setup_logging()
    ignored = ignored_flags(training_args)
    if ignored and training_args.process_index == 0:
        logger.warning("these flags are accepted for scripts of LLaVA and have no effect: %s", ", ".join(ignored))
    init_cpu_deepspeed(training_args)
    with keeping(lambda: kept(training_args)), held(training_args):
        with training_args.main_process_first(local=False, desc="checking the output folder"):
            start = prepare(training_args)
        trainer = make_trainer(arguments)
        if start.finished is not None and start.finished.step >= trainer.planned_steps():
            logger.info(
                "%s holds the finished model of this run (%d steps); nothing is left to do. To train again: --overwrite_output_dir True "
                "without --resume_from_checkpoint.", training_args.output_dir, start.finished.step,
            )  # fmt: skip
            trainer.state = TrainerState.load_from_json(str(training_args.output_folder / TRAINER_STATE_NAME))
            return trainer
        if start.finished is not None:
            start = resume_newest(training_args)
        trainer.lost_state = start.lost_state
        trainer.train(resume_from_checkpoint=None if start.checkpoint is None else str(start.checkpoint))
        trainer.save_final()
    return trainer


def run(argv: Sequence[str] | None = None) -> None:
    """Train as the flags say; `None` reads the command line.

    Raises:
        SystemExit: flags, data, a checkpoint or a loss that cannot work, or a lost process, in one sentence.
    """
    try:
        train(argv)
    except (ValueError, FloatingPointError, OSError) as error:
        logger.debug("stopped", exc_info=True)
        raise SystemExit(f"training stopped: {sentence_of(error)}") from error
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        logger.debug("stopped", exc_info=True)
        raise SystemExit(f"training stopped: {lost_process_message(error)}") from error
