"""From a request to ids and views, and all checks that need no computation by the model."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic

import torch
from PIL import Image
from torch import Tensor

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.images import ImageError
from llava.inference import Assistant
from llava.mm_utils import text_of_ids, tokenizer_image_token
from llava.model.compose import ImageInput, RoutingPlan
from llava.model.routing import RoutingError
from llava.model.splice import prompt_row
from llava.serve.engine.caches import TensorCache, image_key
from llava.serve.engine.task import Prepared
from llava.serve.protocol import EngineImage, ErrorKind, GenerationRequest, PromptTokens, Sampling, ServeError
from llava.serve.protocol.error_templates import NO_IMAGES, NO_SUCH_TOKEN, TOKEN_OUT_OF_VOCABULARY, TOO_LONG, TOO_LONG_WITH_IMAGES


@dataclass(frozen=True)
class KeyedImage:
    """An image as the engine takes it, and its key in the cache of features."""

    key: str
    image: ImageInput


class Preparer:
    """Prepares requests one by one; thread-safe.

    Args:
        assistant: the loaded model.
        features: cache of image features. revision: of the weights, for its keys.
        longest_row: positions that one request may take, its answer included.
    """

    def __init__(self, assistant: Assistant, features: TensorCache, revision: str, longest_row: int) -> None:
        self.assistant, self.model = assistant, assistant.model
        self.features, self.revision, self.longest_row = features, revision, longest_row
        self._tokenizing = threading.Lock()

    def prepare_image(self, image: Image.Image) -> EngineImage:
        """The image's features where they are cached, else its views; see `protocol.Engine`."""
        start = monotonic()
        if self.model.get_model().vision_tower is None:
            raise ServeError(ErrorKind.INVALID_REQUEST, NO_IMAGES)
        key = image_key(image, self.revision)
        kept = self.features.peek(key)
        try:
            taken = ImageInput(kept[0], image.size, is_encoded=True) if kept else self.assistant.image_input(image)
        except ImageError as error:
            raise ServeError(ErrorKind.INVALID_IMAGE) from error
        return EngineImage(image.size, KeyedImage(key, taken), taken.tensor.nbytes, monotonic() - start)

    def prepare(self, request: GenerationRequest) -> Prepared:
        """
        Raises:
            ServeError: the request cannot work.
        """
        check_token_ids(request.sampling, self.model.config.vocab_size)
        prepared = self._prepared(request)
        self._check_length(request, prepared)
        return prepared

    def tokens(self, request: GenerationRequest, special: bool) -> PromptTokens:
        """The tokens of a prompt, however long it is.

        Args:
            special: whether to include the one that begins every text.

        Raises:
            ServeError: the request cannot work.
        """
        prepared = self._prepared(request)
        plan = self._plan(request, prepared)
        ids, tokenizer = prepared.prompt.ids.tolist(), self.assistant.tokenizer
        if not special and ids[:1] == [tokenizer.bos_token_id]:
            ids = ids[1:]
        with self._tokenizing:
            texts = [DEFAULT_IMAGE_TOKEN if number == IMAGE_TOKEN_INDEX else str(tokenizer.convert_ids_to_tokens(number)) for number in ids]
        return PromptTokens(tuple(ids), tuple(texts), tuple(plan.cost_ranges(0)))

    def text_of(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included, with `<image>` where an image goes.

        Raises:
            ServeError: an id that is not in the vocabulary.
        """
        tokenizer = self.assistant.tokenizer
        for place, number in enumerate(ids):
            if number != IMAGE_TOKEN_INDEX and not 0 <= number < len(tokenizer):
                message = NO_SUCH_TOKEN.format(number=number, count=len(tokenizer))
                raise ServeError(ErrorKind.INVALID_REQUEST, message, f"tokens[{place}]")
        with self._tokenizing:
            return text_of_ids(ids, tokenizer)

    def _prepared(self, request: GenerationRequest) -> Prepared:
        try:
            prompt = prompt_row(self._ids(request).to(self.model.device))
        except ValueError as error:  # this package's own text, with counts and roles only
            raise ServeError(ErrorKind.INVALID_REQUEST, str(error), _text_field(request)) from error
        given: list[KeyedImage] = [image.content for image in request.images]
        known = [self.features.get(each.key) if each.key in self.features else None for each in given]
        images = tuple(
            ImageInput(kept[0], each.image.size, is_encoded=True) if kept else each.image for kept, each in zip(known, given, strict=True)
        )
        return Prepared(prompt, tuple(each.key for each in given), images)

    def _ids(self, request: GenerationRequest) -> Tensor:
        with self._tokenizing:
            if request.prompt is None:
                return self.assistant.prompt_ids(request.messages, len(request.images))
            if not request.prompt.strip():
                raise ValueError("The prompt is empty; give a question.")
            return torch.as_tensor(tokenizer_image_token(request.prompt, self.assistant.tokenizer))

    def _plan(self, request: GenerationRequest, prepared: Prepared) -> RoutingPlan:
        try:
            return self.model.plan([prepared.prompt], prepared.images, request.routing)
        except RoutingError as error:
            raise ServeError(ErrorKind.INVALID_REQUEST, str(error), ROUTING_FIELDS[error.field], error.least) from error
        except ValueError as error:  # as above: the number of placeholders
            raise ServeError(ErrorKind.INVALID_REQUEST, str(error), _text_field(request)) from error

    def _check_length(self, request: GenerationRequest, prepared: Prepared) -> None:
        """Refuse a prompt that does not fit at the coarsest granularity it may have."""
        cheapest = sum(fewest for fewest, _ in self._plan(request, prepared).cost_ranges(0))
        text = prepared.prompt.num_text_tokens
        if text + cheapest >= self.longest_row:
            raise too_long(request, self.longest_row, by_images=text < self.longest_row)


ROUTING_FIELDS = {
    "granularity": "granularity",
    "max_visual_tokens": "max_visual_tokens",
    "bias": "granularity_bias",
    "details": "images",
}
"""Clients' names of the fields of `RoutingRequest`."""


def _text_field(request: GenerationRequest) -> str:
    return "messages" if request.prompt is None else "prompt"


def check_token_ids(sampling: Sampling, size: int) -> None:
    """Refuse ids that are not in the vocabulary.

    Raises:
        ServeError: with the field.
    """
    for param, ids in (("logit_bias", [token for token, _ in sampling.logit_bias]), ("stop_token_ids", list(sampling.stop_token_ids))):
        if beyond := [token for token in ids if token >= size]:
            message = TOKEN_OUT_OF_VOCABULARY.format(param=param, number=beyond[0], count=size)
            raise ServeError(ErrorKind.INVALID_REQUEST, message, param)


def too_long(request: GenerationRequest, longest_row: int, by_images: bool = True) -> ServeError:
    """A prompt that leaves no room for an answer.

    Args:
        by_images: whether the text alone would have fitted, so that a coarser granularity may help.
    """
    message = (TOO_LONG_WITH_IMAGES if by_images else TOO_LONG).format(positions=longest_row)
    return ServeError(ErrorKind.CONTEXT_LENGTH, message, _text_field(request))
