"""The model card of a native checkpoint: what it is, how to load it, what each granularity costs, and what was measured, if anything was.

Costs are computed from the configuration. Accuracies come from a report that `llava.eval.granularity_report` wrote; without one the card
has none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCardData

from llava.model.granularity import Granularity
from llava.model.memory import has_known_cache, kv_cache_bytes

TAGS = ("avg_llava", "llava", "multimodal", "adaptive-visual-granularity")
MIB = 2**20
_MEASURED = ("fixed", "adaptive", "bias", "budget")
"""Kinds of a report's rows that a user can ask for; the others are yardsticks computed from these."""

_BODY = """
# {title}

{description}

| | |
| --- | --- |
| architecture | [AVG-LLaVA](https://arxiv.org/abs/2410.02745): a LLaVA-NeXT with visual tokens at several granularities{router} |
| text model | `{text}`, {layers} layers, {width} wide, context {context:,} |
| vision tower | `{tower}`, views of {side} x {side} pixels |

## Use

```python
import llava  # makes transformers know the model; in a folder with code, trust_remote_code=True does without
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("{name}")
model = AutoModelForImageTextToText.from_pretrained("{name}")
question = [{{"role": "user", "content": [{{"type": "image", "path": "image.png"}}, {{"type": "text", "text": "What is in the image?"}}]}}]
inputs = processor.apply_chat_template(question, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
output = model.generate(**inputs.to(model.device), max_new_tokens=64)
print(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

`generate` takes `vis_token_granularity` (a level below, or a list to choose from), `max_visual_tokens` and `granularity_bias`.

## Granularities and what they cost

Of an image of {image_width} x {image_height} pixels. Computed from the configuration.

{costs}
"""


def model_card(
    model: Any,
    name: str | None,
    report: Mapping[str, Any] | None = None,
    license_id: str | None = None,
    base_models: Sequence[str] = (),
    tags: Sequence[str] = (),
) -> str:
    """The text of a card, with the header that the hub reads.

    Args:
        model: an `AvgLlavaForConditionalGeneration`, whose weights are not looked at.
        name: what it is loaded by, where that is known: a folder may be moved. report: report.json of a granularity report on it.
        license_id, base_models: as the hub names them. tags: besides `TAGS`.

    Raises:
        ValueError: no report of that kind.
    """
    config = model.config
    header = ModelCardData(
        license=license_id,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        base_model=list(base_models) or None,
        tags=list(dict.fromkeys([*TAGS, *tags])),
    )
    width, height = largest_image(config)
    body = _BODY.format(
        title=name or "AVG-LLaVA",
        name=name or "path/to/this/folder",
        description=config.description or "No description was stored with this model.",
        router=", of which a router chooses one by image and instruction" if config.router_select else "",
        text=config.text.model_type,
        layers=config.text.num_hidden_layers,
        width=config.text.hidden_size,
        context=config.context_length,
        tower=config.vision.model_type,
        side=config.view_side,
        image_width=width,
        image_height=height,
        costs=_costs(model, (width, height)),
    )
    measured = "" if report is None else f"\n## Measured\n\n{_measured(report)}\n"
    return f"---\n{header.to_yaml()}\n---\n{body}{measured}"


def largest_image(config: Any) -> tuple[int, int]:
    """(width, height) of the largest canvas, or of a view where there is none."""
    return max(config.canvases, key=lambda canvas: canvas[0] * canvas[1], default=(config.view_side, config.view_side))


def level_costs(model: Any, size: tuple[int, int]) -> list[tuple[Granularity, int]]:
    """The levels, coarse to fine, each with the visual tokens of an image of (width, height) pixels."""
    layouts = model.model.layouts(model.config.num_views_of(size), size)
    return [(level, layout.num_tokens) for level, layout in zip(model.model.levels, layouts, strict=True)]


def _costs(model: Any, size: tuple[int, int]) -> str:
    text = model.config.text
    columns = ["KV cache, MiB in bf16"] if has_known_cache(text) else []
    rows = [["tokens per view", "grid", "visual tokens", *columns]]
    for level, tokens in level_costs(model, size):
        cache = [f"{kv_cache_bytes(text, tokens) / MIB:.2f}"] if columns else []
        rows.append([str(level.tokens), f"{level.grid[0]} x {level.grid[1]}", f"{tokens:,}", *cache])
    return markdown_table(rows)


def _measured(report: Mapping[str, Any]) -> str:
    try:
        facts = [report["task"], f"{report['answered']} questions", report["device"], report["dtype"]]
        shown = measured_table(report)
    except (KeyError, TypeError) as error:
        raise ValueError(f"The report lacks {error}; expected report.json of llava.eval.granularity_report.") from error
    return f"By `llava.eval.granularity_report`: {', '.join(map(str, facts))}.\n\n{shown}"


def measured_table(report: Mapping[str, Any]) -> str:
    """The rows of a granularity report that a user can ask for."""
    rows = [["setting", "accuracy, %", "95 % interval", "visual tokens"]]
    for row in report["rows"]:
        if row["kind"] in _MEASURED:
            interval = " to ".join(f"{end:.1f}" for end in row["interval"] or ())
            rows.append([row["name"], f"{row['accuracy']:.1f}", interval, f"{row['tokens']:.1f}"])
    return markdown_table(rows)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows under the first as a header."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"| {' | '.join('---' for _ in rows[0])} |", *lines[1:]])
