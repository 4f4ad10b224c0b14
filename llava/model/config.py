"""What a checkpoint says about itself: every multimodal field, declared once.

`MultimodalFields` is mixed into the configuration of a language model family (`LlavaConfig` for Llama). The defaults below are
those of *new* models. A checkpoint written before a field existed gets the value it was trained with, from `RELEASED_VALUES`,
in `from_dict` and nowhere else, so that no reader ever asks whether a model is old.

Each field is declared with the values it may have. A file is judged by these rules before transformers, or anything of ours, reads it:
wrong values would otherwise end in whatever error the first code to use them raises, after minutes of building or amid an answer.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar

import torch
from transformers import CLIPVisionConfig, GenerationConfig, LlamaConfig, MistralConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llava.checkpoint_files import LIBRARY_ERRORS, QUANTISED, one_line
from llava.crops import get_anyres_image_grid_shape, parse_pinpoints
from llava.model.granularity import Granularity, granularity_levels
from llava.rules import (
    Anything,
    Choice,
    Either,
    Flag,
    Integer,
    ListOf,
    Mapped,
    Number,
    Rule,
    Text,
    faults,
    optional,
    refuse,
    shown,
)

RELEASED_VALUES: dict[str, Any] = {
    "unpad_rule": "pooled_grid",
    "router_attention_axis": "views",
    "router_text_fill": "answer",
    "filtered_text_num": 32,
    "conv_version": "v1",
    "mm_projector_type": "linear",
    "mm_patch_merge_type": "flat",
    "image_aspect_ratio": "square",
    "mm_vision_select_layer": -2,
    "router_select": False,
}
"""What the published code did where a checkpoint does not say."""

MOST_TILES = 256
"""Tiles of one canvas; the largest of published models has 36."""

WIDTH, HEADS, LAYERS = Integer(1, 2**20), Integer(1, 4096), Integer(1, 2048)
SIDE = Integer(1, 8192)
PROBABILITY, POSITIVE = Number(0, 1), Number(0, 1e9, above=True)
TOKEN_ID = Integer(-1, 2**31 - 1)
TOKEN_IDS = optional(Either(TOKEN_ID, ListOf(TOKEN_ID, 0, 256)))
DTYPE = Choice(("float64", "float32", "float16", "bfloat16"))
ATTENTION = Choice(("eager", "sdpa", "flash_attention_2", "flex_attention"))
ACTIVATION = Choice(tuple(ACT2FN))
PROJECTOR = Text(r"linear|identity|mlp[1-9]x_gelu", "linear, mlpNx_gelu (N from 1 to 9) or identity")
CANVASES = ListOf(ListOf(Integer(1, 2**16), 2, 2), 0, 1024)

COMMON_RULES: dict[str, Rule] = {
    "model_type": Text(),
    "dtype": optional(DTYPE),
    "torch_dtype": optional(DTYPE),
    "attn_implementation": optional(ATTENTION),
    "_attn_implementation": optional(ATTENTION),
    "architectures": optional(ListOf(Text(), 0, 16)),
    "transformers_version": optional(Text()),
    "output_attentions": optional(Flag()),
    "output_hidden_states": optional(Flag()),
    "return_dict": optional(Flag()),
    "is_encoder_decoder": Flag(),
    "chunk_size_feed_forward": Integer(0, 0),
    "num_labels": optional(Integer(0, 65536)),
    "id2label": optional(Mapped(Text())),
    "label2id": optional(Mapped(Integer())),
    "problem_type": optional(Text()),
    "name_or_path": optional(Text(shortest=0)),
}
"""Fields of every configuration of transformers', as its `to_dict` writes them."""

