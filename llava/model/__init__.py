"""The model: a file per step, `compose.py`, which composes them, LLaVA's layout (`llava_arch.py`) and the native one (`native/`).

The model has two *faces*, classes under one contract each over the same composer: LLaVA's (`llava_arch.py`, mixed into a text model in
`language_model/`) and that of transformers' own models (`native/`). A face decides how a prompt marks an image, what `generate` takes and
returns, and how the weights are named.
"""

from llava.model.config import LlavaConfig, LlavaMistralConfig
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.language_model.llava_mistral import LlavaMistralForCausalLM
from llava.model.native import AvgLlavaConfig, AvgLlavaForConditionalGeneration, AvgLlavaImageProcessor, AvgLlavaModel, AvgLlavaProcessor
from llava.model.processing import LlavaLayoutProcessor

__all__ = [
    "AvgLlavaConfig",
    "AvgLlavaForConditionalGeneration",
    "AvgLlavaImageProcessor",
    "AvgLlavaModel",
    "AvgLlavaProcessor",
    "LlavaConfig",
    "LlavaLayoutProcessor",
    "LlavaLlamaForCausalLM",
    "LlavaMistralConfig",
    "LlavaMistralForCausalLM",
]
