"""Llama-shaped language models: Vicuna, Llama, SmolLM2."""

from __future__ import annotations

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, LlamaModel

from llava.model.config import LlavaConfig
from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel
from llava.model.loading import CheckpointLoading
from llava.model.quantization import kept_in_float32
from llava.model.router import register_stored_names


class LlavaLlamaModel(LlavaMetaModel, LlamaModel):
    """Llama's inner module with the multimodal parts beside its layers."""

    config_class = LlavaConfig

    def __init__(self, config: LlavaConfig) -> None:
        LlamaModel.__init__(self, config)
        self.build_multimodal()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if not self.init_multimodal_weights(module):
            super()._init_weights(module)


class LlavaLlamaForCausalLM(CheckpointLoading, LlavaMetaForCausalLM, LlamaForCausalLM):
    """AVG-LLaVA over a Llama-shaped language model. The path from image to answer is in `llava_arch.py`."""

    config_class = LlavaConfig

    def __init__(self, config: LlavaConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)
        self._keep_in_fp32_modules = kept_in_float32(config)
        self.model = LlavaLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


register_stored_names(LlavaConfig.model_type)
AutoConfig.register(LlavaConfig.model_type, LlavaConfig)
AutoModelForCausalLM.register(LlavaConfig, LlavaLlamaForCausalLM)
