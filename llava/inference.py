"""The one path from (images, messages, options) to text and a routing report.

The command line, the evaluation and the engine use this: `messages` and `conversation` write the prompt, `mm_utils` makes ids and views,
`model.compose` encodes, routes and splices, transformers generates, `generation` watches it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from time import perf_counter
from typing import Any, ClassVar

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from llava.constants import MICRO_MODEL
from llava.conversation import SeparatorStyle, get_template
from llava.generation import AnswerStream, FirstTokenClock, StopAtText, StopBeamsAtText, StopWhenCancelled
from llava.messages import Message, Options, prompt_spans
from llava.messages import write_prompt as write_prompt  # whoever looks for it looks here
from llava.mm_utils import process_images, tokenize_spans
from llava.model.builder import load_pretrained_model
from llava.model.compose import ComposedRow, ImageInput
from llava.model.llava_arch import image_inputs
from llava.model.routing import RoutingReport
from llava.model.splice import PromptRow, SplicedInputs, SplicedRow, pad_rows, prompt_row
from llava.text_stream import TextStream, cut_at_stop
from llava.timing import StageTimer


@dataclass(frozen=True)
class Question:
    """One conversation of a batch: RGB images in the order of their placeholders, and a question or turns."""

    images: Sequence[Image.Image]
    messages: str | Sequence[Message]


@dataclass(frozen=True)
class Likelihood:
    """How likely an answer is: the sum of its tokens' log probabilities, and whether greedy decoding would write it."""

    log_probability: float
    is_greedy: bool
    num_tokens: int
    reports: list[RoutingReport]
    milliseconds: dict[str, float]


