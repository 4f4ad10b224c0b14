"""The harness's view of AVG-LLaVA: requests in, texts or losses out.

The harness splits the documents over the processes and gathers the scores; every process holds a whole model and answers its share.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list, gather_object
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.utils import simple_parse_args_string
from loguru import logger
from PIL import Image

from avg_llava_lmms_eval.arguments import ModelArguments, name_of, parse_arguments
from avg_llava_lmms_eval.asking import Costs, Failed, Results, Sample, answer_all, costs_of, failed_of, merge_shares, score_all
from avg_llava_lmms_eval.generation import read_options
from avg_llava_lmms_eval.processes import Tally
from avg_llava_lmms_eval.sample_log import SampleLog, output_folder
from llava.durable import NoSpaceError
from llava.eval.chat_server import sampling_fields
from llava.eval.checks import check_questions, check_routing
from llava.eval.front import ServedAssistant
from llava.eval.one_by_one import GoneError
from llava.inference import Assistant, Options, Question

SLOWEST_PROCESS = timedelta(hours=24)
"""How long the first process to finish waits for the last."""


class EvaluationError(SystemExit):
    """Ends the run with one sentence and exit code 1.

    A `SystemExit` because the harness catches every `Exception` of a run, prints it and exits with 0.
    """


class Score(tuple, GenerationResult):
    """(loss, is greedy), which also passes for a `GenerationResult`.

    lmms-eval 0.7.3 turns every outcome into text that is neither text nor a `GenerationResult`, pairs included, and its tasks of several
    choices then cannot read them. Of a `GenerationResult` it takes `text` as it is.
    """

    def __new__(cls, loss: float, is_greedy: bool) -> Score:
        return super().__new__(cls, (loss, is_greedy))

    def __init__(self, loss: float, is_greedy: bool) -> None:
        """The pair is made in `__new__`; the fields of the other parent are properties here."""

    @property
    def text(self) -> Score:  # type: ignore[override]
        """What the harness hands to the task."""
        return self

    @property
    def token_counts(self) -> None:  # type: ignore[override]
        """Not known."""
        return None

    def strip(self) -> str:
        """Empty, so that the harness's cache does not keep the pair: it would come back as a list, and become text again."""
        return ""


