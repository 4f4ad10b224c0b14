"""`generate` of the native model: it expands the prompt before transformers looks at it, and puts the caller's own back in front.

Every way of decoding then sees the prompt of a LlavaNext. Legend: B rows, L given positions, L' expanded ones, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from llava.messages import RoutingRequest
from llava.model.native.configuration_avg_llava import AvgLlavaConfig
from llava.model.native.expanded_prompt import ExpandedPrompt, ImageFeatures
from llava.model.native.image_tokens import images_behind, images_per_row


class AvgLlavaGenerationMixin(GenerationMixin):
    """Generation for a model whose `model` expands prompts."""

    config: AvgLlavaConfig
    model: Any

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        vis_token_granularity: int | Sequence[int] | None = None,
        max_visual_tokens: int | None = None,
        granularity_bias: float | None = None,
        output_routing: bool = False,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate` on prompts with images: the given prompt, then the new ids.

        Args:
            inputs: (B, L) ids with one image token per image, or with those of a level; `input_ids=` and `inputs_embeds=` as well.
            vis_token_granularity: `None` lets the router choose where the model has one, a number fixes the tokens per view, a list limits
                the router to those. It may stand in the generation config, as may the next two; there it is a default, and gives way to
                prompts that have the image tokens of a level.
            max_visual_tokens: a budget for the images of each row together.
            granularity_bias: added to the router's logits per log2 of the tokens; negative is cheaper.
            output_routing: also return one `RoutingReport` per image.
            kwargs: what the processor gives and what transformers' `generate` takes. `max_length` counts the given prompt.

        Returns:
            (B, L + new), or what `return_dict_in_generate` asks for; with `output_routing`, a pair with the reports. `scores` and `logits`
            are one (B, V) per new id; `hidden_states`, `attentions` and `past_key_values` have the L' positions of the expanded prompt.

        Raises:
            ValueError: as `AvgLlavaModel.expand`, a cache that holds another prompt, or a new image token without its image.
        """
        settings = generation_config or self.generation_config
        is_default = vis_token_granularity is None and max_visual_tokens is None and granularity_bias is None
        request = RoutingRequest(
            _setting(vis_token_granularity, settings, "vis_token_granularity", None),
            _setting(max_visual_tokens, settings, "max_visual_tokens", None),
            _setting(granularity_bias, settings, "granularity_bias", 0.0),
        )
        # An image token is no answer, and must not be drafted by prompt lookup.
        suppressed = {self.config.image_token_id, *(_setting(kwargs.get("suppress_tokens"), settings, "suppress_tokens", ()))}
        kwargs |= {"generation_config": generation_config, "suppress_tokens": sorted(suppressed)}
        given = inputs if inputs is not None else kwargs.pop("input_ids", None)
        kwargs.pop("input_ids", None)
        prompt = self._expand_turn(given, request, is_default, kwargs)
        if prompt is None:
            output = super().generate(given, *args, **kwargs)
            return (output, []) if output_routing else output
        if prompt.inputs_embeds is not None:
            kwargs["inputs_embeds"] = prompt.inputs_embeds
        kwargs["mm_encoder_outputs"] = {"image": prompt.image} if prompt.image.pooler_output else None
        added = 0
        if given is not None and prompt.input_ids is not None:
            added = prompt.input_ids.shape[1] - given.shape[1]
            for name in ("max_length", "min_length"):  # of what comes back, in which an image is one token again
                if (length := _setting(kwargs.get(name), settings, name, None)) is not None:
                    kwargs[name] = length + added
        output = super().generate(None, *args, input_ids=prompt.input_ids, attention_mask=prompt.attention_mask, **kwargs)
        if added:
            output = _with_given_prompt(output, given, prompt, kwargs.get("past_key_values"))  # type: ignore[arg-type]
        return (output, prompt.image.routing or []) if output_routing else output

    def _expand_turn(
        self, given: Tensor | None, request: RoutingRequest, is_default: bool, kwargs: dict[str, Any]
    ) -> ExpandedPrompt | None:
        """The prompt of a call, expanded; `None` where there is nothing to expand, and `kwargs` are left as they are.

        What a cache from an earlier call holds stays as it was expanded then; only what stands behind it is expanded now.
        """
        pixel_values = kwargs.get("pixel_values")
        has_images = pixel_values is not None and len(pixel_values) > 0
        mask = kwargs.get("attention_mask")
        if mask is None and given is not None:
            mask = self._mask_of_padding(given)
        turn = Turn.of(kwargs.get("past_key_values"), given, mask, has_images)
        if not has_images:
            self._check_no_new_image(given, turn, kwargs.get("past_key_values"))
            if turn is None:
                return None
        image_sizes, embeds = kwargs.pop("image_sizes", None), kwargs.pop("inputs_embeds", None)
        for name in ("pixel_values", "position_ids", "attention_mask"):
            kwargs.pop(name, None)
        if turn is None:
            return self.model.expand(pixel_values, image_sizes, given, embeds, mask, request=request, gives_way=is_default)
        assert given is not None and mask is not None, "a turn is known by its ids"
        known = turn.given.shape[1]
        ids, mask = given[:, known:], mask[:, known:]
        behind = (ids == self.config.image_token_id).sum(-1).tolist()
        if pixel_values is None or not has_images or not sum(behind):
            return turn.followed_by(ExpandedPrompt(ids, None, mask, ImageFeatures(), None))
        before = (turn.given == self.config.image_token_id).sum(-1).tolist()
        if len(pixel_values) == sum(before) + sum(behind):
            chosen = images_behind(before, behind)
            pixel_values, image_sizes = (None if each is None else each[chosen] for each in (pixel_values, image_sizes))
        behind_it = self.model.expand(pixel_values, image_sizes, ids, embeds, mask, request=request, gives_way=is_default)
        return turn.followed_by(behind_it)

    def _check_no_new_image(self, given: Tensor | None, turn: Turn | None, cache: Any) -> None:
        """Refuse image tokens without images behind what a cache holds; `forward` does so where there is no cache.

        Raises:
            ValueError: there are some.
        """
        length = 0 if given is None or cache is None else cache.get_seq_length()
        if given is None or length == 0:
            return
        new = given[:, length if turn is None else turn.given.shape[1] :]
        if count := int((new == self.config.image_token_id).sum()):
            raise ValueError(
                f"The prompts have {count} image tokens behind what past_key_values holds, but no image; give pixel_values of the new "
                "images, or of all of the conversation."
            )

    def _mask_of_padding(self, input_ids: Tensor) -> Tensor:
        """What transformers infers where no mask is given: padding is the pad token, unless that also ends answers."""
        pad, eos = self.generation_config.pad_token_id, self.generation_config.eos_token_id
        if pad is None or pad == eos or (isinstance(eos, list) and pad in eos):
            return torch.ones_like(input_ids)
        return (input_ids != pad).long()

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Any,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        is_first_iteration: bool | None = False,
        mm_encoder_outputs: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """transformers' own. Images count when their tokens are read: in the first step, also of an assistant, or without a cache."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, past_key_values=past_key_values, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if is_first_iteration or past_key_values is None or past_key_values.get_seq_length() == 0:
            inputs["mm_encoder_outputs"] = mm_encoder_outputs
        return inputs

    def _expand_inputs_for_generation(self, expand_size: int = 1, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """transformers' own; a row that is repeated has its images repeated, all of them together."""
        encoded = kwargs.pop("mm_encoder_outputs", None)
        ids = kwargs.get("input_ids")
        if encoded and expand_size > 1:
            image: ImageFeatures = encoded["image"]
            tokens = list(image.pooler_output)  # type: ignore[arg-type]
            is_image = self.model.image_positions(ids if ids is not None and ids.numel() else None, kwargs.get("inputs_embeds"))
            repeated: list[Tensor] = []
            for count in images_per_row(is_image, [len(each) for each in tokens]):
                repeated += tokens[:count] * expand_size
                tokens = tokens[count:]
            encoded = {"image": ImageFeatures(pooler_output=repeated, routing=image.routing)}  # type: ignore[arg-type]
        ids, kwargs = super()._expand_inputs_for_generation(expand_size, *args, **kwargs)
        return ids, kwargs if encoded is None else {**kwargs, "mm_encoder_outputs": encoded}