@dataclass(frozen=True)
class Answer:
    """What came out.

    text: the answer, without its end marker. token_ids: the new tokens.
    finish_reason: `stop`, or `length` when max_new_tokens or the context ran out.
    prompt_tokens: positions the prompt took, visual tokens included.
    reports: one per image.
    milliseconds: per part: vision, router, splice, prefill (up to the first token), decode; and `ttft`, the sum up to the first token.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_tokens: int
    reports: list[RoutingReport]
    milliseconds: dict[str, float]

    @property
    def num_new_tokens(self) -> int:
        """Tokens of the answer."""
        return len(self.token_ids)


@dataclass
class Assistant:
    """A loaded model that answers: `Assistant.load(path).answer([image], "What is this?")`."""

    tokenizer: PreTrainedTokenizerBase
    model: Any
    image_processor: Any

    has_decoder: ClassVar[bool] = True
    """Whether composed rows can be answered in this process."""

    @classmethod
    def load(cls, model_path: str | None = None, model_base: str | None = None, **options: Any) -> Assistant:
        """Load a checkpoint; the shipped micro model where no path is given.

        Args:
            options: those of `load_pretrained_model`.
        """
        tokenizer, model, image_processor, _ = load_pretrained_model(model_path or micro_model_path(), model_base, **options)
        return cls(tokenizer, model, image_processor)

    # ---- from images and messages to the model's inputs ----------------------------------------------------------------------

    def compose(self, questions: Sequence[Question], options: Options, timer: StageTimer) -> list[ComposedRow]:
        """Questions as rows that the language model can read, with a report per image; see `Composer.compose`.

        Args:
            timer: counts `views` and what `Composer.compose` does.

        Raises:
            ValueError: input that cannot work.
        """
        prompts = [self.prompt_row(question.messages, len(question.images), options.conv_mode) for question in questions]
        return self._compose(prompts, questions, options, timer)

    def _compose(
        self, prompts: Sequence[PromptRow], questions: Sequence[Question], options: Options, timer: StageTimer
    ) -> list[ComposedRow]:
        images = [image for question in questions for image in question.images]
        with timer("views"):
            inputs = {key: self.image_input(image) for key, image in {id(image): image for image in images}.items()}
        return self.model.compose(prompts, [inputs[id(image)] for image in images], options.routing, timer)

    def prompt_row(self, messages: str | Sequence[Message], num_images: int, conv_mode: str | None = None) -> PromptRow:
        """`prompt_ids` as a row on the model's device."""
        return prompt_row(self.prompt_ids(messages, num_images, conv_mode).to(self.model.device))

    def prompt_ids(
        self, messages: str | Sequence[Message], num_images: int, conv_mode: str | None = None, answer: str | None = None
    ) -> torch.Tensor:
        """(L,) ids of a conversation's prompt, with one placeholder per image; arguments and errors as in `prompt_spans`.

        What the turns say is text, whatever it spells: see `llava.mm_utils.tokenize_spans`.
        """
        turns = [Message("user", messages)] if isinstance(messages, str) else messages
        config = self.model.config
        spans = prompt_spans(turns, num_images, conv_mode or config.conv_version, config.mm_use_im_start_end, answer)
        return torch.tensor(tokenize_spans(spans, self.tokenizer))

    def image_input(self, image: Image.Image) -> ImageInput:
        """One image cut into views, as the model takes it."""
        return image_inputs(process_images([image], self.image_processor, self.model.config), [image.size])[0]

    # ---- answers -------------------------------------------------------------------------------------------------------------

    def answer(self, images: Sequence[Image.Image], messages: str | Sequence[Message], options: Options | None = None) -> Answer:
        """Answer the last turn of a conversation.

        Args:
            images: RGB images, in the order of their placeholders.
            messages: a question, or turns.

        Raises:
            ValueError: input that cannot work. FloatingPointError: non-finite logits.
        """
        return self._generate(images, messages, options or Options())

    def stream(
        self, images: Sequence[Image.Image], messages: str | Sequence[Message], options: Options | None = None
    ) -> AnswerStream[Answer]:
        """Like `answer`, piece by piece; other errors surface where the pieces are read.

        Raises:
            ValueError: beams, whose text is not known before their end.
        """
        options = options or Options()
        if options.num_beams > 1:
            raise ValueError(f"num_beams is {options.num_beams}, but beams cannot be streamed; use 1 or answer().")
        return AnswerStream(partial(self._generate, images, messages, options))

    def _generate(
        self,
        images: Sequence[Image.Image],
        messages: str | Sequence[Message],
        options: Options,
        on_piece: Callable[[str], None] | None = None,
        cancelled: threading.Event | None = None,
    ) -> Answer:
        timer = StageTimer(self.model.device)
        stop = self._stop_texts(options)
        clock, text = FirstTokenClock(), TextStream(self.tokenizer, stop)
        criteria = [clock, *self._text_criteria([text], options, on_piece), *([] if cancelled is None else [StopWhenCancelled(cancelled)])]
        with torch.inference_mode():
            [composed] = self.compose([Question(images, messages)], options, timer)
            inputs = pad_rows([composed.row], "left")
            room = self._room(inputs.inputs_embeds.shape[1])
            start = perf_counter()
            ids = self._new_tokens(inputs, options, min(options.max_new_tokens, room), criteria)[0]
            end = perf_counter()
        if on_piece is not None and (last := text.end()):
            on_piece(last)
        first = clock.first_token or end
        milliseconds = {**timer.milliseconds, "prefill": 1000 * (first - start), "decode": 1000 * (end - first)}
        milliseconds["ttft"] = sum(milliseconds.values()) - milliseconds["decode"]
        return self._answer(ids, stop, composed, milliseconds)

    def _text_criteria(
        self, texts: Sequence[TextStream], options: Options, on_piece: Callable[[str], None] | None = None
    ) -> list[StoppingCriteria]:
        """What stops rows at their stop texts and passes pieces of text on; nothing where neither is wanted."""
        stop = texts[0].stop
        if options.num_beams > 1:
            return [StopBeamsAtText(self.tokenizer, stop)] if stop else []
        return [StopAtText(texts, end_ids(self.model), on_piece)] if stop or on_piece is not None else []

    def answer_batch(self, questions: Sequence[Question], options: Options | None = None) -> list[Answer]:
        """Answer several questions in one batch; greedy answers equal those of `answer` one by one.

        An image that several questions share (the same object) is encoded once.

        Args:
            questions: each with its own images and turns. options: one for all of them.

        Returns:
            One answer per question. The milliseconds are those of the whole batch, and hold `generate` instead of its parts.

        Raises:
            ValueError: input that cannot work. FloatingPointError: non-finite logits.
        """
        if not questions:
            return []
        options = options or Options()
        timer = StageTimer(self.model.device)
        with torch.inference_mode():
            rows = self.compose(questions, options, timer)
        return self.answer_rows(rows, options, timer)

    def answer_rows(self, composed: Sequence[ComposedRow], options: Options, timer: StageTimer | None = None) -> list[Answer]:
        """Answer prompts that are composed already, in one batch.

        Args:
            timer: the one that timed their composition; a new one by default.
        """
        timer = timer or StageTimer(self.model.device)
        stop = self._stop_texts(options)
        with torch.inference_mode():
            inputs = pad_rows([each.row for each in composed], "left")
            rooms = [min(options.max_new_tokens, self._room(each.row.length)) for each in composed]
            criteria = self._text_criteria([TextStream(self.tokenizer, stop) for _ in composed], options)
            with timer("generate"):
                rows = self._new_tokens(inputs, options, max(rooms), criteria)
        ended = [self._until_end(ids, stop)[:room] for ids, room in zip(rows, rooms, strict=True)]
        return [self._answer(ids, stop, each, dict(timer.milliseconds)) for ids, each in zip(ended, composed, strict=True)]

    def log_likelihoods(
        self, questions: Sequence[Question], continuations: Sequence[str], options: Options | None = None
    ) -> list[Likelihood]:
        """How likely the model finds given answers; the router sees the questions alone.

        Args:
            questions, options: as in `answer_batch`; sampling options play no part.
            continuations: one text per question, taken as the answer's beginning.

        Raises:
            ValueError: input that cannot work, an empty continuation, or one longer than the context.
        """
        if len(questions) != len(continuations):
            raise ValueError(f"{len(questions)} questions came with {len(continuations)} continuations; give one each.")
        if not questions:
            return []
        options = options or Options()
        pairs = [self._scored_ids(question, text, options.conv_mode) for question, text in zip(questions, continuations, strict=True)]
        targets = [answer for _, answer in pairs]
        timer = StageTimer(self.model.device)
        with torch.inference_mode():
            composed = self._compose([prompt_row(prompt) for prompt, _ in pairs], questions, options, timer)
            over = [each.row.length + len(ids) for each, ids in zip(composed, targets, strict=True)]
            if max(over) > self.model.config.context_length:
                raise ValueError(
                    f"Question {over.index(max(over))} and its continuation have {max(over)} tokens, but the context of this model is "
                    f"{self.model.config.context_length}; shorten the text or choose a coarser granularity."
                )
            with timer("score"):
                scores = self._answer_log_probabilities([each.row for each in composed], targets)  # one (T, V) each
        return [
            Likelihood(
                log_probability=float(rows.gather(1, ids[:, None]).sum()),
                is_greedy=bool((rows.argmax(-1) == ids).all()),
                num_tokens=len(ids),
                reports=each.reports,
                milliseconds=dict(timer.milliseconds),
            )
            for rows, ids, each in zip(scores, targets, composed, strict=True)
        ]

    def _scored_ids(self, question: Question, text: str, conv_mode: str | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids (L,) of a prompt and (T,) of an answer as it would follow there; where a token spans both, it belongs to the answer."""
        text = text.strip()
        if not text:
            raise ValueError("A continuation is empty, expected an answer to score.")
        prompt = self.prompt_ids(question.messages, len(question.images), conv_mode)
        whole = self.prompt_ids(question.messages, len(question.images), conv_mode, answer=text)
        differ = (prompt != whole[: len(prompt)]).nonzero()
        cut = int(differ[0]) if len(differ) else len(prompt)
        return whole[:cut].to(self.model.device), whole[cut:].to(self.model.device)

    def _answer_log_probabilities(self, rows: Sequence[SplicedRow], targets: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Log probabilities (T, V) of what follows each prompt; vocabulary logits are made for the answers alone."""
        embed = self.model.get_input_embeddings()
        joined = [
            SplicedRow(torch.cat([row.inputs_embeds, embed(ids)]), torch.cat([row.labels, ids]))
            for row, ids in zip(rows, targets, strict=True)
        ]
        inputs = pad_rows(joined, "right")
        hidden = self.model.get_model()(
            inputs_embeds=inputs.inputs_embeds,
            attention_mask=inputs.attention_mask.long(),
            position_ids=inputs.position_ids,
            use_cache=False,
        ).last_hidden_state
        logits = [
            self.model.answer_logits(states[row.length - 1 : row.length - 1 + len(ids)])
            for states, row, ids in zip(hidden, rows, targets, strict=True)
        ]
        return [each.float().log_softmax(-1) for each in logits]

    def _stop_texts(self, options: Options) -> tuple[str, ...]:
        return (*template_stops(options.conv_mode or self.model.config.conv_version), *options.stop)

    def _room(self, length: int) -> int:
        """How many tokens fit behind a prompt of `length` positions."""
        room = self.model.config.context_length - length
        if room < 1:
            raise ValueError(f"The prompt takes all {length} positions of the context; shorten it or choose a coarser granularity.")
        return room

    def _answer(self, ids: list[int], stop: Sequence[str], composed: ComposedRow, milliseconds: dict[str, float]) -> Answer:
        text, stopped = cut_at_stop(str(self.tokenizer.decode(ids, skip_special_tokens=True)), stop)
        finished = stopped or (bool(ids) and ids[-1] in end_ids(self.model))
        return Answer(text.strip(), ids, "stop" if finished else "length", composed.row.length, composed.reports, milliseconds)

    def _until_end(self, ids: list[int], stop: Sequence[str]) -> list[int]:
        """A row of a batch without what follows its own end: padding, while longer rows went on."""
        ends = end_ids(self.model)
        text = TextStream(self.tokenizer, stop)
        for count, token in enumerate(ids, start=1):
            if stop:
                text.add(token)
            if token in ends or text.stopped:
                return ids[:count]
        return ids

    def _new_tokens(
        self, inputs: SplicedInputs, options: Options, max_new_tokens: int, criteria: Sequence[StoppingCriteria]
    ) -> list[list[int]]:
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if options.temperature > 0:
            sampling = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p}
        if options.min_new_tokens:
            sampling["min_new_tokens"] = options.min_new_tokens
        with torch.random.fork_rng(enabled=options.seed is not None):
            if options.seed is not None:
                torch.manual_seed(options.seed)
            output = self.model.generate(
                inputs_embeds=inputs.inputs_embeds,
                attention_mask=inputs.attention_mask.long(),
                num_beams=options.num_beams,
                max_new_tokens=max_new_tokens,
                stopping_criteria=StoppingCriteriaList(criteria),
                pad_token_id=self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id,
                **sampling,
            )
        return output.tolist()


def template_stops(template: str) -> tuple[str, ...]:
    """Texts that end an answer under a template whose separator is not the model's own end token."""
    conversation = get_template(template)
    separators = {
        SeparatorStyle.SINGLE: conversation.sep,
        SeparatorStyle.MPT: conversation.sep,
    }
    separator = separators.get(conversation.sep_style)
    return (separator,) if separator else ()


def end_ids(model: Any) -> list[int]:
    """Token ids that end an answer."""
    end = model.generation_config.eos_token_id
    return [] if end is None else [end] if isinstance(end, int) else list(end)


def micro_model_path() -> str:
    """The shipped micro model.

    Raises:
        ValueError: the package was installed without the repository around it.
    """
    if not MICRO_MODEL.is_dir():
        raise ValueError("No model was given and the micro model is not here: it ships with the repository; give a model path.")
    return str(MICRO_MODEL)


@lru_cache(maxsize=1)
def cached_assistant(model_path: str | None, model_base: str | None = None, **options: Any) -> Assistant:
    """`Assistant.load`, once per process for calls with the same arguments; another model takes its place."""
    return Assistant.load(model_path, model_base, **options)
