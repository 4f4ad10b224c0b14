"""The visual granularity router (paper, section 3.2): one transformer layer, an MLP and a voter.

It reads every granularity of an image and the instruction's most relevant tokens, and gives one logit per granularity.
Every product with a weight is an `nn.Linear` of its own on at most three axes, so that quantisation, LoRA and offloading, which replace or
wrap such modules, reach all of them.

Legend: C views, P patches, T tokens of all levels, K text slots, G granularities, D language width, R router width; N, S the batch and the
sequence that the encoder layer sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from llava.model.config import GranularityFields
from llava.model.granularity import Granularity, pool_all

NUM_HEADS = 8
STORED_NAMES = {f"router.merger.self_attn.in_proj_{kind}": f"router.merger.self_attn.in_proj.{kind}" for kind in ("weight", "bias")}
"""How checkpoints name what torch's own attention held as bare parameters -> its name here; all other names are the same."""


def name_in_memory(stored: str) -> str:
    """The name that a checkpoint's tensor has in a built model."""
    for there, here in STORED_NAMES.items():
        stored = stored.replace(there, here)
    return stored


def name_in_checkpoint(name: str) -> str:
    """The name under which a built model's tensor is stored."""
    for there, here in STORED_NAMES.items():
        name = name.replace(here, there)
    return name


def register_stored_names(model_type: str) -> None:
    """Let transformers' `from_pretrained` and `save_pretrained` translate a model's names, for all models of this type."""
    register_checkpoint_conversion_mapping(model_type, [WeightRenaming(*names) for names in STORED_NAMES.items()], overwrite=True)


def select_text(text: Tensor, eligible: Tensor, first_view: Tensor, slots: int, fill_hidden: bool = False) -> Tensor:
    """The `slots` instruction tokens most similar to the image, most similar first.

    Similarity is the mean cosine with the un-pooled patches of the first view. The text vectors are raw token embeddings; image
    placeholders and padding are not text and must not be passed.

    Args:
        text: (L, D) token embeddings.
        eligible: (L,) bool, false where a token is hidden from the router (the answer).
        first_view: (P, D) projected features of the first view.
        slots: K.
        fill_hidden: when fewer than K tokens are eligible, fill up with hidden ones, lowest position first (as published).

    Returns:
        (K, D); missing places are zeros.
    """
    similarity = F.normalize(text, dim=-1).mv(F.normalize(first_view, dim=-1).mean(0).to(text.dtype))
    ranked = similarity.masked_fill(~eligible, -torch.inf).sort(descending=True, stable=True).indices[:slots]
    chosen = text[ranked]
    if not fill_hidden:
        chosen = chosen * eligible[ranked, None]
    return F.pad(chosen, (0, 0, 0, slots - chosen.shape[0]))


class SelfAttention(nn.Module):
    """Multi-head attention of a sequence to itself, with the arithmetic and the initial weights of `nn.MultiheadAttention`."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *arguments: Any) -> None:
        """Take the names of torch's own attention too: DeepSpeed's checkpoints hold those that a model once had in memory."""
        for kind in ("weight", "bias"):
            if (stored := state_dict.pop(f"{prefix}in_proj_{kind}", None)) is not None:
                state_dict[f"{prefix}in_proj.{kind}"] = stored
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def forward(self, tokens: Tensor, absent: Tensor | None = None) -> Tensor:
        """(S, N, R) -> (S, N, R); `absent` (N, S) is true where there is nothing to attend to."""
        length, batch, width = tokens.shape
        packed = self.in_proj(tokens).unflatten(-1, (3, width)).movedim(-2, 0).contiguous()  # (3, S, N, R)
        query, key, value = packed.view(3, length, batch, NUM_HEADS, -1).permute(0, 2, 3, 1, 4)  # (N, heads, S, R / heads) each
        mask = None if absent is None else query.new_zeros(absent.shape).masked_fill(absent, -torch.inf)[:, None, None]
        attended = F.scaled_dot_product_attention(query, key, value, mask, self.dropout.p if self.training else 0.0)
        return self.out_proj(attended.permute(2, 0, 1, 3).reshape(length * batch, width)).view(length, batch, width)


class EncoderLayer(nn.Module):
    """A transformer layer that normalises after each half, as `nn.TransformerEncoderLayer` computes it and names its weights."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = SelfAttention(width, dropout)
        self.linear1, self.linear2 = nn.Linear(width, width), nn.Linear(width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, absent: Tensor | None = None) -> Tensor:
        """(S, N, R) -> (S, N, R); `absent` as in `SelfAttention`."""
        tokens = self.norm1(tokens + self.dropout(self.self_attn(tokens, absent)))
        return self.norm2(tokens + self.dropout(self.linear2(self.dropout(self.linear1(tokens).relu()))))


