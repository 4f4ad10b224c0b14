"""How a language model is quantised with bitsandbytes, for inference and for training alike."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from transformers import BitsAndBytesConfig

WHOLE_PARTS = ["model.mm_projector", "model.multi_modal_projector", "model.vision_tower", "model.router", "lm_head"]
"""Never quantised: small, and what the answers' precision hangs on."""


def kept_in_float32(config: Any) -> list[str] | None:
    """`_keep_in_fp32_modules` of a model that is being built: its router, where a stock configuration quantises every linear layer.

    Quantisers leave alone what is named here, and compare with the start of a module's name. Without one the router has the dtype of the
    rest.
    """
    return None if getattr(config, "quantization_config", None) is None else ["model.router"]


def quantization_config(
    bits: int, compute_dtype: torch.dtype, double_quant: bool = True, quant_type: str = "nf4"
) -> BitsAndBytesConfig:
    """What transformers' `from_pretrained` takes as `quantization_config`.

    Args:
        bits: 4 or 8. compute_dtype, double_quant, quant_type: of 4 bits, as bitsandbytes has them.

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise ImportError(
            '8-bit and 4-bit weights need bitsandbytes, which is not installed: pip install "bitsandbytes>=0.50,<0.51", or the train extra '
            'with pip install -e ".[train]".'
        )
    return BitsAndBytesConfig(
        load_in_8bit=bits == 8,
        load_in_4bit=bits == 4,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_quant_type=quant_type,
        llm_int8_skip_modules=list(WHOLE_PARTS),
    )
