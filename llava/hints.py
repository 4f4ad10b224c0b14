"""What other libraries warn of in every run and nobody can act upon; kept back from the moment that this package is imported."""

from __future__ import annotations

import logging
import re
import warnings

LOGGED: dict[str, re.Pattern[str]] = {
    # an optional faster kernel of a package we do not use is missing; nothing depends on it
    "bitsandbytes.backends.cpu.ops": re.compile("Failed to load CPU gemm_4bit_forward from kernels-community"),
    # how 8-bit products are computed for every model that is not in float16, once per layer and token
    "bitsandbytes.autograd._functions": re.compile("MatMul8bitLt: inputs will be cast from"),
    # missing and unexpected keys, a screen long; our loading fills them from elsewhere, or refuses them in a sentence of its own.
    # Sizes that do not fit stay: the error that follows names them nowhere else.
    "transformers.modeling_utils": re.compile(
        r"\W*(?:\[1m)?(?:Llava\w+|CLIPVisionModel) LOAD REPORT(?!.*(?:MISMATCH|CONVERSION))", re.DOTALL
    ),
}
"""Name of a logger -> how the messages begin."""

WARNED = {
    # the name that the flag has in every release of transformers that pyproject.toml allows
    "`gradient_checkpointing` is deprecated": FutureWarning,
}
"""Beginning of a warning -> its category."""


def keep_back_hints() -> None:
    """Have the messages of the tables left out wherever they are logged or warned of."""
    for name in LOGGED:
        logging.getLogger(name).addFilter(_is_no_hint)
    for beginning, category in WARNED.items():
        warnings.filterwarnings("ignore", re.escape(beginning), category)


def _is_no_hint(record: logging.LogRecord) -> bool:
    return LOGGED[record.name].match(str(record.msg)) is None