LANGUAGE_RULES: dict[str, Rule] = {
    "vocab_size": Integer(1, 2**24),
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": optional(HEADS),
    "head_dim": optional(Integer(2, 8192)),
    "hidden_act": ACTIVATION,
    "max_position_embeddings": Integer(1, 2**27),
    "initializer_range": PROBABILITY,
    "rms_norm_eps": PROBABILITY,
    "attention_dropout": optional(PROBABILITY),
    "attention_bias": Flag(),
    "mlp_bias": Flag(),
    "tie_word_embeddings": Flag(),
    "use_cache": Flag(),
    "sliding_window": optional(Integer(1, 2**27)),
    "pretraining_tp": optional(Integer(1, 1024)),
    "pad_token_id": optional(TOKEN_ID),
    "bos_token_id": optional(TOKEN_ID),
    "eos_token_id": TOKEN_IDS,
    "rope_theta": optional(POSITIVE),
    "rope_parameters": optional(Anything()),
    "rope_scaling": optional(Anything()),
    "quantization_config": optional(Anything()),
    **COMMON_RULES,
}
"""Fields of a Llama or Mistral configuration."""

ROPE_RULES: dict[str, Rule] = {
    "rope_type": Choice(("default", *ROPE_INIT_FUNCTIONS)),
    "type": Choice(("default", *ROPE_INIT_FUNCTIONS)),
    "rope_theta": POSITIVE,
    "factor": POSITIVE,
    "low_freq_factor": POSITIVE,
    "high_freq_factor": POSITIVE,
    "attention_factor": optional(POSITIVE),
    "beta_fast": optional(POSITIVE),
    "beta_slow": optional(POSITIVE),
    "partial_rotary_factor": Number(0, 1, above=True),
    "original_max_position_embeddings": Integer(1, 2**27),
    "short_factor": ListOf(POSITIVE),
    "long_factor": ListOf(POSITIVE),
}
"""Fields of `rope_parameters`, in older files `rope_scaling`."""

VISION_RULES: dict[str, Rule] = {
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_channels": Integer(3, 3),
    "image_size": SIDE,
    "patch_size": SIDE,
    "projection_dim": WIDTH,
    "hidden_act": ACTIVATION,
    "layer_norm_eps": PROBABILITY,
    "attention_dropout": PROBABILITY,
    "initializer_range": PROBABILITY,
    "initializer_factor": Number(0, 1e3),
    **COMMON_RULES,
}
"""Fields of `vision_config`, which is a `CLIPVisionConfig`; the size of image and patch must be there."""

SIZE = Either(SIDE, Mapped(SIDE, 4))
THREE = Number(-1e3, 1e3)
IMAGE_PROCESSOR_RULES: dict[str, Rule] = {
    "size": SIZE,
    "crop_size": SIZE,
    "image_mean": ListOf(THREE, 3, 3),
    "image_std": ListOf(Number(1e-6, 1e3), 3, 3),
    "rescale_factor": Number(0, 1e3, above=True),
    "resample": Integer(0, 5),
    **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"), optional(Flag())),
}
"""Arguments of the `CLIPImageProcessor`, in `image_processor` and in a tower's preprocessor_config.json."""

GENERATION_RULES: dict[str, Rule] = {
    "pad_token_id": TOKEN_IDS,
    "bos_token_id": TOKEN_IDS,
    "eos_token_id": TOKEN_IDS,
    "forced_eos_token_id": TOKEN_IDS,
    "forced_bos_token_id": optional(TOKEN_ID),
    "decoder_start_token_id": TOKEN_IDS,
    "suppress_tokens": optional(ListOf(TOKEN_ID, 0, 65536)),
    "begin_suppress_tokens": optional(ListOf(TOKEN_ID, 0, 65536)),
    "bad_words_ids": optional(ListOf(ListOf(TOKEN_ID, 1, 256))),
    "stop_strings": optional(Either(Text(), ListOf(Text(), 0, 64))),
    **dict.fromkeys(("max_length", "max_new_tokens"), optional(Integer(1, 2**27))),
    **dict.fromkeys(("min_length", "min_new_tokens", "top_k", "no_repeat_ngram_size", "max_cache_len"), optional(Integer(0, 2**27))),
    **dict.fromkeys(("num_beams", "num_return_sequences", "num_beam_groups"), optional(Integer(1, 64))),
    **dict.fromkeys(("top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"), optional(PROBABILITY)),
    **dict.fromkeys(("temperature", "max_time", "penalty_alpha"), optional(Number(0, 1e9))),
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty"), optional(Number(0, 1e3, above=True))),
    **dict.fromkeys(("length_penalty", "diversity_penalty", "guidance_scale"), optional(Number(-1e3, 1e3))),
    **dict.fromkeys(
        ("do_sample", "use_cache", "renormalize_logits", "remove_invalid_values", "token_healing", "low_memory", "disable_compile"),
        optional(Flag()),
    ),
    **dict.fromkeys(
        ("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate", "_from_model_config"),
        optional(Flag()),
    ),
    "cache_implementation": optional(Text()),
    "transformers_version": optional(Text()),
}
"""Fields of generation_config.json."""


