"""Published shapes of models, for estimates without a checkpoint."""

from __future__ import annotations

from typing import Any

_AVG_LLAVA: dict[str, Any] = {
    # openai/clip-vit-large-patch14-336, config.json (Radford et al. 2021, arXiv 2103.00020)
    "vision_config": {
        "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "num_channels": 3, "projection_dim": 768,
    },
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "vis_token_granularity": [36, 72, 144, 288, 576],
    "router_select": True,
}  # fmt: skip
"""DeepLearnXMU/AVG-LLaVA, config.json and arXiv 2410.02745, section 4.1."""

PRESETS: dict[str, dict[str, Any]] = {
    # lmsys/vicuna-7b-v1.5, config.json: Llama 2 7B (Touvron et al. 2023, arXiv 2307.09288).
    "vicuna-7b": {
        "model_type": "llava_llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096, **_AVG_LLAVA,
    },
    # lmsys/vicuna-13b-v1.5, config.json: Llama 2 13B.
    "vicuna-13b": {
        "model_type": "llava_llama", "vocab_size": 32000, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
        "num_attention_heads": 40, "num_key_value_heads": 40, "max_position_embeddings": 4096, **_AVG_LLAVA,
    },
    # mistralai/Mistral-7B-v0.1, config.json (Jiang et al. 2023, arXiv 2310.06825, table 1).
    "mistral-7b": {
        "model_type": "llava_mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 32768, **_AVG_LLAVA,
    },
}  # fmt: skip
"""Name -> configuration, from the sources named at each."""
