"""Make transformers' Auto classes know the native face."""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # its name in `transformers` asks for torchvision up to 5.17

from llava.model.native.configuration_avg_llava import AvgLlavaConfig
from llava.model.native.image_processing_avg_llava import AvgLlavaImageProcessor
from llava.model.native.modeling_avg_llava import AvgLlavaForConditionalGeneration, AvgLlavaModel
from llava.model.native.processing_avg_llava import AvgLlavaProcessor

AutoConfig.register(AvgLlavaConfig.model_type, AvgLlavaConfig, exist_ok=True)
AutoModel.register(AvgLlavaConfig, AvgLlavaModel, exist_ok=True)
for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForCausalLM):
    auto.register(AvgLlavaConfig, AvgLlavaForConditionalGeneration, exist_ok=True)
# Of Pillow's kind alone: torchvision resizes differently.
AutoImageProcessor.register(AvgLlavaConfig, image_processor_classes={"pil": AvgLlavaImageProcessor}, exist_ok=True)
AutoProcessor.register(AvgLlavaConfig, AvgLlavaProcessor, exist_ok=True)
