"""Many processes train as one does: DDP, the ZeRO stages, two hosts, ranks without an image, a host that is lost."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llava.model.builder import load_pretrained_model
from llava.train.distributed import full_weights_on_load, init_cpu_deepspeed, is_lost_process, lost_process_message
from llava.train.run import make_trainer, parse_arguments
from tests.stage_runs import ORACLE, ROOT, TOY_LEVELS, losses, recorded_rows, run, run_well, start, stop_group, write_rows

Flags = Callable[..., list[str]]
STEPS = 10
SAME = 1e-4
needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None or shutil.which("g++") is None,
    reason="DeepSpeed on a CPU needs the package and g++, which compiles its operations",
)
RATES = {"multi_granularity": 1e-3, "rglf": 1e-3}
"""High enough for a wrong gradient to show in the losses within ten steps."""


def flags(steps: int = STEPS) -> list[object]:
    """Flags of the compared runs: rows in the order of their file, every step logged."""
    return ["--max_steps", steps, "--train_sampling_strategy", "sequential", "--group_by_modality_length", "False",
            "--lr_scheduler_type", "constant", "--warmup_ratio", 0]  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen rows, four a step; with two processes the first two of four are the first process's.

    Step 1: the second process has only text. Step 2: no image at all. Step 3: the first has only text. Step 4: images on both.
    """
    recorded = recorded_rows()
    with_image = [row for row in recorded if "image" in row]
    texts = [row for row in recorded if "image" not in row]
    order = [*with_image[:2], *texts, *texts, *texts, *texts, *with_image[2:4], with_image[4], texts[0], with_image[0], with_image[1]]
    assert len(order) == 16
    numbered = [{**row, "id": f"r{number}"} for number, row in enumerate(order)]
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.json", numbered)


