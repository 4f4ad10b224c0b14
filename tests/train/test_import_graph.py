"""The modules of training import each other at their top, and never in a circle."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "llava" / "train"


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


PROGRAMS = {f"llava.train.{name}" for name in ("train", "check", "estimate", "score_granularities")}
"""They import what they run once their flags are read."""
MODULES = {module_name(file): ast.parse(file.read_text(encoding="utf-8")) for file in FOLDER.rglob("*.py")}


def imports(tree: ast.AST) -> set[str]:
    """Modules of training that a tree imports, at any depth."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & MODULES.keys()


def test_no_module_imports_itself_through_others() -> None:
    """`graphlib` raises `CycleError`, which names the circle."""
    graph = {name: imports(tree) - {name} for name, tree in MODULES.items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)
    assert graph["llava.train.dataset"] == {"llava.train.check"} and "llava.train.rows" in graph["llava.train.index"]


@pytest.mark.parametrize("name", sorted(MODULES.keys() - PROGRAMS))
def test_our_modules_are_imported_at_the_top(name: str) -> None:
    """Imports within functions are for heavy libraries; ours there would hide a circle."""
    functions = [node for node in ast.walk(MODULES[name]) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    nested = [node for function in functions for node in ast.walk(function) if isinstance(node, ast.ImportFrom)]
    assert [ast.unparse(node) for node in nested if (node.module or "").startswith("llava") or node.level] == []
