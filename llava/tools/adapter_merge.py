"""An adapter (LoRA or QLoRA) and the model underneath become one checkpoint."""

from __future__ import annotations

from pathlib import Path

from llava.durable import whole_folder
from llava.model.adapter import is_adapter
from llava.model.builder import load_pretrained_model


def merge_lora(model_path: str, model_base: str | None, save_model_path: Path) -> None:
    """Write the merged model, its tokenizer and its config, all or nothing.

    Args:
        model_path: adapter folder. model_base: the model underneath; `None`: the one that the adapter names.
        save_model_path: folder to write; must not exist.

    Raises:
        ValueError: no adapter, a folder that exists already, or parts that do not fit together.
    """
    if not is_adapter(model_path):
        raise ValueError(f"--model-path {model_path} holds no adapter_config.json; give an adapter folder.")
    if save_model_path.exists():
        raise ValueError(f"--save-model-path {save_model_path} exists already; give a new folder.")
    tokenizer, model, _, _ = load_pretrained_model(model_path, model_base, None, device="cpu")
    with whole_folder(save_model_path) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
