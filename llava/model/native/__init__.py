"""The native face: AVG-LLaVA with the interface of transformers' own models, on any text model and vision tower of its Auto classes.

It composes its inputs with the same `Composer` as LLaVA's face (`llava_arch.py`) and differs in what a caller sees: an image is marked by a
token of the vocabulary instead of the id -200, `generate` returns the prompt before the new ids, and the weights have the names that
LLaVA-NeXT's have in transformers.
"""

import llava.model.native.registration  # noqa: F401
from llava.model.native.configuration_avg_llava import AvgLlavaConfig
from llava.model.native.image_processing_avg_llava import AvgLlavaImageProcessor
from llava.model.native.modeling_avg_llava import AvgLlavaForConditionalGeneration, AvgLlavaModel, AvgLlavaPreTrainedModel
from llava.model.native.processing_avg_llava import AvgLlavaProcessor

__all__ = [
    "AvgLlavaConfig",
    "AvgLlavaForConditionalGeneration",
    "AvgLlavaImageProcessor",
    "AvgLlavaModel",
    "AvgLlavaPreTrainedModel",
    "AvgLlavaProcessor",
]
