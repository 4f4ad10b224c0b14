"""The public helpers between a user's images and text and the model's inputs, under LLaVA's names and call forms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import PurePosixPath
from typing import Any, overload

import torch
from PIL import Image
from transformers import StoppingCriteria

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import Span, answer_headers
from llava.crops import (
    divide_to_patches,
    get_anyres_image_grid_shape,
    process_anyres_image,
    process_image_for_mode,
    resize_and_pad_image,
    select_best_resolution,
)
from llava.images import check_aspect_ratio, expand2square, load_image_from_base64, to_rgb
from llava.tokenizer import plain_tokenizer, special_texts

__all__ = [
    "KeywordsStoppingCriteria",
    "divide_to_patches",
    "expand2square",
    "get_anyres_image_grid_shape",
    "get_model_name_from_path",
    "load_image_from_base64",
    "process_anyres_image",
    "process_images",
    "resize_and_pad_image",
    "select_best_resolution",
    "text_of_ids",
    "tokenize_spans",
    "tokenizer_image_token",
]


def process_images(
    images: Sequence[Image.Image], image_processor: Any, model_cfg: Any
) -> torch.Tensor | list[torch.Tensor]:
    """Turn images into the vision tower's input, as the model's config says.

    Args:
        images: PIL images of any mode and size.
        image_processor: image processor of the vision tower.
        model_cfg: any object with `image_aspect_ratio` (see `llava.crops.IMAGE_MODES`; missing means "none") and, for
            "anyres", `image_grid_pinpoints`.

    Returns:
        One tensor when all images have the same number of views, (B, C, 3, S, S) for "anyres" and (B, 3, S, S)
        otherwise; else a list of (C, 3, S, S).

    Raises:
        ValueError: no images, one that is too thin, or a config that does not say how to prepare them.
    """
    if not images:
        raise ValueError("process_images got no image, expected at least one: leave `images` out for text alone")
    for image in images:
        check_aspect_ratio(image.size)
    mode = getattr(model_cfg, "image_aspect_ratio", None)
    pinpoints = getattr(model_cfg, "image_grid_pinpoints", None)
    views = [process_image_for_mode(to_rgb(image), image_processor, mode, pinpoints) for image in images]
    if all(view.shape == views[0].shape for view in views):
        return torch.stack(views)
    return views


@overload
def tokenizer_image_token(prompt: str, tokenizer: Any, image_token_index: int = ..., return_tensors: None = None) -> list[int]: ...


@overload
def tokenizer_image_token(prompt: str, tokenizer: Any, image_token_index: int = ..., *, return_tensors: str) -> torch.Tensor: ...


@overload
def tokenizer_image_token(prompt: str, tokenizer: Any, image_token_index: int, return_tensors: str) -> torch.Tensor: ...


def tokenizer_image_token(
    prompt: str, tokenizer: Any, image_token_index: int = IMAGE_TOKEN_INDEX, return_tensors: str | None = None
) -> list[int] | torch.Tensor:
    """Tokenise a prompt in which each `<image>` becomes one placeholder id.

    The texts around the placeholders are tokenised one by one, each as a text of its own; what the tokenizer puts in
    front of every text (bos) is written once, at the very start.

    Spaces behind the header of an open answer (`ASSISTANT: `) are left out. A tokenizer makes a token of its own of them, while the words
    of an answer carry their space with them: after that token, no answer begins as it did in training.

    Args:
        prompt: text with any number of `<image>`.
        tokenizer: the model's tokenizer (see `llava.tokenizer.load_tokenizer`).
        image_token_index: id of a placeholder.
        return_tensors: None for a list, "pt" for a tensor of shape (L,).

    Raises:
        ValueError: another `return_tensors`.
    """
    if return_tensors not in (None, "pt"):
        raise ValueError(f"return_tensors is {return_tensors!r}, expected None for a list or 'pt' for a tensor")
    bare = prompt.rstrip(" ")
    ids = _plain_ids(bare if bare.endswith(answer_headers()) else prompt, tokenizer, image_token_index)
    return ids if return_tensors is None else torch.tensor(ids, dtype=torch.long)


def tokenize_spans(spans: Sequence[Span], tokenizer: Any, image_token_index: int = IMAGE_TOKEN_INDEX) -> list[int]:
    """Tokenise a prompt in which special tokens come from the template's markup alone, whatever the texts in it spell.

    The ids are those of `tokenizer_image_token` on the whole prompt, except where a text spells a special token (`</s>`): there they
    are what the tokenizer makes of those characters as of any others, so that no text can end its own turn and speak for another role.

    Args:
        spans: the prompt, as `Conversation.get_spans` gives it.
        tokenizer, image_token_index: as in `tokenizer_image_token`.

    Raises:
        ValueError: a text that spells a special token, with a tokenizer that is none of the `tokenizers` library.
    """
    prompt = "".join(span.text for span in spans)
    special = special_texts(tokenizer)
    from_markup = sum(len(special.findall(span.text)) for span in spans if not span.is_text)
    if len(special.findall(prompt)) == from_markup:
        return _plain_ids(prompt, tokenizer, image_token_index)
    plain = plain_tokenizer(tokenizer)
    escaped = "".join(plain.escape(span.text) if span.is_text else span.text for span in spans)
    return _ids_around_images(escaped, tokenizer, plain.encode, image_token_index)


def text_of_ids(ids: Sequence[int], tokenizer: Any, image_text: str = DEFAULT_IMAGE_TOKEN, **options: Any) -> str:
    """The text that ids stand for: what `tokenizer_image_token` reads.

    Args:
        image_text: written for a placeholder. options: of the tokenizer's `decode`.
    """
    runs = [(is_image, list(run)) for is_image, run in groupby(ids, key=IMAGE_TOKEN_INDEX.__eq__)]
    return "".join(image_text * len(run) if is_image else str(tokenizer.decode(run, **options)) for is_image, run in runs)


def _plain_ids(prompt: str, tokenizer: Any, image_token_index: int) -> list[int]:
    return _ids_around_images(prompt, tokenizer, lambda text: tokenizer(text, add_special_tokens=False).input_ids, image_token_index)


def _ids_around_images(prompt: str, tokenizer: Any, encode: Callable[[str], list[int]], image_token_index: int) -> list[int]:
    """What the tokenizer puts in front of every text, and the ids of the texts between the placeholders."""
    bos = tokenizer.bos_token_id
    ids = [bos] if bos is not None and list(tokenizer("").input_ids)[:1] == [bos] else []
    for i, text in enumerate(prompt.split(DEFAULT_IMAGE_TOKEN)):
        if i > 0:
            ids.append(image_token_index)
        if text:
            ids.extend(encode(text))
    return ids


def get_model_name_from_path(model_path: str) -> str:
    """Return a name to show for a model: the last part of its path, with the run's name before a `checkpoint-N`.

    Nothing in this package decides anything by this name.
    """
    parts = PurePosixPath(model_path.strip().replace("\\", "/")).parts
    if not parts:
        raise ValueError(f"the model path is {model_path!r}, expected a folder or a hub id")
    if parts[-1].startswith("checkpoint-") and len(parts) > 1:
        return f"{parts[-2]}_{parts[-1]}"
    return parts[-1]


class KeywordsStoppingCriteria(StoppingCriteria):
    """Stop each row of a batch on its own as soon as one of the keywords is at the end of what it generated.

    Works for generation from ids, where a row holds prompt and answer, and from embeddings, where it holds the answer
    alone: the prompt is skipped only where a row really starts with it.
    """

    def __init__(self, keywords: Sequence[str], tokenizer: Any, input_ids: torch.Tensor) -> None:
        """Remember what to look for.

        Args:
            keywords: texts that end an answer; special tokens such as `</s>` are allowed.
            tokenizer: the tokenizer that writes the ids.
            input_ids: (B, L) ids of the prompt.

        Raises:
            ValueError: no keywords, or an empty one.
        """
        keywords = [keywords] if isinstance(keywords, str) else list(keywords)
        if not keywords or not all(keywords):
            raise ValueError(f"the stopping keywords are {keywords!r}, expected at least one text and no empty one")
        self.keywords = keywords
        self.tokenizer = tokenizer
        self.prompt_ids = input_ids
        # A token stands for at least one byte, except the odd space piece; the margin covers those.
        self.window = max(len(keyword.encode()) for keyword in keywords) + 4

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        """Return for each row of (B, T) ids whether it is done, (B,) booleans on the same device."""
        answers = input_ids[:, self._prompt_length(input_ids) :][:, -self.window :]
        texts = [self.tokenizer.decode(row, skip_special_tokens=False) for row in answers.tolist()]
        done = [any(keyword in text for keyword in self.keywords) for text in texts]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)  # type: ignore[return-value]

    def _prompt_length(self, input_ids: torch.Tensor) -> int:
        """Return how many leading columns of the rows are the prompt: all of it or none."""
        rows, length = self.prompt_ids.shape
        if input_ids.shape[1] < length or input_ids.shape[0] % rows:
            return 0
        # Beams and several samples per prompt repeat each prompt row, next to one another.
        prompt = self.prompt_ids.to(input_ids.device).repeat_interleave(input_ids.shape[0] // rows, dim=0)
        return length if torch.equal(input_ids[:, :length], prompt) else 0