class GranularityRouter(nn.Module):
    """Scores the granularities of an image.

    Args:
        width: D, the language model's width.
        patch_grid: (height, width) of one view's patches.
        levels: the granularities, coarse to fine.
        text_slots: K.
        attention_axis: `views`: each position attends to the same position of the image's other views, as published;
            `tokens`: the positions of one view attend to each other, as the paper describes.
        router_width: R; `None` works at D and has the published parameters, otherwise one shared reduction comes first.
        dropout: of the encoder layer.
    """

    def __init__(
        self,
        width: int,
        patch_grid: tuple[int, int],
        levels: Sequence[Granularity],
        text_slots: int,
        attention_axis: str,
        router_width: int | None = None,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.patch_grid, self.levels, self.attention_axis = patch_grid, tuple(levels), attention_axis
        inner = router_width or width
        positions = sum(level.tokens for level in levels) + text_slots
        self.reduce = nn.Identity() if router_width is None else nn.Linear(width, inner)
        self.merger = EncoderLayer(inner, dropout)
        self.router = nn.Sequential(nn.Linear(inner, inner), nn.GELU(), nn.Linear(inner, len(levels)))
        self.voter = nn.Parameter(torch.empty(positions, 1))
        self.norm = nn.LayerNorm(len(levels))
        self.reset_parameters()

    @classmethod
    def from_config(cls, config: GranularityFields, width: int) -> GranularityRouter:
        """The router that a configuration describes, for a language model of `width`."""
        return cls(
            width,
            config.patch_grid,
            config.levels,
            config.filtered_text_num,
            config.router_attention_axis,
            config.router_hidden_size,
            config.router_dropout,
        )

    def reset_parameters(self) -> None:
        """Draw fresh weights. Every vote starts equal, so that no position is silenced by its draw."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init.xavier_uniform_(module.weight)
                init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                init.ones_(module.weight)
                init.zeros_(module.bias)
        init.constant_(self.voter, 1.0 / self.voter.shape[0])

    def set_dropout(self, dropout: float) -> None:
        """Change the dropout of the encoder layer, attention included."""
        for module in self.merger.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout

    def forward(self, features: Tensor, text: Tensor, num_views: Sequence[int] | None = None) -> Tensor:
        """Score the granularities of B images.

        Args:
            features: (B, C, P, D) projected, un-pooled features; images with fewer than C views are filled up at the end.
            text: (B, K, D) selected text vectors.
            num_views: views of each image that count, (B,); `None`: all C.

        Returns:
            (B, G) logits, layer-normalised over the granularities.
        """
        images, views = features.shape[:2]
        features, text = features.to(self.norm.weight.dtype), text.to(self.norm.weight.dtype)
        # Reducing before pooling is the same linear map on fewer numbers' worth of copies.
        reduced = self.reduce(features.flatten(0, 1))  # (B*C, P, R)
        visual = torch.cat(pool_all(reduced, self.patch_grid, self.levels), dim=1).unflatten(0, (images, views))  # (B, C, T, R)
        words = self.reduce(text)[:, None].expand(-1, views, -1, -1)  # (B, C, K, R)
        counts = None
        if num_views is not None and min(num_views) < views:
            counts = torch.tensor(num_views, device=features.device)
        attended = self._attend(torch.cat([visual, words], dim=2), counts)
        votes = self.router(attended.flatten(0, 1)).unflatten(0, (images, views))  # (B, C, T+K, G)
        ballots = (votes * self.voter).sum(dim=2)  # (B, C, G)
        if counts is None:
            return self.norm(ballots.mean(dim=1))
        present = torch.arange(views, device=counts.device) < counts[:, None]
        return self.norm((ballots * present[..., None]).sum(dim=1) / counts[:, None])

    def _attend(self, tokens: Tensor, counts: Tensor | None = None) -> Tensor:
        """The encoder layer over (B, C, N, R), along the chosen axis; `merger` takes (sequence, batch, R).

        `counts` (B,) says how many views of each image are there; only attention across the views can see the others.
        """
        images, views, positions, width = tokens.shape
        if self.attention_axis == "views":
            absent = None
            if counts is not None:
                absent = (torch.arange(views, device=counts.device) >= counts[:, None]).repeat_interleave(positions, dim=0)
            sequence = tokens.transpose(0, 1).reshape(views, images * positions, width)
            attended = self.merger(sequence, absent)
            return attended.reshape(views, images, positions, width).transpose(0, 1)
        sequence = tokens.reshape(images * views, positions, width).transpose(0, 1)
        return self.merger(sequence).transpose(0, 1).reshape(images, views, positions, width)
