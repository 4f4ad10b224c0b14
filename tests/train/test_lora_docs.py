"""The commands of docs/LoRA.md, run as they stand, at toy size."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llava.model import LlavaConfig, LlavaLlamaForCausalLM

ROOT = Path(__file__).parents[2]
ORACLE = ROOT / "tests" / "oracle"
TOY = {
    "LAUNCHER": "python", "DEVICE": "cpu", "ZERO": "none", "GLOBAL_BATCH": "4", "BATCH": "2", "MODEL_MAX_LENGTH": "1024", "WORKERS": "0",
    "PYTHON": sys.executable, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
}  # fmt: skip
"""Variables of scripts/avg_llava that make a stage small."""


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / "LoRA.md").read_text(), re.DOTALL)


@pytest.mark.slow
def test_the_pages_commands(tmp_path: Path) -> None:
    """In order, in a folder that has what the page says: a model of stage 1, rows and images."""
    pytest.importorskip("bitsandbytes")
    base = tmp_path / "checkpoints" / "stage1-align"
    tiny = LlavaLlamaForCausalLM.from_pretrained(ORACLE / "checkpoint").config
    stored = {**LlavaConfig.get_config_dict(ORACLE / "checkpoint")[0], "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    fields = {name: value for name, value in stored.items() if name not in ("architectures", "dtype", "torch_dtype", "model_type")}
    fields |= {"vision_config": tiny.vision_config, "image_processor": tiny.image_processor}
    LlavaLlamaForCausalLM(LlavaConfig(**fields)).save_pretrained(base)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(ORACLE / "checkpoint" / name, base)
    (tmp_path / "data").mkdir()
    shutil.copy(ORACLE / "train_data.json", tmp_path / "data" / "rows.json")
    shutil.copytree(ORACLE / "images", tmp_path / "data" / "images")
    for name in ("scripts", "llava"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {**os.environ, **TOY, "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    commands = [["bash", "-euo", "pipefail", "-c", block] for block in _blocks("bash")] + [[sys.executable, "-c", _blocks("python")[0]]]
    for command in commands:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command[-1]}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    for name, rank in (("lora", 64), ("qlora", 64), ("lora-more", 64)):
        assert json.loads((tmp_path / "checkpoints" / name / "adapter_config.json").read_text())["r"] == rank
    assert (tmp_path / "checkpoints" / "lora-merged" / "model.safetensors").is_file()