@pytest.fixture(scope="module")
def steady_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorded checkpoint without dropout in its router: two processes draw other masks than one."""
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    shutil.copytree(ORACLE / "checkpoint", folder)
    shutil.copytree(ORACLE / "tiny-clip", folder.parent / "tiny-clip")
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "router_dropout": 0.0}))
    return folder


def variables(stage: str, model: Path, rows: Path, out: Path, **more: object) -> dict[str, object]:
    return {"MODEL": model, "DATA_PATH": rows, "OUTPUT_DIR": out, "LEARNING_RATE": RATES[stage], "TOWER_LEARNING_RATE": 1e-3, **more}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, steady_model: Path, rows: Path) -> Callable[[str], list[float]]:
    """Losses of one process, by stage; each is run once."""
    known: dict[str, list[float]] = {}

    def run_alone(stage: str) -> list[float]:
        if stage not in known:
            out = tmp_path_factory.mktemp(stage) / "alone"
            given = variables(stage, steady_model, rows, out, LAUNCHER="python", NPROC=1)
            known[stage] = run_well(stage, given, flags())
            assert len(known[stage]) == STEPS and max(known[stage]) - min(known[stage]) > 0.1
        return known[stage]

    return run_alone


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["multi_granularity", "rglf"])
@pytest.mark.parametrize("zero", ["none", *(pytest.param(name, marks=needs_deepspeed) for name in ("2", "3", "3_offload"))])
def test_two_processes_train_as_one_does(
    stage: str, zero: str, alone: Callable[[str], list[float]], steady_model: Path, rows: Path, tmp_path: Path
) -> None:
    """Ten steps, among them steps in which a process has only text, and steps without any image."""
    expected = alone(stage)
    found = run_well(stage, variables(stage, steady_model, rows, tmp_path / "out", ZERO=zero), flags(), timeout=900)
    assert found == pytest.approx(expected, rel=SAME)
    loads(tmp_path / "out")


@pytest.mark.slow
@needs_deepspeed
def test_chunks_of_logits_under_zero3(alone: Callable[[str], list[float]], steady_model: Path, rows: Path, tmp_path: Path) -> None:
    """Processes with unequally long answers, scored token by token, gather the head's weights equally often."""
    (tmp_path / "sitecustomize.py").write_text("from llava.train import losses\n\nlosses.LOGITS_AT_ONCE = 1\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    given = variables("multi_granularity", steady_model, rows, tmp_path / "out", ZERO=3, PYTHONPATH=path)
    assert run_well("multi_granularity", given, flags(), timeout=900) == pytest.approx(alone("multi_granularity"), rel=SAME)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("stage", ["multi_granularity", "rglf"])
def test_evaluation_under_zero3(stage: str, steady_model: Path, rows: Path, tmp_path: Path) -> None:
    """The weights are whole while a batch is evaluated, before the first step and between steps; the loss is one process's."""
    found = []
    for name, more in (("alone", {"LAUNCHER": "python", "NPROC": 1}), ("shared", {"ZERO": 3})):
        given = variables(stage, steady_model, rows, tmp_path / name, **more)
        extra = ["--eval_data_path", rows, "--eval_strategy", "steps", "--eval_steps", 1, "--eval_on_start", True]
        run_well(stage, given, [*flags(), "--max_steps", 1, "--per_device_eval_batch_size", 2, *extra], timeout=600)
        history = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        found.append([entry["eval_loss"] for entry in history if "eval_loss" in entry])
    assert len(found[0]) == 2 and found[1] == pytest.approx(found[0], rel=SAME)


def loads(folder: Path) -> None:
    """A finished run loads for inference with whole weights."""
    tokenizer, model, _, _ = load_pretrained_model(str(folder), None, "any", device="cpu")
    assert all(parameter.numel() for parameter in model.parameters())
    ids = tokenizer("Where?", return_tensors="pt").input_ids
    assert torch.isfinite(model(input_ids=ids).logits).all()


@pytest.mark.slow
@needs_deepspeed
def test_deepspeed_launcher_and_align_under_zero3(tmp_path: Path, rows: Path, steady_model: Path) -> None:
    """DeepSpeed's own launcher; the projector-only file of stage 1 holds whole tensors although ZeRO-3 had sharded them."""
    from safetensors.torch import load_file

    captions = [row for row in recorded_rows() if "image" in row and len(row["conversations"]) == 2]
    given = {
        "MODEL": steady_model, "VISION_TOWER": ORACLE / "tiny-clip", "DATA_PATH": write_rows(tmp_path / "captions.json", captions),
        "OUTPUT_DIR": tmp_path / "out", "LAUNCHER": "deepspeed", "ZERO": 3,
    }  # fmt: skip
    canvases = json.loads((steady_model / "config.json").read_text())["image_grid_pinpoints"]
    extra = ["--max_steps", 2, "--mm_projector_type", "mlp2x_gelu", "--image_grid_pinpoints", str(canvases)]
    run_well("align", given, extra, timeout=600)
    stored = load_file(tmp_path / "out" / "mm_projector.safetensors")
    whole = load_file(tmp_path / "out" / "model.safetensors")
    assert stored and all(torch.equal(whole[name], tensor) for name, tensor in stored.items())
    loads(tmp_path / "out")


# ---- a process that is lost


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others(tmp_path: Path, rows: Path, steady_model: Path) -> None:
    """A broken row on the second process: its sentence names the row, and the run ends at once for both."""
    broken = json.loads(rows.read_text())
    broken[6] = {**broken[6], "image": "missing.png", "conversations": broken[0]["conversations"]}
    file = write_rows(tmp_path / "broken.json", broken)
    begun = time.monotonic()
    done = run("multi_granularity", variables("multi_granularity", steady_model, file, tmp_path / "out"), flags())
    assert done.returncode != 0
    assert "training stopped:" in done.stdout and "missing.png" in done.stdout
    assert time.monotonic() - begun < 240
    assert not (tmp_path / "out" / "config.json").exists()


HOSTS = {"avg-a": ("ava", "10.77.0.1"), "avg-b": ("avb", "10.77.0.2")}
"""Network namespaces that stand for hosts: interface and address."""


def ip(*words: str, check: bool = True) -> None:
    subprocess.run(["ip", *words], check=check, capture_output=True, text=True)


def switch_off(name: str) -> None:
    """Kill every process on a host, as a power cut does."""
    listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False).stdout
    for number in listed.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(number), signal.SIGKILL)


def remove_hosts() -> None:
    for name in HOSTS:
        switch_off(name)
        ip("netns", "del", name, check=False)