TOKEN_FIELDS = tuple(name for name in {**LANGUAGE_RULES, **GENERATION_RULES} if name.endswith("_token_id"))


def ruled(rule: Rule) -> dict[str, Rule]:
    """What a configuration field may be, as its metadata."""
    return {"rule": rule}


@dataclass(kw_only=True)
class GranularityFields:
    """What every configuration of ours says of the way from features to visual tokens, whichever face (see `llava.model`) its model has.

    Image to tokens
        mm_projector_type: `linear`, `mlpNx_gelu` or `identity`.
        mm_patch_merge_type: `flat`, `spatial` (tiles joined into one grid), `spatial_unpad` (padding removed, newline vectors added).
        unpad_rule: `picture` removes what the image does not cover; `pooled_grid` compares the image's aspect ratio with the
            pooled grid's, as published, which drops real rows where pooling is uneven.
    Granularity
        vis_token_granularity: tokens per view of each level, coarse to fine; `None`: one level, un-pooled.
        vis_token_grids: (height, width) of each level; `None`: the chain of halvings, width first.
    Router
        router_select: whether the model has a router and uses it when the caller names no granularity.
        router_attention_axis: `views` as published, or `tokens` as the paper describes (section 3.2).
        router_hidden_size: a narrower width for the router; `None`: the language model's.
        router_dropout: dropout of the router's encoder layer.
        router_text_fill: what fills the text slots of a short instruction: `zeros`, or, as published, in training the `answer`.
        filtered_text_num: how many instruction tokens the router sees.
    Text
        description: what the model is and knows, in a sentence or two for its users.
        conv_version: the conversation template the model was trained with.
        answer_start, answer_end: the ids around an answer (see `llava.model.answers`), by which the router tells it from the instruction,
            earlier answers of a conversation included, as in training; `None`: labels alone do.
    """

    mm_projector_type: str = field(default="mlp2x_gelu", metadata=ruled(PROJECTOR))
    mm_patch_merge_type: str = field(default="spatial_unpad", metadata=ruled(Choice(("flat", "spatial", "spatial_unpad"))))
    unpad_rule: str = field(default="picture", metadata=ruled(Choice(("picture", "pooled_grid"))))
    vis_token_granularity: list[int] | None = field(default=None, metadata=ruled(optional(ListOf(Integer(1, 2**26), 0, 64))))
    vis_token_grids: list[list[int]] | None = field(default=None, metadata=ruled(optional(ListOf(ListOf(SIDE, 2, 2), 0, 64))))
    router_select: bool = field(default=False, metadata=ruled(Flag()))
    router_attention_axis: str = field(default="views", metadata=ruled(Choice(("views", "tokens"))))
    router_hidden_size: int | None = field(default=None, metadata=ruled(optional(WIDTH)))
    router_dropout: float = field(default=0.1, metadata=ruled(PROBABILITY))
    router_text_fill: str = field(default="zeros", metadata=ruled(Choice(("zeros", "answer"))))
    filtered_text_num: int = field(default=32, metadata=ruled(Integer(0, 65536)))
    description: str | None = field(default=None, metadata=ruled(optional(Text(longest=1000))))
    conv_version: str = field(default="v1", metadata=ruled(Text()))
    answer_start: list[int] | None = field(default=None, metadata=ruled(optional(ListOf(TOKEN_ID, 0, 64))))
    answer_end: list[int] | None = field(default=None, metadata=ruled(optional(ListOf(TOKEN_ID, 0, 64))))

    @property
    @abstractmethod
    def patch_grid(self) -> tuple[int, int]:
        """Patches of one view as (height, width)."""

    @property
    @abstractmethod
    def view_side(self) -> int:
        """Pixels of a view's side."""

    @property
    @abstractmethod
    def canvases(self) -> Sequence[Sequence[int]]:
        """(width, height) in pixels of each canvas that an image may be cut from."""

    @property
    @abstractmethod
    def context_length(self) -> int:
        """How many positions, text and visual tokens together, the language model can take."""

    @property
    def levels(self) -> tuple[Granularity, ...]:
        """The granularities of this model, coarse to fine; a model without any has its full patch grid as the only level."""
        return granularity_levels(self.patch_grid, self.vis_token_granularity, self.vis_token_grids)

    def tiles_of(self, image_size: Sequence[int]) -> tuple[int, int]:
        """How many tiles across and down an image of (width, height) pixels is cut into, where there are canvases."""
        return get_anyres_image_grid_shape(image_size, self.canvases, self.view_side)

    def num_views_of(self, image_size: Sequence[int]) -> int:
        """Views of an image of (width, height) pixels: the whole one, and its tiles where there are canvases."""
        across, down = self.tiles_of(image_size) if self.canvases else (0, 0)
        return 1 + across * down

    def router_contradictions(self) -> Iterator[str]:
        """What is wrong with the fields of the router beside one another."""
        if self.router_select is True and not self.vis_token_granularity:
            yield "router_select is on but vis_token_granularity is empty: give the levels to choose from"
        if isinstance(self.router_hidden_size, int) and self.router_hidden_size % 8:
            yield f"router_hidden_size is {self.router_hidden_size}, expected a multiple of its 8 attention heads"


