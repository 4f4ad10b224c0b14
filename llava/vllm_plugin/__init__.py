"""AVG-LLaVA inside a stock vLLM: `vllm serve MODEL` answers with a granularity per request, the router included.

    messages ──renderer──> ids with one image token per image ──processing──> a level and T image tokens per image ──model──> answer

vLLM calls `register` in each of its processes, through the entry point `vllm.general_plugins`. What stands in `wishes`, `chat`, `served`
and `deciding` knows no vLLM; `renderer`, `processing` and `model` fit it into vLLM's interfaces. docs/vLLM.md says how to use it.
"""

from __future__ import annotations

ARCHITECTURES = ("AvgLlavaForConditionalGeneration", "LlavaLlamaForCausalLM", "LlavaMistralForCausalLM")
"""Of the native layout, and of LLaVA's."""


def register() -> None:
    """Make vLLM know our models, and how their prompts are written."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    from llava.vllm_plugin.settings import MODE, AvgLlavaSettings

    if MODE in RENDERER_REGISTRY.renderers:
        return
    RENDERER_REGISTRY.register(MODE, "llava.vllm_plugin.renderer", "AvgLlavaRenderer")
    TokenizerRegistry.register(MODE, "llava.vllm_plugin.renderer", "AvgLlavaTokenizer")
    for architecture in ARCHITECTURES:
        ModelRegistry.register_model(architecture, "llava.vllm_plugin.model:AvgLlavaForVllm")
        MODELS_CONFIG_MAP[architecture] = AvgLlavaSettings