@dataclass(frozen=True)
class Turn:
    """What a cache holds: the prompt as the caller knows it and as it was expanded. It stays on the cache, for the next turn.

    given: (B, L). expanded, attention_mask: (B, L').
    """

    given: Tensor
    expanded: Tensor
    attention_mask: Tensor

    @staticmethod
    def of(cache: Any, input_ids: Tensor | None, attention_mask: Tensor | None, has_images: bool) -> Turn | None:
        """The turn that a cache remembers; where it remembers none and images are given, the ids that it holds, as they are.

        Raises:
            ValueError: ids that do not continue it: their positions are not the cache's, and the answer would be noise.
        """
        length = 0 if cache is None or input_ids is None else cache.get_seq_length()
        if input_ids is None or length == 0:
            return None
        turn: Turn | None = getattr(cache, "avg_llava_turn", None)
        if turn is not None and not _starts_with(input_ids, turn.expanded):
            if not _starts_with(input_ids, turn.given):
                raise ValueError(
                    "input_ids do not continue what past_key_values holds; give the whole conversation, as generate returned it, or no "
                    "cache."
                )
            return turn
        if not has_images:
            return None
        if input_ids.shape[1] <= length or attention_mask is None:
            raise ValueError(
                f"past_key_values holds {length} positions, and input_ids have {input_ids.shape[1]}; give the whole conversation with the "
                "cache of an earlier generate, or no cache."
            )
        return Turn(input_ids[:, :length], input_ids[:, :length], attention_mask[:, :length])

    def followed_by(self, prompt: ExpandedPrompt) -> ExpandedPrompt:
        """A prompt behind this one."""
        assert prompt.input_ids is not None, "a turn is continued by ids"
        ids = torch.cat([self.expanded, prompt.input_ids], dim=1)
        return ExpandedPrompt(ids, None, torch.cat([self.attention_mask, prompt.attention_mask], dim=1), prompt.image, None)


