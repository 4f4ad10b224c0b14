"""Embeddings for tokens that a tokenizer gets after its model was trained."""

from __future__ import annotations

from typing import Any

import torch


def embed_new_tokens(model: Any, vocabulary: int, new: int) -> None:
    """Give the last `new` ids of a vocabulary the mean of the embeddings before them, as LLaVA does.

    Args:
        model: a language model. Rows are added where it has too few; spare ones stay.
        vocabulary: ids of the tokenizer, the new ones included.
    """
    if vocabulary > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    first = vocabulary - new
    with torch.no_grad():
        for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
            embeddings.weight[first:vocabulary] = embeddings.weight[:first].mean(dim=0)
