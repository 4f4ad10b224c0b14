"""vLLM inside this process: `--engine vllm` without an address, in an environment that has vLLM and the plug-in (scripts/setup_vllm.sh)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from llava.eval.answerers import Outcomes, Reply
from llava.eval.chat_server import sampling_fields
from llava.eval.checks import TRIED
from llava.eval.one_by_one import Failure
from llava.eval.questions import Row
from llava.eval.served import chat_of
from llava.messages import Options
from llava.openai_chat import processor_kwargs


class Offline:
    """vLLM's engine, stepped by this process; a request joins as soon as another one ends.

    Args:
        llm: a `vllm.LLM`. image_folder: that image names are relative to. in_flight: requests at once.
    """

    def __init__(self, llm: Any, options: Options, image_folder: Path, in_flight: int, model_id: str) -> None:
        from vllm import SamplingParams

        self.llm, self.options, self.image_folder, self.in_flight = llm, options, image_folder, in_flight
        self.model_id = model_id
        self._sampling = SamplingParams(**sampling_fields(options))
        self._image_token = int(llm.llm_engine.model_config.hf_config.image_token_id)
        self._wishes = processor_kwargs(options.routing) or None

    def check(self, rows: Iterable[Row]) -> None:
        refused: list[tuple[Any, Failure]] = []
        for row in islice(rows, TRIED):
            (_, outcome), *_ = next(iter(self.answers([row])))
            if isinstance(outcome, Reply):
                return
            refused.append((row.question_id, outcome))
        if refused:
            name, failure = refused[0]
            raise ValueError(f"vLLM can answer none of the first {len(refused)} questions with these options; {name!r}: {failure.reason}")

    def answers(self, rows: Iterable[Row]) -> Outcomes:
        source, waiting = iter(rows), dict[str, Row]()
        while True:
            refused: list[tuple[Row, Reply | Failure]] = []
            for row in islice(source, self.in_flight - len(waiting)):
                try:
                    waiting[self._enqueue(row)] = row
                except ValueError as error:
                    refused.append((row, Failure.of(error)))
            if refused:
                yield refused
            elif not waiting:
                return
            if waiting and (finished := [output for output in self.llm.llm_engine.step() if output.finished]):
                yield [self._outcome(waiting.pop(output.request_id), output) for output in finished]

    def close(self) -> None:
        """The engine ends with the process."""

    def _enqueue(self, row: Row) -> str:
        messages = chat_of(row, self.image_folder)
        ids: Sequence[str] = self.llm.enqueue_chat(messages, self._sampling, use_tqdm=False, mm_processor_kwargs=self._wishes)
        return ids[0].rpartition("-")[0]  # the engine adds a random part of its own, which outputs lack

    def _outcome(self, row: Row, output: Any) -> tuple[Row, Reply]:
        fixed = self.options.routing.granularity
        reply = Reply(
            text=output.outputs[0].text.strip(),
            finish_reason=str(output.outputs[0].finish_reason),
            prompt_tokens=len(output.prompt_token_ids),
            new_tokens=len(output.outputs[0].token_ids),
            granularity=[fixed if isinstance(fixed, int) else None] * len(row.images),
            visual_tokens=list(output.prompt_token_ids).count(self._image_token),
        )
        return row, reply