def _setting(given: Any, settings: Any, name: str, default: Any) -> Any:
    """An argument of `generate`, else what a generation config says."""
    stored = getattr(settings, name, None)
    return given if given is not None else default if stored is None else stored


def _starts_with(ids: Tensor, prefix: Tensor) -> bool:
    return len(ids) == len(prefix) and ids.shape[1] >= prefix.shape[1] and torch.equal(ids[:, : prefix.shape[1]], prefix)


def _with_given_prompt(output: Any, given: Tensor, prompt: ExpandedPrompt, cache: Any) -> Any:
    """Put the caller's own prompt back in front of the new ids, and remember on the cache how it was expanded."""
    assert prompt.input_ids is not None, "what was expanded has ids"
    sequences = output if isinstance(output, Tensor) else output.sequences
    per_prompt = len(sequences) // len(given)
    new = sequences[:, prompt.input_ids.shape[1] :]
    sequences = torch.cat([given.to(sequences.device).repeat_interleave(per_prompt, dim=0), new], dim=1)
    cache = getattr(output, "past_key_values", None) or cache
    if cache is not None:
        parts = (given, prompt.input_ids, prompt.attention_mask)
        cache.avg_llava_turn = Turn(*(part.repeat_interleave(per_prompt, dim=0) for part in parts))
    if isinstance(output, Tensor):
        return sequences
    output.sequences = sequences
    return output
