"""Mistral-shaped language models."""

from __future__ import annotations

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, MistralForCausalLM, MistralModel

from llava.model.config import LlavaMistralConfig
from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel
from llava.model.loading import CheckpointLoading
from llava.model.quantization import kept_in_float32
from llava.model.router import register_stored_names


class LlavaMistralModel(LlavaMetaModel, MistralModel):
    """Mistral's inner module with the multimodal parts beside its layers."""

    config_class = LlavaMistralConfig

    def __init__(self, config: LlavaMistralConfig) -> None:
        MistralModel.__init__(self, config)
        self.build_multimodal()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if not self.init_multimodal_weights(module):
            super()._init_weights(module)


class LlavaMistralForCausalLM(CheckpointLoading, LlavaMetaForCausalLM, MistralForCausalLM):
    """AVG-LLaVA over a Mistral-shaped language model. The path from image to answer is in `llava_arch.py`."""

    config_class = LlavaMistralConfig

    def __init__(self, config: LlavaMistralConfig) -> None:
        super(MistralForCausalLM, self).__init__(config)
        self._keep_in_fp32_modules = kept_in_float32(config)
        self.model = LlavaMistralModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


register_stored_names(LlavaMistralConfig.model_type)
AutoConfig.register(LlavaMistralConfig.model_type, LlavaMistralConfig)
AutoModelForCausalLM.register(LlavaMistralConfig, LlavaMistralForCausalLM)
