"""The native face: AVG-LLaVA as transformers writes a model, on any text model and vision tower of its Auto classes.

It composes its inputs with the same `Composer` as LLaVA's face. An image is marked by a token of the vocabulary, `generate` returns the
prompt and the new ids, and weights are named as LLaVA-NeXT's in transformers.
"""

import llava.model.native.registration  # noqa: F401
from llava.model.native.configuration_avg_llava import AvgLlavaConfig
from llava.model.native.modeling_avg_llava import AvgLlavaForConditionalGeneration, AvgLlavaModel, AvgLlavaPreTrainedModel

__all__ = ["AvgLlavaConfig", "AvgLlavaForConditionalGeneration", "AvgLlavaModel", "AvgLlavaPreTrainedModel"]
