"""What vLLM's own configuration needs to be told about our checkpoints."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig

from llava.vllm_plugin.served import complete

MODE = "avg_llava"
"""vLLM's name of our renderer and tokenizer, as in `--tokenizer-mode`; our checkpoints choose it by themselves."""


class AvgLlavaSettings(VerifyAndUpdateConfig):
    """Called by vLLM once it has read a checkpoint's configuration, before anything is built."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Choose our tokenizer, and give a checkpoint in LLaVA's layout its image token.

        Raises:
            ValueError: a checkpoint that cannot be served, or another tokenizer.
        """
        if model_config.tokenizer_mode not in ("auto", MODE):
            raise ValueError(f"--tokenizer-mode is {model_config.tokenizer_mode}, expected {MODE}, which is also the default.")
        model_config.tokenizer_mode = MODE
        complete(model_config.hf_config, model_config.model, {} if model_config.revision is None else {"revision": model_config.revision})
        model_config.model_arch_config = model_config.get_model_arch_config()
