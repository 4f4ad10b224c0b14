"""What pyproject.toml promises: dependencies that cover the imports, a version that is the package's, ranges that hold here."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import llava
from llava.interrupts import EXTRA_MODULES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CORE = [Requirement(text) for text in PROJECT["project"]["dependencies"]]
EXTRAS = {name: [Requirement(text) for text in texts] for name, texts in PROJECT["project"]["optional-dependencies"].items()}
DISTRIBUTIONS = {
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "easy_vqa": "easy-vqa",
    "google": "protobuf",
    "yaml": "pyyaml",
    "prometheus_client": "prometheus-client",
    "httpx_sse": "httpx-sse",
    "pydantic_core": "pydantic",
    "markupsafe": "jinja2",
    "kubernetes_validate": "kubernetes-validate",
    "compose_pydantic": "compose-pydantic",
}
"""Distributions that are not called like what they are imported as, or that come with another in the version that fits."""


def imported(folder: Path, leaving_out: tuple[str, ...] = ()) -> dict[str, str]:
    """Third-party distributions that a folder's modules import, each with one module that does."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*.py")):
        if path.relative_to(folder).parts[0] in leaving_out:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for top in {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"llava", "playground", "avg_llava_lmms_eval"}:
                found.setdefault(DISTRIBUTIONS.get(top, top), str(path.relative_to(ROOT)))
    return found


def lacking(imports: dict[str, str], requirements: list[Requirement]) -> dict[str, str]:
    """The imports that no requirement brings."""
    promised = {requirement.name for requirement in requirements}
    return {name: path for name, path in imports.items() if name not in promised}


def test_core_dependencies_cover_what_inference_imports() -> None:
    imports = imported(ROOT / "llava", leaving_out=("train", "serve", "vllm_plugin"))
    assert {"torch", "transformers", "pillow"} <= set(imports)
    # Only adapter folders need it, and reading one without it says what to install.
    assert imports.pop("peft") == "llava/model/adapter.py"
    # Only the plot of a report needs it, and a report without it says so.
    assert imports.pop("matplotlib") == "llava/eval/report/plots.py"
    # Only --engine vllm needs them, one at an address and one without.
    assert (imports.pop("httpx"), imports.pop("vllm")) == ("llava/eval/chat_server.py", "llava/eval/offline_vllm.py")
    assert lacking(imports, CORE) == {}


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("llava/train", ["train"]),
        ("llava/serve", ["serve"]),
        ("llava/eval", ["eval", "vllm"]),
        ("llava/vllm_plugin", ["vllm"]),
        ("playground", ["playground"]),
    ],
)
def test_extras_cover_what_their_folder_imports(folder: str, extras: list[str]) -> None:
    assert lacking(imported(ROOT / folder), CORE + [requirement for extra in extras for requirement in EXTRAS[extra]]) == {}


def test_a_missing_package_is_looked_up_in_the_extras_that_bring_it() -> None:
    for extra, modules in EXTRA_MODULES.items():
        assert {DISTRIBUTIONS.get(module, module) for module in modules} == {requirement.name for requirement in EXTRAS[extra]}


def test_dev_brings_what_the_tests_import() -> None:
    # These run in an environment of their own, and as a script.
    imports = imported(ROOT / "tests", leaving_out=("clients", "transformers_mixins"))
    imports.pop("tests", None)
    assert lacking(imports, CORE + EXTRAS["dev"]) == {}


def test_importing_the_package_needs_no_torch() -> None:
    code = "import sys, llava; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_version_is_the_packages() -> None:
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "llava.__version__"}
    assert f"## [{llava.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("requirement", CORE, ids=lambda requirement: requirement.name)
def test_core_requirements_are_bounded_below_and_hold_here(requirement: Requirement) -> None:
    assert any(specifier.operator == ">=" for specifier in requirement.specifier)
    assert requirement.specifier.contains(version(requirement.name), prereleases=True)


def test_an_extra_asks_the_same_of_a_library_as_the_others() -> None:
    asked: dict[str, set[str]] = {}
    for requirement in [*CORE, *(requirement for extra in EXTRAS.values() for requirement in extra)]:
        asked.setdefault(requirement.name, set()).add(str(requirement.specifier))
    assert {name: ranges for name, ranges in asked.items() if len(ranges) > 1} == {}


def test_the_scripts_accept_the_python_versions_that_the_package_does() -> None:
    assert SpecifierSet(PROJECT["project"]["requires-python"]) == SpecifierSet(">=3.10,<3.14")
    assert "(3, 10) <= sys.version_info[:2] <= (3, 13)" in (ROOT / "scripts" / "lib.sh").read_text(encoding="utf-8")


def test_the_torch_that_the_scripts_install_is_in_range() -> None:
    library = (ROOT / "scripts" / "lib.sh").read_text(encoding="utf-8")
    default = library.split("${TORCH_VERSION:-")[1].split("}")[0]
    torch = next(requirement for requirement in CORE if requirement.name == "torch")
    assert torch.specifier.contains(default)


def test_the_licence_is_the_one_that_is_declared() -> None:
    assert PROJECT["project"]["license"] == "Apache-2.0"
    assert "Apache License\n                           Version 2.0" in (ROOT / "LICENSE").read_text(encoding="utf-8")
