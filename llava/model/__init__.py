"""The model: stage files, the page that composes them (`llava_arch.py`), and thin language model families."""

from llava.model.config import LlavaConfig, LlavaMistralConfig
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.language_model.llava_mistral import LlavaMistralForCausalLM
from llava.model.native import AvgLlavaConfig, AvgLlavaForConditionalGeneration, AvgLlavaModel
from llava.model.processing import AvgLlavaProcessor

__all__ = [
    "AvgLlavaConfig",
    "AvgLlavaForConditionalGeneration",
    "AvgLlavaModel",
    "AvgLlavaProcessor",
    "LlavaConfig",
    "LlavaLlamaForCausalLM",
    "LlavaMistralConfig",
    "LlavaMistralForCausalLM",
]
