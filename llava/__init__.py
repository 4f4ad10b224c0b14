"""AVG-LLaVA: a large multimodal model that chooses how many visual tokens an image and a question deserve."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llava.auto_classes import prepare_auto_classes
from llava.hints import keep_back_hints

if TYPE_CHECKING:
    from llava.model import LlavaLlamaForCausalLM

__version__ = "1.0.0"
__all__ = ["LlavaLlamaForCausalLM", "__version__"]

keep_back_hints()
prepare_auto_classes()


def __getattr__(name: str) -> Any:
    """Import the model class on first use, so that `import llava` alone does not load torch."""
    if name == "LlavaLlamaForCausalLM":
        from llava.model import LlavaLlamaForCausalLM

        return LlavaLlamaForCausalLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
