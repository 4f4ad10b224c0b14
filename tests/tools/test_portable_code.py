"""The native model's code in a checkpoint folder: loaded and run by an interpreter that has no package of ours."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from llava.convert import main
from llava.tools.portable_code import AUTO_MAP, portable_modules, write_code
from tests.micro import llava_micro_folder

ROOT = Path(__file__).parents[2]
QUESTION = [
    {
        "role": "user",
        "content": [
            {"type": "image", "path": str(ROOT / "playground/images/scene_beige.png")},
            {"type": "text", "text": "Which number does the sign show?"},
        ],
    }
]
WITHOUT_PACKAGE = """
import json, sys
sys.modules["llava"] = None  # importing it fails from here on
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor

folder, again, question = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor.apply_chat_template(question, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
output, routing = model.generate(**inputs, max_new_tokens=8, output_routing=True)
with torch.no_grad():
    logits = model(**inputs).logits
for auto in (AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, AutoImageProcessor):
    auto.from_pretrained(folder, trust_remote_code=True)
model.save_pretrained(again)
processor.save_pretrained(again)
save_file({"logits": logits, "output": output, "granularity": torch.tensor(routing[0].granularity)}, again + "/seen.safetensors")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("native") / "micro"
    assert main([str(llava_micro_folder()), str(output), "--to", "native", "--with_code"]) == 0
    return output


def test_it_runs_where_the_package_is_missing_and_saves_itself(folder: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""}
    command = [sys.executable, "-c", WITHOUT_PACKAGE, str(folder), str(again), json.dumps(QUESTION)]
    ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    model, processor = AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    assert type(model).__module__ == "llava.model.native.modeling_avg_llava"  # installed code goes before the folder's
    inputs = processor.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    output, routing = model.generate(**inputs, max_new_tokens=8, output_routing=True)
    seen = load_file(again / "seen.safetensors")
    with torch.no_grad():
        assert torch.equal(seen["logits"], model(**inputs).logits)
    assert torch.equal(seen["output"], output) and int(seen["granularity"]) == routing[0].granularity
    assert {file.name for file in again.iterdir()} >= set(portable_modules())
    assert json.loads((again / "config.json").read_text())["auto_map"]["AutoModelForImageTextToText"].startswith("modeling_avg_llava.")


def test_a_folder_written_without_code_does_not_promise_any(folder: Path, tmp_path: Path) -> None:
    AutoModelForImageTextToText.from_pretrained(folder).save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())


def test_every_class_is_in_its_file_and_every_import_leads_to_one() -> None:
    modules = portable_modules()
    for name, source in modules.items():
        tree = ast.parse(source)
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        assert all(f"{node.module}.py" in modules for node in imports if node.level == 1), name
        assert not any((node.module or "").split(".")[0] == "llava" for node in imports if not node.level), name
    for entry in AUTO_MAP.values():
        file, _, kind = entry.partition(".")
        assert f"class {kind}(" in modules[f"{file}.py"]


def test_a_folder_without_a_processor_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="has no processor_config.json; save model and processor there first"):
        write_code(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