@pytest.fixture
def two_hosts() -> Iterator[list[tuple[str, str, str]]]:
    """Two network namespaces joined by a cable: (name, interface, address) each."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("two hosts on one machine are network namespaces, which need root and the command ip")
    remove_hosts()
    try:
        for name in HOSTS:
            ip("netns", "add", name)
        (first, (cable, _)), (second, (end, _)) = HOSTS.items()
        ip("link", "add", cable, "netns", first, "type", "veth", "peer", "name", end, "netns", second)
        for name, (interface, address) in HOSTS.items():
            ip("-n", name, "addr", "add", f"{address}/24", "dev", interface)
            for device in ("lo", interface):
                ip("-n", name, "link", "set", device, "up")
    except subprocess.CalledProcessError as error:
        remove_hosts()
        pytest.skip(f"this machine allows no network namespaces: {error.stderr.strip()}")
    try:
        yield [(name, interface, address) for name, (interface, address) in HOSTS.items()]
    finally:
        remove_hosts()


def start_on(
    hosts: list[tuple[str, str, str]], stage: str, given: dict[str, object], extra: list[object], logs: Path
) -> list[subprocess.Popen[str]]:
    """Start a stage by hand on every host, as one would on two machines."""
    logs.mkdir(exist_ok=True)
    return [
        start(
            stage,
            {**given, "NNODES": 2, "NPROC": 1, "NODE_RANK": rank, "MASTER_ADDR": hosts[0][2], "GLOO_SOCKET_IFNAME": interface},
            extra, ("ip", "netns", "exec", name), logs / f"{name}.log",
        )
        for rank, (name, interface, _) in enumerate(hosts)
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen[str]], logs: Path, timeout: float) -> None:
    """Wait for all hosts; none may fail or hang."""
    try:
        for process in processes:
            assert process.wait(timeout) == 0, "".join(file.read_text()[-3000:] for file in logs.iterdir())
    finally:
        for process in processes:
            stop_group(process)


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["none", pytest.param("3", marks=needs_deepspeed)])
def test_two_hosts(
    zero: str, alone: Callable[[str], list[float]], two_hosts: list[Any], steady_model: Path, rows: Path, tmp_path: Path
) -> None:
    """Two hosts learn what one process learns; when one is killed the other says so and ends; resumed, the losses are the same."""
    stage = "multi_granularity"
    expected = alone(stage)
    given = variables(stage, steady_model, rows, tmp_path / "out", ZERO=zero, SAVE_STEPS=2)
    keep_all = ["--save_total_limit", 1000]
    processes = start_on(two_hosts, stage, given, [*flags(1000), *keep_all], tmp_path / "first")
    try:
        wait_for(tmp_path / "out" / "checkpoint-4", processes, tmp_path / "first")
        killed = time.monotonic()
        switch_off(two_hosts[1][0])
        assert processes[0].wait(90) != 0
        assert time.monotonic() - killed < 60
        said = (tmp_path / "first" / f"{two_hosts[0][0]}.log").read_text()
        assert "training stopped: another process of this run ended, or its host cannot be reached" in said, said[-3000:]
    finally:
        for process in processes:
            stop_group(process)
    for folder in (tmp_path / "out").glob("checkpoint-*"):
        if folder.name not in ("checkpoint-2", "checkpoint-4"):
            shutil.rmtree(folder)
    processes = start_on(two_hosts, stage, {**given, "RESUME": 1}, [*flags(), *keep_all], tmp_path / "second")
    finish(processes, tmp_path / "second", 600)
    assert losses(tmp_path / "out") == pytest.approx(expected, rel=SAME)
    loads(tmp_path / "out")


def wait_for(folder: Path, processes: list[subprocess.Popen[str]], logs: Path, seconds: float = 600) -> None:
    """Wait until a running training has written a checkpoint."""
    end = time.monotonic() + seconds
    while not folder.exists():
        assert all(process.poll() is None for process in processes), "".join(file.read_text()[-3000:] for file in logs.iterdir())
        assert time.monotonic() < end, f"{folder} was not written within {seconds} s"
        time.sleep(0.2)


# ---- memory


@pytest.mark.parametrize("stage", ["instruct", "multi_granularity"])
def test_gradient_checkpointing_changes_no_gradient(stage: str, tmp_path: Path, run_flags: Flags) -> None:
    """Layers are computed again in the backward pass, in language model and tower, and every gradient is the same."""
    gradients: dict[bool, dict[str, torch.Tensor]] = {}
    calls: dict[bool, dict[str, int]] = {}
    for switched in (False, True):
        given = run_flags(tmp_path / str(switched), stage, gradient_checkpointing=switched, max_steps=1)
        trainer = make_trainer(parse_arguments(given))
        counts = {"llm": 0, "tower": 0}

        def count(part: str, counts: dict[str, int] = counts) -> Callable[..., None]:
            def hook(*_: object) -> None:
                counts[part] += 1

            return hook

        trainer.model.model.layers[0].self_attn.register_forward_pre_hook(count("llm"))
        tower_layer = next(module for name, module in trainer.model.named_modules() if name.endswith("encoder.layers.0.self_attn"))
        tower_layer.register_forward_pre_hook(count("tower"))
        kept: dict[str, torch.Tensor] = {}

        def keep(optimizer: Any, *_: object, model: Any = trainer.model, kept: dict[str, torch.Tensor] = kept) -> None:
            kept.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

        trainer.create_optimizer().register_step_pre_hook(keep)
        trainer.train()
        gradients[switched], calls[switched] = kept, counts
    assert gradients[True].keys() == gradients[False].keys() and gradients[True]
    for name, gradient in gradients[False].items():
        torch.testing.assert_close(gradients[True][name], gradient, rtol=1e-5, atol=1e-7)
    assert calls[False]["tower"] == 1 and calls[True] == {part: 2 * count for part, count in calls[False].items()}


# ---- small pieces


def test_only_a_cpu_run_of_deepspeed_meets_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain and GPU runs leave the meeting to transformers."""
    import sys

    asked: list[dict[str, object]] = []
    fake = SimpleNamespace(init_distributed=lambda **options: asked.append(options))
    monkeypatch.setitem(sys.modules, "deepspeed", fake)
    for deepspeed, use_cpu in ((None, True), ("zero3.json", False), ("zero3.json", True)):
        init_cpu_deepspeed(SimpleNamespace(deepspeed=deepspeed, use_cpu=use_cpu))  # type: ignore[arg-type]
    assert asked == [{"dist_backend": "gloo", "auto_mpi_discovery": False}]