KEPT_KEY = "llava_fields"
"""Where a config.json of another layout keeps LLaVA's fields that it has no place for."""


@dataclass(kw_only=True)
class LlavaFields:
    """What LLaVA's face reads of a configuration of either layout, beside `GranularityFields`.

    Vision
        mm_vision_tower: where the vision tower came from (hub id or path); only read when `vision_config` is missing.
        image_processor: the arguments of the `CLIPImageProcessor`, so that a checkpoint loads without a hub.
        image_aspect_ratio: `square` (resize and centre-crop), `pad` (to a square), `anyres` (whole view plus tiles).
    Text
        tokenizer_padding_side, tokenizer_model_max_length: what training used. Generation pads left whatever this says.
        mm_use_im_start_end, mm_use_im_patch_token: LLaVA's extra tokens around an image.
    """

    mm_vision_tower: str | None = field(default=None, metadata=ruled(optional(Text())))
    image_processor: dict[str, Any] | None = field(default=None, metadata=ruled(optional(Anything())))
    image_aspect_ratio: str = field(default="anyres", metadata=ruled(Choice(("square", "none", "pad", "anyres"))))
    tokenizer_padding_side: str = field(default="right", metadata=ruled(Choice(("left", "right"))))
    tokenizer_model_max_length: int | None = field(default=None, metadata=ruled(optional(Integer(1, 10**31))))
    mm_use_im_start_end: bool = field(default=False, metadata=ruled(Flag()))
    mm_use_im_patch_token: bool = field(default=False, metadata=ruled(Flag()))


