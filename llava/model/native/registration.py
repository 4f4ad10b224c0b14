"""Make transformers' Auto classes know the native face."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM

from llava.model.native.configuration_avg_llava import AvgLlavaConfig
from llava.model.native.modeling_avg_llava import AvgLlavaForConditionalGeneration, AvgLlavaModel

AutoConfig.register(AvgLlavaConfig.model_type, AvgLlavaConfig, exist_ok=True)
AutoModel.register(AvgLlavaConfig, AvgLlavaModel, exist_ok=True)
for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForCausalLM):
    auto.register(AvgLlavaConfig, AvgLlavaForConditionalGeneration, exist_ok=True)