class AvgLlava(lmms):
    """A checkpoint that answers the harness's requests in batches, choosing a granularity per image."""

    is_simple = True

    def __init__(self, **arguments: Any) -> None:
        """Load the model.

        Args:
            arguments: see `ModelArguments`; `granularity` and `granularity_bias` are read into its routing.

        Raises:
            ValueError: an argument that cannot be, or that this checkpoint or machine cannot satisfy.
        """
        super().__init__()
        self.arguments = parse_arguments(arguments)
        self.accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=SLOWEST_PROCESS)])
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.assistant = load_assistant(self.arguments, own_device(self.arguments.device, self.accelerator))
        self._spent: dict[str, Costs] = {}
        self._seconds = 0.0
        # the processes of one run agree on its time (UTC)
        started = broadcast_object_list([time.strftime("%Y%m%d_%H%M%S", time.gmtime())])[0]
        self.tally = Tally(f"avg_llava {started}", self._rank, self._world_size)
        name = f"{started}_avg_llava_{name_of(self.arguments.routing)}_samples_rank{self._rank}.jsonl"
        self.log = SampleLog(self.arguments.sample_log or output_folder(), name)
        if self.log.path is None:
            logger.info("no --output_path and no sample_log: the granularity of each sample is not kept")

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Mapping[str, Any] | None = None) -> AvgLlava:
        """Called by the harness with `--model_args` and its flags; an error ends the run with a sentence and exit code 1."""
        try:
            return cls(**merge_arguments(read_pairs(arg_string), additional_config or {}))
        except Exception as error:
            if not isinstance(error, ValueError | OSError | ImportError):
                logger.exception("the model could not be made")
            raise EvaluationError(f"error: {error}") from error

    @property
    def batch_size(self) -> int:
        """Questions per batch."""
        return self.arguments.batch_size

    @property
    def device(self) -> Any:
        """Where the harness puts the tensors it exchanges between the processes."""
        return self.accelerator.device if self._world_size > 1 else self.assistant.model.device

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer."""
        return self.assistant.tokenizer

    @property
    def config(self) -> Any:
        """The checkpoint's configuration."""
        return self.assistant.model.config

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answer requests of (context, generation settings, document to images, document id, task, split).

        Raises:
            EvaluationError: settings that cannot be honoured, before anything is asked; or, when every process has asked its share,
                samples that failed on any of them, with their number.
        """
        answers = self._ask("generate_until", answer_all, [self._to_sample(request) for request in requests])
        return [answer.text for answer in answers]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[Score]:
        """Score continuations in requests of (context, document to target, document to images, document id, task, split).

        Returns:
            (loss, is greedy) per request. The loss is the continuation's summed negative log probability: the harness picks the choice
            with the smallest number, because its own models return a loss here. The router reads the context alone.

        Raises:
            EvaluationError: as in `generate_until`, or the engine is a server, which scores nothing.
        """
        if self.arguments.engine == "vllm":
            tasks = sorted({str(request.task_name) for request in requests})
            raise EvaluationError(
                f"error: {', '.join(tasks)} compares likelihoods of answers, which engine=vllm cannot give; leave engine and vllm out, or "
                "choose tasks of output_type generate_until."
            )
        scores = self._ask("loglikelihood", score_all, [self._to_scored_sample(request) for request in requests])
        return [Score(-score.log_probability, score.is_greedy) for score in scores]

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Refused: nothing here carries a model's answer into the next round's question.

        Raises:
            EvaluationError: always, naming the tasks.
        """
        tasks = sorted({str(request.task_name) for request in requests})
        raise EvaluationError(
            f"error: {', '.join(tasks)} asks in several rounds (output_type generate_until_multi_round), which avg_llava does not answer; "
            "choose tasks of output_type generate_until, multiple_choice or loglikelihood."
        )

    def clean(self) -> None:
        """Called by the harness on every process when all is asked: say what was spent, and give the model's memory back.

        Raises:
            EvaluationError: samples failed on another process.
        """
        self._end_if_samples_failed()
        self._report()
        if isinstance(self.assistant, ServedAssistant):
            self.assistant.close()
        del self.assistant
        super().clean()

    def _to_sample(self, request: Instance) -> Sample:
        context, settings, doc_to_visual, doc_id, task, split = request.args
        load = self._loader(context, doc_to_visual, doc_id, task, split)
        return Sample(task, split, doc_id, load, self._options(task, settings), counted=is_counted(request))

    def _to_scored_sample(self, request: Instance) -> Sample:
        if len(request.args) != 6:
            raise EvaluationError(
                f"error: {request.task_name} scores answers without a question (acc_mutual_info), which a chat model cannot; "
                "remove that metric from the task."
            )
        context, target, doc_to_visual, doc_id, task, split = request.args
        continuation = target if isinstance(target, str) else str(target(self.task_dict[task][split][doc_id]))
        load = self._loader(context, doc_to_visual, doc_id, task, split)
        # the template writes what separates question and answer, so the task's delimiter is dropped
        return Sample(task, split, doc_id, load, self._options(task, {}), continuation.lstrip(), is_counted(request))

    def _options(self, task: str, settings: Mapping[str, Any]) -> Options:
        try:
            options = read_options(settings, self.arguments.conv_template, self.arguments.routing)
            if self.arguments.engine == "vllm":
                sampling_fields(options)
            return options
        except (TypeError, ValueError) as error:
            raise EvaluationError(f"error: {task}: {error}") from error

    def _loader(self, context: str, doc_to_visual: Callable[[Any], Any], doc_id: int, task: str, split: str) -> Callable[[], Question]:
        return partial(load_question, context, doc_to_visual, self.task_dict[task][split], doc_id)

    def _ask(self, kind: str, work: Callable[..., Results[Any]], samples: Sequence[Sample]) -> list[Any]:
        """The outcome of every sample; any failure ends the run, once every process has asked its share.

        A process without failures does not wait here: the harness lets all of them meet after each kind of request (a barrier), also one
        that found all its answers in the harness's cache and never came. One with failures goes to that meeting from here, so that the
        harness does not take anything for the answer of a sample that failed. What comes next on any process ends it.
        """
        self._end_if_samples_failed(besides=kind)  # others may have come to requests of this kind already, and failed
        if self._world_size == 1:  # of several processes each sees its share alone, and the counts at the end are of all
            self._check(samples)
        start = time.perf_counter()
        try:
            results = work(self.assistant, samples, self.batch_size, self.log, show=self._rank == 0)
        except (NoSpaceError, GoneError) as error:
            raise EvaluationError(f"error: {error}") from error
        self._seconds += time.perf_counter() - start
        self.tally.note(kind, failed_of(samples, results))
        if results.failures:
            if self._world_size > 1:
                logger.warning(f"{len(results.failures)} samples of process {self._rank} failed; the run ends when the others are through")
            self.accelerator.wait_for_everyone()
            self._end_if_samples_failed()
        self._spent = merge_shares(Costs, [self._spent, costs_of(samples, results)])
        return results.outcomes

    def _check(self, samples: Sequence[Sample]) -> None:
        """
        Raises:
            EvaluationError: no sample of a task can be asked, because of the model or its arguments.
        """
        groups: dict[tuple[str, Options], list[Sample]] = defaultdict(list)
        for sample in samples:
            groups[sample.task, sample.options].append(sample)
        for (task, options), group in groups.items():
            try:
                check_questions(self.assistant, [(sample.doc_id, sample.load) for sample in group], options)
                if isinstance(self.assistant, ServedAssistant):
                    self.assistant.check([(sample.doc_id, sample.load) for sample in group], options)
            except (ValueError, GoneError) as error:
                raise EvaluationError(f"error: {task}: {error}") from error

    def _end_if_samples_failed(self, besides: str | None = None) -> None:
        """Go on, or end with the counts of the whole run.

        A launcher ends the others when one process has ended, so those with failures say so before any of them goes.

        Args:
            besides: the kind of request that is being asked, so that its failures are not complete.

        Raises:
            EvaluationError: samples failed, on whichever process.
        """
        broken = {kind: failed for kind, failed in self.tally.whole().items() if failed.failed and kind != besides}
        if not broken:
            return
        failing = self.tally.failing()
        message = "\n".join(failure_text(kind, failed, self._world_size) for kind, failed in broken.items())
        if self.log.path is not None:
            message += f"\nEvery sample, failed or answered, is in {self._all_logs(self.log.path)}."
        if self._world_size == 1:
            raise EvaluationError(message)
        print(message if self._rank == failing[0] else message.split("\n")[0], file=sys.stderr, flush=True)
        self.tally.said(failing)
        raise EvaluationError(1)

    def _all_logs(self, own: Path) -> Path:
        return own if self._world_size == 1 else own.with_name(own.name.replace(f"rank{self._rank}.", "rank*."))

    def _report(self) -> None:
        """What all processes spent, in the harness's log and its results file."""
        shares = gather_object([(self._spent, self._seconds)]) if self._world_size > 1 else [(self._spent, self._seconds)]
        costs, seconds = merge_shares(Costs, (share[0] for share in shares)), max(share[1] for share in shares)
        if self._rank != 0 or not costs:
            return
        for task, spent in costs.items():
            logger.info(f"{task}: {spent}")
        if self.log.path is not None:
            logger.info(f"one line per sample: {self.log.path}")
        tokens = sum(spent.new_tokens for spent in costs.values())
        means = {f"visual_tokens_{task}": spent.visual_tokens / spent.samples for task, spent in costs.items()}
        log_metrics(seconds, tokens, tokens / seconds, {"total_requests": sum(spent.samples for spent in costs.values()), **means})