@dataclass(kw_only=True)
class MultimodalFields(LlavaFields, GranularityFields):
    """The multimodal part of a configuration in LLaVA's layout, beside `GranularityFields` and `LlavaFields`.

    vision_config: the CLIP vision configuration, so that a checkpoint loads without a hub.
    mm_hidden_size: width of the tower's features.
    mm_vision_select_layer: which hidden state is the feature (-1: after the last layer, -2: the one before).
    mm_vision_select_feature: `patch` drops the class token, `cls_patch` keeps it.
    image_grid_pinpoints: the canvases of `anyres`, (width, height) in pixels.
    """

    vision_config: dict[str, Any] | None = field(default=None, metadata=ruled(optional(Anything())))
    mm_hidden_size: int | None = field(default=None, metadata=ruled(optional(WIDTH)))
    mm_vision_select_layer: int = field(default=-2, metadata=ruled(Integer(-2049, 2048)))
    mm_vision_select_feature: str = field(default="patch", metadata=ruled(Choice(("patch", "cls_patch"))))
    image_grid_pinpoints: list[list[int]] | str | None = field(default=None, metadata=ruled(optional(CANVASES)))

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.image_grid_pinpoints, str):
            self.image_grid_pinpoints = [list(canvas) for canvas in parse_pinpoints(self.image_grid_pinpoints)]
        super().__post_init__(**kwargs)  # type: ignore[misc]
        self.check_multimodal_fields()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read a stored configuration; one of our kind gets for a multimodal field that it lacks or is null the value it was trained with.

        Raises:
            ValueError: values that cannot work, all of them at once.
        """
        if config_dict.get("model_type") == cls.model_type:  # type: ignore[attr-defined]
            config_dict = {**RELEASED_VALUES, **_without_nulls(config_dict)}
        check_language_fields(config_dict, cls)
        try:
            config = super().from_dict(config_dict, **kwargs)  # type: ignore[misc]
        except LIBRARY_ERRORS as error:
            raise ValueError(f"The configuration cannot work: {one_line(error)}.") from error
        check_positions(config[0] if isinstance(config, tuple) else config)
        return config

    def check_multimodal_fields(self) -> None:
        """Raise one `ValueError` that names every field whose value cannot work."""
        rules = _multimodal_rules()
        wrong = {name for name, rule in rules.items() if not rule.accepts(getattr(self, name))}
        found = faults({name: getattr(self, name) for name in rules}, rules)
        if not wrong & {"vision_config", "image_processor"} and self.vision_config is not None:
            found += _vision_faults(self.vision_config, self.image_processor)
        found += self._contradictions(wrong, vision_is_sound=not found)
        refuse("The configuration", found)

    def _contradictions(self, wrong: set[str], vision_is_sound: bool) -> Iterator[str]:
        """What is wrong with fields beside one another; `wrong` are those that are wrong alone."""
        if self.image_aspect_ratio == "anyres" and self.vision_config is not None and not self.image_grid_pinpoints:
            yield "image_aspect_ratio is 'anyres' but image_grid_pinpoints is empty: give the canvases"
        yield from self.router_contradictions()
        if self.vision_config is None or not vision_is_sound:
            return
        layers = vision_fields(self.vision_config)["num_hidden_layers"]
        if not -layers - 1 <= self.mm_vision_select_layer <= layers:
            yield (
                f"mm_vision_select_layer is {self.mm_vision_select_layer}, but the tower has {layers} layers; use -{layers + 1} to {layers}"
            )
        try:
            _ = self.levels
        except ValueError as error:
            yield str(error).rstrip(".")
        side = self.vision_config["image_size"]
        canvases: Any = self.image_grid_pinpoints if self.image_aspect_ratio == "anyres" else None
        for width, height in canvases or ():
            if width % side or height % side or width // side * (height // side) > MOST_TILES:
                yield f"image_grid_pinpoints has {[width, height]}, expected multiples of {side} with at most {MOST_TILES} tiles"

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Patches of one view as (height, width)."""
        if self.vision_config is None:
            raise ValueError("This configuration has no vision_config, so it has no patch grid; load or add a vision tower first.")
        side = self.vision_config["image_size"] // self.vision_config["patch_size"]
        return side, side

    @property
    def view_side(self) -> int:
        """Pixels of a view's side."""
        assert self.vision_config is not None, "a configuration without a vision tower has no views"
        return int(self.vision_config["image_size"])

    @property
    def canvases(self) -> Sequence[Sequence[int]]:
        """(width, height) in pixels of each canvas that an image may be cut from."""
        return self.image_grid_pinpoints or []  # type: ignore[return-value]

    @property
    def context_length(self) -> int:
        """How many positions, text and visual tokens together, the language model can take."""
        return self.max_position_embeddings  # type: ignore[attr-defined]


