"""Loading a tokenizer whose ids are the ones the checkpoint was trained with, and reading text that spells its special tokens.

transformers 5 rebuilds every SentencePiece Llama tokenizer on the `tokenizers` library, with the pre-tokenizer
`Metaspace(prepend_scheme=...)`. SentencePiece puts one space in front of a text *always* (`add_dummy_prefix`);
Metaspace does so *unless the text already starts with a space*. A chunk such as `" please."`, which is what follows an
image placeholder in `"Look at <image> please."`, therefore loses one space piece, and the checkpoint reads ids that it
was not trained on. Saving loses a second thing: the `legacy` switch, which says whether the text after a special token
such as `</s>` gets the extra space too, is not written back.

`load_tokenizer` repairs both inside the backend itself, so that `tokenizer(...)`, `encode` and whatever is saved later
are right. Tokenizers of other kinds (Qwen, Llama 3, ...) pass through untouched.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import secrets
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import cached_file

from llava.checkpoint_files import hub_options, one_line
from llava.tokenizer_files import check_tokenizer_files

T = TypeVar("T")

_UNREADABLE = "The text spells a special token, which this model's tokenizer cannot read as text; leave it out."

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space inside a piece
# Rebuilt from the backend; passing these on would make the new tokenizer load or describe another one.
_BACKEND_OPTIONS = ("vocab", "merges", "vocab_file", "tokenizer_file", "tokenizer_object", "sp_model_kwargs", "legacy")


def load_tokenizer(path: str | os.PathLike[str], **kwargs: Any) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or a hub id, with the ids of the SentencePiece model where there is one.

    Args:
        path: folder (or hub id) with `tokenizer.model` or `tokenizer.json`.
        **kwargs: passed to `AutoTokenizer.from_pretrained` (`padding_side`, `model_max_length`, `legacy`, ...).
            `legacy=True` also puts a space in front of every text that follows a special token. When neither the call
            nor `tokenizer_config.json` says, a folder with `tokenizer.model` alone is legacy, which was the default of
            the libraries that wrote such folders.

    Returns:
        For a SentencePiece Llama tokenizer a `PreTrainedTokenizerFast`, which `save_pretrained` and then any
        `from_pretrained` restore as it is; for any other kind what `AutoTokenizer` gives.

    Raises:
        ValueError: files that are missing, damaged, or that no tokenizer can be made of.
    """
    check_tokenizer_files(path, hub_options(kwargs))
    try:
        # Asked without an answer, transformers waits at the terminal whether to run the code that a hub id names.
        tokenizer = AutoTokenizer.from_pretrained(path, **{"trust_remote_code": False, **kwargs})
        if not tokenizer("Which colour?").input_ids:
            raise ValueError("it gives no ids for a text")
    except (ImportError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the Rust and C++ libraries under it raise bare exceptions, and panics, which are not even those
        raise ValueError(f"The tokenizer of {path} cannot be read ({one_line(error)}); copy its files again.") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return tokenizer
    backend = tokenizer.backend_tokenizer
    if not _is_sentencepiece_bpe(backend):
        return tokenizer
    _prefix_like_sentencepiece(backend, "always" if _is_legacy(path, kwargs) else "first")
    options = {key: value for key, value in tokenizer.init_kwargs.items() if key not in _BACKEND_OPTIONS}
    options["chat_template"] = tokenizer.chat_template
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


def _once_per_vocabulary(make: Callable[[PreTrainedTokenizerBase], T]) -> Callable[[PreTrainedTokenizerBase], T]:
    """Keep what is made of a tokenizer for as long as it lives and gets no further tokens."""
    kept: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[object, T]] = WeakKeyDictionary()

    @functools.wraps(make)
    def get(tokenizer: PreTrainedTokenizerBase) -> T:
        vocabulary = len(tokenizer), tokenizer.all_special_tokens
        found = kept.get(tokenizer)
        if found is None or found[0] != vocabulary:
            kept[tokenizer] = found = vocabulary, make(tokenizer)
        return found[1]

    return get


