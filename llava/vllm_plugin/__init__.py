"""AVG-LLaVA inside a stock vLLM: `vllm serve MODEL` answers with a granularity per request, the router included.

vLLM calls `register` in each of its processes, through the entry point `vllm.general_plugins`.
"""

from __future__ import annotations


def register() -> None:
    """Make vLLM know our model classes."""
    from vllm import ModelRegistry

    for architecture in ("AvgLlavaForConditionalGeneration", "LlavaLlamaForCausalLM", "LlavaMistralForCausalLM"):
        ModelRegistry.register_model(architecture, "llava.vllm_plugin.model:AvgLlavaForVllm")
