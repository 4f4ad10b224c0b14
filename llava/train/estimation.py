"""What a run will need: parameters, operations and GPU memory, for a configuration and a machine, before anything is loaded.

    python -m llava.train.estimate --preset vicuna-7b --stage multi_granularity --num_gpus 8 --gpu_memory_gb 80 \
        --per_device_train_batch_size 4 --gradient_checkpointing True

Everything is read off the real model classes, built without storage (meta device); `costs.py` counts and computes. Take the figures as a
guide with some ten per cent of doubt, more where the allocator fragments.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llava.durable import write_whole
from llava.log import setup_logging
from llava.model.adapter import attach_adapter
from llava.model.builder import MODEL_CLASSES
from llava.model.memory import kv_cache_bytes
from llava.train.arguments import PUBLISHED_LORA
from llava.train.build import model_outline, read_model_config
from llava.train.costs import GIB, Memory, Operations, Step, count_operations, largest_batch, memory, verdict, workload
from llava.train.flags import DTYPES, ZERO_SETTINGS, EstimateArguments
from llava.train.lora import new_lora_config
from llava.train.presets import PRESETS
from llava.train.stages import STAGES, apply_stage, get_stage


@dataclass(frozen=True)
class Estimate:
    """All tables as numbers; operations of one process and step, memory in bytes."""

    settings: dict[str, Any]
    parameters: dict[str, int]
    trained_parameters: dict[str, int]
    granularities: list[dict[str, float]]
    operations: dict[str, dict[str, float]]
    memory: dict[str, dict[str, float | str]]


def check(args: EstimateArguments) -> None:
    """Refuse flags that cannot be meant, all findings at once.

    Raises:
        ValueError: one line per finding.
    """
    errors = []
    for name, value, choices in (("dtype", args.dtype, DTYPES), ("zero", args.zero, ZERO_SETTINGS), ("stage", args.stage, STAGES)):
        if value is not None and value not in choices:
            errors.append(f"--{name} is {value!r}; choose one of {', '.join(choices)}.")
    if args.bits not in (16, 8, 4):
        errors.append(f"--bits is {args.bits}; choose 16, 8 or 4.")
    if args.bits in (8, 4) and args.zero in ("3", "3-offload"):
        errors.append(f"--bits {args.bits} with --zero {args.zero}: quantised weights are not divided; choose 0 or 2.")
    for name in ("num_gpus", "gpu_memory_gb", "per_device_train_batch_size", "text_tokens"):
        if getattr(args, name) <= 0:
            errors.append(f"--{name} is {getattr(args, name)}; give a number above 0.")
    if args.answer_tokens is not None and not 0 <= args.answer_tokens <= args.text_tokens:
        errors.append(f"--answer_tokens is {args.answer_tokens}; give 0 to the {args.text_tokens} of --text_tokens.")
    if args.lora_r < 0:
        errors.append(f"--lora_r is {args.lora_r}; give 0 or more.")
    trains_language = args.stage in STAGES and "llm" in STAGES[args.stage].trains
    if args.stage in STAGES and args.lora_r and not trains_language:
        errors.append(f"--lora_r is given, but stage {args.stage} does not train the language model; drop one of the two.")
    if args.bits != 16 and trains_language and not args.lora_r:
        errors.append(f"--bits {args.bits}: quantised weights cannot be trained in stage {args.stage}; give --lora_r.")
    if (args.model_name_or_path is None) == (args.preset is None):
        errors.append("give either --model_name_or_path or --preset, one of the two.")
    if args.preset is not None and args.preset not in PRESETS:
        errors.append(f"--preset is {args.preset!r}; choose one of {', '.join(PRESETS)}, or give --model_name_or_path.")
    if errors:
        raise ValueError("these flags cannot work together:\n- " + "\n- ".join(errors))


def parse_size(text: str) -> tuple[int, int]:
    """`672x480` as (672, 480).

    Raises:
        ValueError: not two numbers above 0.
    """
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isdigit() and int(side) > 0 for side in sides):
        raise ValueError(f"--image_size is {text!r}; give WIDTHxHEIGHT in pixels, as in 672x480.")
    return int(sides[0]), int(sides[1])


def preset_config(name: str) -> Any:
    """The configuration of a preset."""
    fields = {key: value for key, value in PRESETS[name].items() if key != "model_type"}
    return MODEL_CLASSES[PRESETS[name]["model_type"]].config_class(**fields)


def largest_canvas(config: Any) -> tuple[int, int]:
    """(width, height) of the canvas with most pixels; of one view where images are not tiled."""
    side = config.view_side
    canvases = config.canvases if config.image_aspect_ratio == "anyres" else [(side, side)]
    width, height = max(canvases, key=lambda canvas: canvas[0] * canvas[1])
    return width, height


def estimate(args: EstimateArguments) -> Estimate:
    """Compute every table.

    Raises:
        ValueError: flags or a model that cannot work.
    """
    check(args)
    stage = get_stage(args.stage)
    config = read_model_config(args.model_name_or_path) if args.model_name_or_path is not None else preset_config(args.preset or "")
    if stage.name == "rglf" and config.vis_token_granularity:
        config.router_select = True  # the stage adds a router where there is none
    model = model_outline(config)
    if stage.needs_granularities and len(model.levels) < 2:
        raise ValueError(f"stage {stage.name} compares granularities, but the model has {len(model.levels)}; choose another of the two.")
    size = largest_canvas(config) if args.image_size is None else parse_size(args.image_size)
    answer = args.text_tokens if args.answer_tokens is None else args.answer_tokens
    rows = args.per_device_train_batch_size
    step = Step(rows, args.text_tokens, answer, size, args.gradient_checkpointing, args.lora_r, args.bits)
    if args.lora_r:
        attach_adapter(model, new_lora_config(model, **{**PUBLISHED_LORA, "lora_r": args.lora_r}), torch.bfloat16)
    trained = trained_parameters(model)
    parts = apply_stage(model, stage)
    operations, load = count_operations(model, stage, step), workload(model, stage, step)

    def needs(zero: str, rows: int) -> Memory:
        return memory(model, parts, stage, replace(step, rows=rows), zero, args.dtype, args.num_gpus)

    settings = {**asdict(args), "image_size": list(size), "answer_tokens": answer, "views": load.views}
    return Estimate(
        settings={name: value for name, value in settings.items() if name != "json"},
        parameters={part.part: part.parameters for part in parts if part.parameters},
        trained_parameters=trained,
        granularities=[
            {
                "tokens_per_view": level.tokens,
                "visual_tokens": load.visual_tokens[index],
                "positions": load.lengths[index],
                "forward_operations": operations.language[index],
                "kv_cache_bytes": kv_cache_bytes(config.get_text_config(), load.lengths[index]),
            }
            for index, level in enumerate(model.levels)
        ],
        operations=_operations_of_step(operations, load.levels, stage.name, rows),
        memory={zero: _memory_line(partial(needs, zero), rows, args.gpu_memory_gb * GIB) for zero in _zero_settings(args)},
    )


def trained_parameters(model: Any) -> dict[str, int]:
    """What each stage that this model can go through trains."""
    possible = [stage for stage in STAGES.values() if len(model.levels) > 1 or not stage.needs_granularities]
    possible = [stage for stage in possible if "router" not in stage.trains or model.model.router is not None]
    return {stage.name: sum(part.trainable for part in apply_stage(model, stage)) for stage in possible}


def _zero_settings(args: EstimateArguments) -> list[str]:
    if args.zero is not None:
        return [args.zero]
    return [zero for zero in ZERO_SETTINGS if args.bits == 16 or not zero.startswith("3")]


def _operations_of_step(found: Operations, levels: Sequence[int], stage: str, rows: int) -> dict[str, dict[str, float]]:
    """By part, of a step of one process; in stage 4 also of a step from scores, which leaves the language model out."""
    line = {
        "vision": found.vision * rows,
        "language": sum(found.language[level] for level in levels) * rows,
        "router": found.router * rows,
        "backward": found.backward * rows,
        "recomputed": found.recomputed * rows,
    }
    lines = {stage: line} if stage != "rglf" else {stage: line, "rglf, scored before": {**line, "language": 0.0}}
    return {name: {**each, "total": sum(each.values())} for name, each in lines.items()}


def _memory_line(needs: Callable[[int], Memory], rows: int, gpu: float) -> dict[str, float | str]:
    needed = needs(rows)
    fits = verdict(needed.total, gpu)
    return {**asdict(needed), "total": needed.total, "verdict": fits, "largest_batch": largest_batch(needs, gpu)}


# ---- the report


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lines of text with aligned columns, the first to the left and the others to the right."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )


def operations_text(count: float) -> str:
    """Operations with three digits and a unit: 12.9 T."""
    for limit, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if count >= limit:
            return f"{count / limit:.3g} {unit}" if count < 999.5 * limit else f"{count / limit:.0f} {unit}"
    return f"{count:.0f}" if count else "-"


def bytes_text(count: float) -> str:
    """Memory in GiB, or in MiB below a tenth of one."""
    if not count:
        return "-"
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"


def report(result: Estimate) -> str:
    """The tables as text."""
    settings = result.settings
    width, height = settings["image_size"]
    rows, stage = settings["per_device_train_batch_size"], settings["stage"]
    causes = ("weights", "gradients", "optimizer", "buffers", "activations", "logits", "reserved", "total", "host")
    blocks = [
        f"{settings['preset'] or settings['model_name_or_path']}: {sum(result.parameters.values()):,} parameters. "
        f"Image {width}x{height} ({settings['views']} views), {settings['text_tokens']} text tokens, "
        f"{settings['answer_tokens']} of them supervised.",
        table(["part", "parameters"], [[part, f"{count:,}"] for part, count in result.parameters.items()])
        + "\ntrained: " + ", ".join(f"{name} {count:,}" for name, count in result.trained_parameters.items()),
        "One row at each granularity, in the language model\n"
        + table(
            ["granularity", "visual tokens", "positions", "forward", "KV cache, bf16"],
            [
                [f"{line['tokens_per_view']} per view", f"{line['visual_tokens']:,}", f"{line['positions']:,}",
                 operations_text(line["forward_operations"]), bytes_text(line["kv_cache_bytes"])]
                for line in result.granularities
            ],
        ),
        f"Operations of one step of one GPU, {rows} rows\n"
        + table(
            ["stage", *result.operations[stage]],
            [[name, *map(operations_text, line.values())] for name, line in result.operations.items()],
        ),
        f"Memory of one of {settings['num_gpus']} GPUs with {settings['gpu_memory_gb']:g} GiB in stage {stage}, {settings['dtype']}, "
        f"{rows} rows, checkpointing {'on' if settings['gradient_checkpointing'] else 'off'}\n"
        + table(
            ["setting", *causes, "verdict", "most rows"],
            [
                [f"ZeRO {zero}", *(bytes_text(float(line[cause])) for cause in causes), str(line["verdict"]), str(line["largest_batch"])]
                for zero, line in result.memory.items()
            ],
        ),
        "Operations and memory are computed from shapes, not measured on a GPU.",
    ]  # fmt: skip
    return "\n\n".join(blocks)


def run(args: EstimateArguments) -> None:
    """Print the tables, and write the numbers to the file that the flags name.

    Raises:
        SystemExit: flags or a configuration that cannot work, in one sentence.
    """
    setup_logging()
    try:
        result = estimate(args)
        if args.json is not None:
            write_whole(Path(args.json), json.dumps(asdict(result), indent=2) + "\n")
    except (ValueError, OSError) as error:
        raise SystemExit(f"estimate stopped: {error}") from error
    sys.stdout.write(report(result) + "\n")