@_once_per_vocabulary
def special_texts(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """What finds the tokenizer's special tokens in a text; longer ones are found where a shorter one begins them."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")


class PlainTokenizer:
    """A copy of a tokenizer that tells a special token from a text that spells one.

    What somebody said goes through `escape`, what a template writes does not, and the copy reads both together: escaped text as text like
    any other, the rest as ever. Escapes are random characters of a private area that never leave this process, so that no text can hold
    one by intent or chance.

    Attributes:
        tokenizer: the copy. Ids are the original's, offsets those of the text that it is given, escapes included.

    Args:
        tokenizer: one of the `tokenizers` library.

    Raises:
        ValueError: another one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ValueError(_UNREADABLE)
        self._special = special_texts(tokenizer)
        self._escape = "".join(chr(0xF0000 + secrets.randbelow(0xFFFE)) for _ in range(8))
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        # Special tokens are looked for before a text is normalised, and what was escaped becomes the text that it was afterwards.
        state["added_tokens"] = [{**token, "normalized": token["normalized"] and not token["special"]} for token in state["added_tokens"]]
        unescape = {"type": "Replace", "pattern": {"String": self._escape}, "content": ""}
        state["normalizer"] = {"type": "Sequence", "normalizers": [unescape, *filter(None, [state["normalizer"]])]}
        self.tokenizer = copy.deepcopy(tokenizer)
        self.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
        special = {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._unreadable = {text for index, text in special.items() if index in self.encode(self._escaped(text))}

    def escape(self, text: str) -> str:
        """Somebody's text, for `tokenizer`.

        Raises:
            ValueError: it spells a special token that the vocabulary has as a word too.
        """
        if self._unreadable.intersection(self._special.findall(text)):
            raise ValueError(_UNREADABLE)
        return self._special.sub(lambda found: self._escaped(found[0]), text)

    def _escaped(self, token: str) -> str:
        return token[0] + self._escape + token[1:]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without what the tokenizer puts in front of every text."""
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)


@_once_per_vocabulary
def plain_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PlainTokenizer:
    """The `PlainTokenizer` of a tokenizer; errors as there."""
    return PlainTokenizer(tokenizer)


def _is_sentencepiece_bpe(backend: Tokenizer) -> bool:
    """Whether the backend is what transformers builds for a SentencePiece BPE model with a dummy prefix."""
    if backend.normalizer is not None or not isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace):
        return False
    metaspace = backend.pre_tokenizer
    has_prefix = metaspace.prepend_scheme in ("first", "always") and metaspace.replacement == _SPACE
    return has_prefix and not metaspace.split and bool(getattr(backend.model, "byte_fallback", False))


def _prefix_like_sentencepiece(backend: Tokenizer, prepend_scheme: str) -> None:
    """Make the backend add its space in front of a text whatever the text starts with.

    Metaspace skips the prefix when the text starts with its own replacement character. So the spaces of the text become
    space pieces first; then a Metaspace whose replacement is a plain space finds none at the start and always adds
    one; then a second one turns that plain space into a space piece.

    Args:
        prepend_scheme: "first" (only at the start of the whole text) or "always" (also after each special token).
    """
    backend.normalizer = normalizers.Replace(" ", _SPACE)
    backend.pre_tokenizer = _sentencepiece_prefix(prepend_scheme)


def _sentencepiece_prefix(prepend_scheme: str) -> pre_tokenizers.Sequence:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement=" ", prepend_scheme=prepend_scheme, split=False),
            pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="never", split=False),
        ]
    )


def prefix_like_transformers(tokenizer: PreTrainedTokenizerBase) -> None:
    """Undo in a tokenizer of `load_tokenizer` what is done to texts that begin with a space.

    transformers tokenises a whole prompt, and code that stands on it an answer alone, with the space in front: ` Yes` has to be the piece
    that it is behind `ASSISTANT:`.
    """
    backend = tokenizer.backend_tokenizer if isinstance(tokenizer, PreTrainedTokenizerFast) else None
    for scheme in ("first", "always"):
        if backend is not None and repr(backend.pre_tokenizer) == repr(_sentencepiece_prefix(scheme)):
            backend.normalizer = None
            backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme=scheme, split=False)


def _is_legacy(path: str | os.PathLike[str], options: dict[str, Any]) -> bool:
    """Whether a space goes in front of texts after special tokens: the caller's word, the config's, or the files'."""
    if options.get("legacy") is not None:
        return bool(options["legacy"])
    hub = hub_options(options)
    config = get_tokenizer_config(path, **hub)
    if config.get("legacy") is not None:
        return bool(config["legacy"])
    tokenizer_file = cached_file(path, "tokenizer.json", _raise_exceptions_for_missing_entries=False, **hub)
    if tokenizer_file is None:
        return True
    with open(tokenizer_file, encoding="utf-8") as file:
        pre_tokenizer = json.load(file).get("pre_tokenizer") or {}
    # Without a Metaspace of scheme "first" the file writes its prefix with a normalizer, which acts on every text.
    return bool(pre_tokenizer.get("prepend_scheme") != "first")
