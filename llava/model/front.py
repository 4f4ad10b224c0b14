"""A model without its language layers: what encodes and routes images while the language model runs in another process.

Tower, projector, newline vector, router and the word embeddings that it reads remain, with the names and methods that they have in
the whole model. Layers and head are neither built nor read from the checkpoint.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

from torch import nn

from llava.checkpoint_files import STORED_BUFFERS


class FrontOnly:
    """Mixed into a causal language model of LLaVA's face, in front of its class.

    Args:
        config: of the whole model, against which the checkpoint is judged; the copy that is built has no layers.
    """

    _keys_to_ignore_on_load_unexpected = [*STORED_BUFFERS, r"^model\.(language_model\.)?(layers|norm)\.", r"^lm_head\."]

    def __init__(self, config: Any) -> None:
        config = copy.deepcopy(config)
        language = config.get_text_config()
        config.tie_word_embeddings = language.tie_word_embeddings = False
        language.num_hidden_layers = 0
        super().__init__(config)  # type: ignore[call-arg]
        text: Any = getattr(self.model, "language_model", self.model)  # type: ignore[attr-defined]
        text.norm = self.lm_head = nn.Identity()

    def get_output_embeddings(self) -> None:
        """There is no head."""


@cache
def front_of(model_class: Any) -> Any:
    """The class that loads the front of another class's checkpoints."""
    return type(f"{model_class.__name__}Front", (FrontOnly, model_class), {"__doc__": f"`{model_class.__name__}` without layers and head."})
