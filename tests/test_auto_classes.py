"""`import llava` alone makes transformers' Auto classes know our models, in fresh interpreters, and loads no framework."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llava.model import AvgLlavaProcessor, LlavaConfig
from llava.model.chat_template import add_image_token
from llava.model.native.llava_layout import native_config
from llava.tokenizer import load_tokenizer
from tests.micro import llava_micro_folder

NATIVE_MODEL = "AvgLlavaForConditionalGeneration"
ORDERS = {
    "llava first": "import llava; import transformers",
    "transformers first": "import transformers; import llava",
    "Auto classes first": "from transformers import AutoConfig, AutoProcessor, AutoTokenizer; import llava; import transformers",
}


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def native_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configuration and processor of the micro model's native twin."""
    folder = tmp_path_factory.mktemp("native")
    config = LlavaConfig.from_pretrained(llava_micro_folder())
    tokenizer = load_tokenizer(llava_micro_folder())
    image = add_image_token(tokenizer)
    native = native_config(config, image, image + 1)
    native.save_pretrained(folder)
    AvgLlavaProcessor.for_model(native, tokenizer, config.image_processor).save_pretrained(folder)
    return folder


def test_importing_loads_no_framework() -> None:
    assert run("import llava, sys; print({'torch', 'transformers', 'PIL'} & set(sys.modules))") == "set()"


def test_importing_auto_classes_loads_no_model() -> None:
    code = "import llava, sys; from transformers.models.auto import configuration_auto; print('llava.model' in sys.modules)"
    assert run(code) == "False"


@pytest.mark.parametrize(
    ("order", "call", "expected"),
    [
        # found by its class's name, before any configuration is read
        ("llava first", "AutoProcessor.from_pretrained(native)", "AvgLlavaProcessor"),
        ("transformers first", "AutoImageProcessor.from_pretrained(native)", "AvgLlavaImageProcessor"),
        ("Auto classes first", "AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(native))", NATIVE_MODEL),
        ("transformers first", "AutoTokenizer.from_pretrained(native)", "TokenizersBackend"),
        ("transformers first", "AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(native))", NATIVE_MODEL),
        ("llava first", "AutoModel.from_config(AutoConfig.from_pretrained(native))", "AvgLlavaModel"),
        ("llava first", "AutoConfig.for_model('llava_mistral')", "LlavaMistralConfig"),
        ("Auto classes first", "AutoProcessor.from_pretrained(micro)", "LlavaLayoutProcessor"),
    ],
)
def test_any_auto_class_may_be_the_first(order: str, call: str, expected: str, native_folder: Path) -> None:
    code = (
        f"{ORDERS[order]}\n"
        "from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer\n"
        "from transformers.models.auto.image_processing_auto import AutoImageProcessor\n"
        f"native, micro = {str(native_folder)!r}, {str(llava_micro_folder())!r}\n"
        f"print(type({call}).__name__)"
    )
    assert run(code) == expected


@pytest.mark.parametrize("with_config", [True, False])
def test_folders_of_earlier_releases_give_their_own_processor(with_config: bool, tmp_path: Path) -> None:
    """They name `AvgLlavaProcessor`, which was the name of the LLaVA layout's."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(llava_micro_folder())
    processor.save_pretrained(tmp_path)
    file = tmp_path / "processor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "processor_class": "AvgLlavaProcessor"}))
    if with_config:
        LlavaConfig.from_pretrained(llava_micro_folder()).save_pretrained(tmp_path)
    found = AutoProcessor.from_pretrained(tmp_path)
    assert type(found) is type(processor) and type(processor).__name__ == "LlavaLayoutProcessor"
    assert found(text="What?")["input_ids"] == processor(text="What?")["input_ids"]