def failure_text(kind: str, failed: Failed, processes: int) -> str:
    """One kind of request: counts on the first line, then the first samples to fail."""
    where = f" by {processes} processes" if processes > 1 else ""
    return "\n".join(
        [
            f"error: {failed.failed} of {failed.asked} samples failed in {kind}, {failed.asked - failed.failed} were answered{where}; "
            "no score is given.",
            "The first to fail:",
            *(f"  {line}" for line in failed.first),
        ]
    )


def is_counted(request: Instance) -> bool:
    """Whether a request is a question of its own: the harness repeats one so that every process has as many, and drops the answer.

    It is answered all the same, because the harness's cache may keep that answer for the question.
    """
    return not (request.metadata or {}).get("__padding_only__")


def read_pairs(model_args: str) -> dict[str, Any]:
    """What `--model_args` holds, by the harness's own reader.

    Raises:
        ValueError: a part of it is no `name=value`.
    """
    try:
        return dict(simple_parse_args_string(model_args))
    except ValueError as error:
        raise ValueError(
            f"--model_args is {model_args!r}, expected name=value,name=value; several granularities are written granularity=4:16."
        ) from error


def merge_arguments(given: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """`--model_args` and the harness's own flags (`--batch_size`, `--device`, `--max_batch_size`) as one set.

    Raises:
        ValueError: both give a value and they differ, or a flag that has no meaning here.
    """
    merged = dict(given)
    for name, value in flags.items():
        if value is None:
            continue
        if name == "max_batch_size":
            raise ValueError(f"--max_batch_size is {value}, but avg_llava takes a fixed batch size; give --batch_size alone.")
        untouched = name == "batch_size" and str(value) == "1"  # the flag's default: model_args may say more
        if name in merged and str(merged[name]) != str(value) and not untouched:
            raise ValueError(f"{name} is {merged[name]} in --model_args and {value} in --{name}; give one.")
        if not (name in merged and untouched):
            merged[name] = value
    return merged


def own_device(device: str | None, accelerator: Accelerator) -> str | None:
    """The device of this process: as asked for, or under a launcher of several processes the one that belongs to it.

    Raises:
        ValueError: several processes were asked onto one device.
    """
    if accelerator.num_processes == 1:
        return device
    if device is None or device == accelerator.device.type:
        return str(accelerator.device)
    raise ValueError(
        f"device is {device!r}, but the launcher gave {accelerator.num_processes} processes a {accelerator.device.type} each; "
        "leave device out, and launch with --cpu for processes on the CPU."
    )


def load_assistant(arguments: ModelArguments, device: str | None) -> Assistant:
    """Load the checkpoint and see that it can do what is asked of its granularities.

    Raises:
        ValueError: no such checkpoint, or a granularity or bias that it does not have. OSError: there is no such server.
    """
    given = {"device": device, "dtype": arguments.dtype, "attn_implementation": arguments.attn_implementation}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if arguments.vllm is None:
        assistant = Assistant.load(arguments.pretrained, **options)
    else:
        assistant = ServedAssistant.connect(arguments.vllm, arguments.pretrained, **options)
    if assistant.image_processor is None:
        raise ValueError(f"{arguments.pretrained} is a plain language model, expected a checkpoint that takes images.")
    check_routing(assistant, arguments.routing)
    return assistant


def load_question(context: str, doc_to_visual: Callable[[Any], Any], documents: Any, doc_id: int) -> Question:
    """Open the images of a document.

    Raises:
        ValueError: something that is not an image, such as a video's path.
    """
    visuals = doc_to_visual(documents[doc_id]) or []
    for visual in visuals:
        if not isinstance(visual, Image.Image):
            raise ValueError(f"The document's visuals hold a {type(visual).__name__}, expected images only.")
    return Question(visuals, context)
