"""The page for LLaVA's users: its Python runs as pasted, what it says is given is there, and what it says is not, is not."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from llava import conversation

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "Coming_from_LLaVA.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


def rows(heading: str) -> list[list[str]]:
    """The cells of the table below a heading, without its head."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")][2:]


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    module, _, last = name.rpartition(".")
    try:
        return hasattr(importlib.import_module(module), last) or bool(importlib.import_module(name))
    except ModuleNotFoundError:
        return False


GIVEN = [f"{module.strip('`')}.{name}" for module, names in rows("Names that are given") for name in re.findall(r"`(\w+)`", names)]
NOT_GIVEN = [name for cells in rows("Names that are not given") for name in re.findall(r"`(llava\.[\w.]+)`", cells[0])]


@pytest.mark.parametrize(("source", "printed"), list(zip(BLOCKS, ("658", "['model.safetensors']"), strict=True)), ids=["answer", "train"])
def test_python_runs_as_written(source: str, printed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(conversation, "default_conversation", conversation.default_conversation)
    exec(compile(source, "Coming_from_LLaVA.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.splitlines()[-1] == printed


@pytest.mark.parametrize("name", GIVEN)
def test_a_name_that_is_given_is_there(name: str) -> None:
    assert exists(name)


@pytest.mark.parametrize("name", NOT_GIVEN)
def test_a_name_that_is_not_given_is_not_there(name: str) -> None:
    assert not exists(name)


def test_the_names_are_many() -> None:
    assert len(GIVEN) > 60 and len(NOT_GIVEN) > 20


def test_what_replaces_a_name_is_there() -> None:
    replacements = [name for cells in rows("Names that are not given") for name in re.findall(r"`(llava\.[\w.]+)`", cells[1])]
    assert len(replacements) >= 3 and all(map(exists, replacements))


def test_a_star_import_brings_llavas_names() -> None:
    names: dict[str, object] = {}
    exec("from llava.train.train import *", names)
    assert {"LazySupervisedDataset", "TrainingArguments", "preprocess", "train"} <= set(names)


def test_a_model_and_a_tower_have_what_the_page_lists(released_names: tuple[object, object, object]) -> None:
    text = PAGE.split("A model has ")[1].split("\n\n")[0]
    of_model, rest = text.split("and `get_model()` has ")
    of_inner, of_tower = rest.split("A tower has\n")
    for owner, words in zip(released_names, (of_model, of_inner, of_tower), strict=True):
        listed = re.findall(r"`(\w+)(?:\(\))?`", words)
        assert len(listed) >= 5 and [name for name in listed if not hasattr(owner, name)] == []


@pytest.fixture
def released_names(oracle: Path) -> tuple[object, object, object]:
    """A model, its inner model and its tower."""
    from llava.model import LlavaLlamaForCausalLM

    model = LlavaLlamaForCausalLM.from_pretrained(oracle / "checkpoint")
    return model, model.get_model(), model.get_vision_tower()
