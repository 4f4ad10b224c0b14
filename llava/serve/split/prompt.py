"""The prompt as a vLLM will read it: turns go out, and the ids that come of them there have to be ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.messages import Message, text_of_parts
from llava.openai_chat import messages_with
from llava.serve.backend.openai_request import request_turns
from llava.serve.engine.prepare import Preparer
from llava.serve.engine.task import Prepared
from llava.serve.protocol import ErrorKind, GenerationRequest, ServeError
from llava.serve.protocol.error_templates import BACKEND_READS_OTHERWISE


@dataclass(frozen=True)
class SplitPrompt:
    """A request that has passed every check that needs no computation by the model. turns: that the server is sent."""

    prepared: Prepared
    turns: Sequence[Message]

    def is_read_as(self, ids: Sequence[object], visual_tokens: Sequence[int]) -> bool:
        """Whether ids that a server made of the turns are those that we mean.

        Args:
            ids: of its prompt, with as many ids of one kind in an image's place as it has visual tokens. visual_tokens: of each image.
        """
        costs, start, expected = iter(visual_tokens), 0, self.prepared.prompt.ids.tolist()
        for token in expected:
            length = next(costs) if token == IMAGE_TOKEN_INDEX else 1
            run = ids[start : start + length]
            if len(run) < length or len(set(run)) > 1 or (token != IMAGE_TOKEN_INDEX and run[0] != token):
                return False
            start += length
        return start == len(ids)


class SplitPreparer(Preparer):
    """Prepares requests as the embedded engine does, and refuses those that a server would read in another way."""

    def prepare_turns(self, request: GenerationRequest) -> SplitPrompt:
        """
        Raises:
            ServeError: the request cannot work, or not here.
        """
        prepared, turns = self.prepare(request), request_turns(request)
        try:
            sent = [_as_server_reads(message) for message in messages_with(turns, [{"type": "image"}] * len(request.images))]
            read = self._ids(replace(request, messages=tuple(sent), prompt=None))
        except ValueError as error:  # this package's own text, with counts and roles only
            raise ServeError(ErrorKind.INVALID_REQUEST, str(error)) from error
        if read.tolist() != prepared.prompt.ids.tolist():
            param = "messages" if request.prompt is None else "prompt"
            raise ServeError(ErrorKind.INVALID_REQUEST, BACKEND_READS_OTHERWISE, param)
        return SplitPrompt(prepared, turns)


def _as_server_reads(message: dict[str, Any]) -> Message:
    """A message with its parts a line each, as the plug-in joins them."""
    content = message["content"]
    if isinstance(content, str):
        return Message(message["role"], content)
    return Message(message["role"], text_of_parts([part.get("text", DEFAULT_IMAGE_TOKEN) for part in content]))