def test_weights_are_loaded_whole_under_zero3() -> None:
    from transformers.integrations import deepspeed as integration

    class Settings:
        def is_zero3(self) -> bool:
            return True

    settings = Settings()
    integration.set_hf_deepspeed_config(settings)
    try:
        with full_weights_on_load(SimpleNamespace(deepspeed="zero3.json", hf_deepspeed_config=settings)):  # type: ignore[arg-type]
            assert not integration.is_deepspeed_zero3_enabled()
        assert integration.is_deepspeed_zero3_enabled()
        with full_weights_on_load(SimpleNamespace(deepspeed=None)):  # type: ignore[arg-type]
            assert integration.is_deepspeed_zero3_enabled()
    finally:
        integration.unset_hf_deepspeed_config()


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        ("[/pytorch/gloo/transport/tcp/pair.cc:549] Connection closed by peer [10.77.0.2]:2134", True),
        ("NCCL error: remote process exited or there was a network error", True),
        ("Timed out waiting 1800000ms for recv operation to complete", True),
        ("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)", False),
    ],
)
def test_a_lost_process_is_told_from_other_errors(message: str, lost: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError(message)
    assert not is_lost_process(error)  # there is no other process
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    assert is_lost_process(error) == lost
    if lost:
        sentence = lost_process_message(error)
        assert "\n" not in sentence and "--resume_from_checkpoint True" in sentence and "/pytorch/" not in sentence


# ---- LLaVA's names


@pytest.mark.parametrize(
    ("name", "value", "stage", "reads"),
    [
        ("tune_mm_mlp_adapter", True, None, lambda m, d, t: t.stage == "align"),
        ("tune_router", True, None, lambda m, d, t: t.stage == "rglf"),
        ("router_select", True, "rglf", lambda m, d, t: t.router_select is True),
        ("unfreeze_mm_vision_tower", False, "instruct", lambda m, d, t: t.frozen_parts == {"vision_tower"}),
        ("freeze_mm_mlp_adapter", True, "instruct", lambda m, d, t: t.frozen_parts == {"projector", "newline"}),
        ("freeze_backbone", True, "instruct", lambda m, d, t: t.frozen_parts == {"llm"}),
        ("mm_vision_tower_lr", 3e-6, "instruct", lambda m, d, t: t.learning_rates["vision_tower"] == 3e-6),
        ("mm_projector_lr", 4e-5, "instruct", lambda m, d, t: t.learning_rates["projector"] == 4e-5),
        ("vis_token_granularity", "36,72,144,288,576", "multi_granularity", lambda m, d, t: m.granularities == [36, 72, 144, 288, 576]),
        ("group_by_modality_length", True, "instruct", lambda m, d, t: t.group_by_modality_length),
        ("evaluation_strategy", "steps", "instruct", lambda m, d, t: t.eval_strategy == "steps"),
        ("warmup_ratio", 0.1, "instruct", lambda m, d, t: t.warmup_steps == 0.1),
        ("bits", 4, "instruct", lambda m, d, t: t.bits == 4),
        ("lora_enable", True, "instruct", lambda m, d, t: t.lora_enable),
        ("gradient_checkpointing", True, "instruct", lambda m, d, t: t.activation_checkpointing),
        ("bf16", True, "instruct", lambda m, d, t: t.bf16),
        ("tf32", False, "instruct", lambda m, d, t: t.tf32 is False),
        ("dataloader_num_workers", 3, "instruct", lambda m, d, t: t.dataloader_num_workers == 3),
        ("lazy_preprocess", False, "instruct", lambda m, d, t: d.lazy_preprocess is False),
        ("model_max_length", 777, "instruct", lambda m, d, t: t.model_max_length == 777),
        ("version", "plain", "instruct", lambda m, d, t: m.version == "plain"),
        ("vision_tower", "clip", "instruct", lambda m, d, t: m.vision_tower == "clip"),
        ("mm_projector_type", "linear", "instruct", lambda m, d, t: m.mm_projector_type == "linear"),
        ("mm_vision_select_layer", -1, "instruct", lambda m, d, t: m.mm_vision_select_layer == -1),
        ("mm_vision_select_feature", "patch", "instruct", lambda m, d, t: m.mm_vision_select_feature == "patch"),
        ("mm_patch_merge_type", "spatial", "instruct", lambda m, d, t: m.mm_patch_merge_type == "spatial"),
        ("mm_use_im_start_end", True, "instruct", lambda m, d, t: m.mm_use_im_start_end),
        ("mm_use_im_patch_token", True, "instruct", lambda m, d, t: m.mm_use_im_patch_token),
        ("pretrain_mm_mlp_adapter", "p.safetensors", "instruct", lambda m, d, t: m.pretrain_mm_mlp_adapter == "p.safetensors"),
        ("image_aspect_ratio", "pad", "instruct", lambda m, d, t: d.image_aspect_ratio == "pad"),
        ("is_multimodal", True, "instruct", lambda m, d, t: d.is_multimodal),
        ("filtered_text_num", 16, "rglf", lambda m, d, t: m.filtered_text_num == 16),
        ("margin", 0.5, "rglf", lambda m, d, t: t.margin == 0.5),
        ("rank_loss_weight", 2.0, "rglf", lambda m, d, t: t.rank_loss_weight == 2.0),
        ("ce_loss_weight", 0.2, "rglf", lambda m, d, t: t.ce_loss_weight == 0.2),
        ("deepspeed", None, "instruct", lambda m, d, t: t.deepspeed is None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_llavas_flags(name: str, value: object, stage: str | None, reads: Callable[..., bool], tmp_path: Path, run_flags: Flags) -> None:
    needs = {"evaluation_strategy": {"eval_steps": 1, "eval_data_path": ORACLE / "train_data.json"}, "bits": {"lora_enable": True}}
    changes = {"warmup_ratio": None, name: value, **needs.get(name, {})}
    assert reads(*parse_arguments(run_flags(tmp_path, stage, **changes)))


def test_levels_of_these_runs_are_the_checkpoints() -> None:
    config = json.loads((ORACLE / "checkpoint" / "config.json").read_text())
    assert str(config["vis_token_granularity"]).strip("[]").replace(" ", "") == TOY_LEVELS