def _without_nulls(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A stored configuration without the multimodal fields of which it says nothing."""
    multimodal = _multimodal_rules()
    return {name: value for name, value in stored.items() if value is not None or name not in multimodal}


def vision_fields(vision_config: Any) -> dict[str, Any]:
    """The fields of a tower's configuration; one in LLaVA's layout gets CLIP's defaults for those it does not have."""
    return {**_defaults(CLIPVisionConfig), **(vision_config if isinstance(vision_config, Mapping) else vision_config.to_dict())}


def _defaults(config_class: Any) -> dict[str, Any]:
    return {each.name: each.default for each in fields(config_class) if each.default is not MISSING}


def foreign_names(stored: Mapping[str, Any], config_class: Any, rules: Mapping[str, Rule], inside: str = "") -> list[str]:
    """Names in a file that would replace what a configuration class is made of; those that it does not know are kept, unread."""
    known = {each.name for each in fields(config_class)} | set(rules)
    prefix = f"{inside}." if inside else ""
    taken = [name for name in stored if name not in known and hasattr(config_class, name)]
    fixed = [name for name in taken if getattr(getattr(config_class, name), "fset", None) is None]  # a property may be there to be set
    return [f"{prefix}{shown(name)} is no field of a configuration" for name in fixed]


def check_language_fields(stored: Mapping[str, Any], config_class: Any) -> None:
    """Refuse a stored configuration whose language model cannot work.

    Args:
        stored: what config.json holds. config_class: a `LlamaConfig` or `MistralConfig`, whose defaults complete it.

    Raises:
        ValueError: naming every such field.
    """
    found = faults(stored, LANGUAGE_RULES) + foreign_names(stored, config_class, LANGUAGE_RULES)
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(stored.get(name), Mapping):
            found += faults(stored[name], ROPE_RULES, name)
    found = found or list(_language_contradictions({**_defaults(config_class), **stored}))
    refuse("The configuration", found)


def check_positions(config: Any) -> None:
    """Refuse a configuration whose rotary positions cannot be computed, by computing them: each kind has its own needs.

    Raises:
        ValueError: fields of `rope_parameters` that are missing, or contradict one another.
    """
    try:
        frequencies = LlamaRotaryEmbedding(config).inv_freq
    except (ValueError, *LIBRARY_ERRORS) as error:
        raise ValueError(f"The configuration cannot work: rope_parameters makes no positions ({one_line(error)}).") from error
    if not torch.isfinite(frequencies).all():
        raise ValueError("The configuration cannot work: rope_parameters makes positions that are no finite numbers.")


def _language_contradictions(values: Mapping[str, Any]) -> Iterator[str]:
    heads, width = values["num_attention_heads"], values["hidden_size"]
    groups = values.get("num_key_value_heads") or heads
    if values.get("head_dim") is None and width % (2 * heads):
        yield f"hidden_size is {width}, expected an even multiple of the {heads} attention heads"
    if (values.get("head_dim") or 0) % 2:
        yield f"head_dim is {values['head_dim']}, expected an even number"
    if heads % groups:
        yield f"num_key_value_heads is {groups}, expected a divisor of the {heads} attention heads"
    yield from token_faults(values, values["vocab_size"])
    method = quantised_by(values.get("quantization_config"))
    if values.get("quantization_config") is not None and method not in tuple(QUANTISED):
        yield f"quantization_config.quant_method is {shown(method)}, expected {', '.join(QUANTISED)}"


def quantised_by(quantization_config: Mapping[str, Any] | None) -> Any:
    """The quantisation method that a stored configuration names; older ones of bitsandbytes name none and say how many bits."""
    stored = quantization_config or {}
    by_bits = "bitsandbytes" if stored.get("load_in_8bit") is True or stored.get("load_in_4bit") is True else None
    return stored.get("quant_method", by_bits)


def token_faults(values: Mapping[str, Any], vocab_size: int) -> Iterator[str]:
    """The special tokens of a configuration that no vocabulary of this size has; -1 stands for none in older files."""
    for name, value in values.items():
        if name in TOKEN_FIELDS and any(token >= vocab_size for token in (value if isinstance(value, list) else [value or 0])):
            yield f"{name} is {shown(value)}, expected less than vocab_size, {vocab_size}"


def check_generation_fields(stored: Mapping[str, Any], vocab_size: int, source: Any) -> None:
    """Refuse a stored generation configuration that cannot work.

    Raises:
        ValueError: naming every such field.
    """
    found = faults(stored, GENERATION_RULES)
    found += [f"{shown(name)} is no field of it" for name in stored if callable(getattr(GenerationConfig, name, None))]
    refuse(source, found or list(token_faults(stored, vocab_size)))
    try:
        GenerationConfig.from_dict(dict(stored))
    except (ValueError, *LIBRARY_ERRORS) as error:
        raise ValueError(f"{source} cannot work: {one_line(error)}.") from error


def _multimodal_rules() -> dict[str, Rule]:
    return {each.name: each.metadata["rule"] for each in fields(MultimodalFields)}


def check_processor_fields(stored: Mapping[str, Any], source: Any) -> int:
    """Refuse a processor, stored without its model, that cannot work.

    Returns:
        The side of its views in pixels.

    Raises:
        ValueError: naming every such field.
    """
    refuse(source, faults(stored, _multimodal_rules()))
    processor = stored["image_processor"] or {}
    found = faults({"crop_size": None, **processor}, IMAGE_PROCESSOR_RULES, "image_processor")
    refuse(source, found)
    sides = _sides(processor["crop_size"])
    refuse(source, [] if len(sides) == 1 else [f"image_processor.crop_size is {shown(processor['crop_size'])}, expected a square"])
    return sides.pop()


def check_image_processor(stored: Any, source: Any) -> None:
    """Refuse a stored image processor that cannot work.

    Raises:
        ValueError: naming every such field.
    """
    if not isinstance(stored, Mapping):
        raise ValueError(f"{source} is {shown(stored)}, expected an object.")
    refuse(source, faults(stored, {**IMAGE_PROCESSOR_RULES, "image_aspect_ratio": _multimodal_rules()["image_aspect_ratio"]}))


def _sides(crop_size: Any) -> set[int]:
    return set(crop_size.values() if isinstance(crop_size, Mapping) else [crop_size])


def _vision_faults(vision: Mapping[str, Any], processor: Mapping[str, Any] | None) -> list[str]:
    """What is wrong with the vision tower's configuration and its image processor's."""
    missing = [f"vision_config has no {name}" for name in ("image_size", "patch_size") if name not in vision]
    found = missing + faults(vision, VISION_RULES, "vision_config") + foreign_names(vision, CLIPVisionConfig, VISION_RULES, "vision_config")
    found += faults(processor or {}, IMAGE_PROCESSOR_RULES, "image_processor")
    if found:
        return found
    values = vision_fields(vision)
    if values["hidden_size"] % values["num_attention_heads"]:
        width, heads = values["hidden_size"], values["num_attention_heads"]
        found.append(f"vision_config.hidden_size is {width}, expected a multiple of the {heads} attention heads")
    side = values["image_size"]
    if values["patch_size"] > side:
        found.append(f"vision_config.patch_size is {values['patch_size']}, expected at most image_size, {side}")
    crop = (processor or {}).get("crop_size", side)
    if _sides(crop) != {side}:
        found.append(f"image_processor.crop_size is {shown(crop)}, expected the tower's image_size, {side}")
    try:
        CLIPVisionConfig(**{name: value for name, value in vision.items() if name != "model_type"})
    except (ValueError, *LIBRARY_ERRORS) as error:
        found.append(f"vision_config is none ({one_line(error)})")
    return found


class LlavaConfig(MultimodalFields, LlamaConfig):
    """Llama-shaped language models (Vicuna, Llama, SmolLM2)."""

    model_type = "llava_llama"
    language_model_type: ClassVar[str] = LlamaConfig.model_type


class LlavaMistralConfig(MultimodalFields, MistralConfig):
    """Mistral-shaped language models."""

    model_type = "llava_mistral"
    language_model_type: ClassVar[str] = MistralConfig.model_type
