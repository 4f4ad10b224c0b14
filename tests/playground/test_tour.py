"""playground/tour.ipynb: its cells compile and import what is there; run from end to end, they print what the notebook shows."""

from __future__ import annotations

import ast
import importlib
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "playground" / "tour.ipynb"


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def printed(cell: Any) -> str:
    return "".join("".join(output["text"]) for output in cell["outputs"] if output.get("name") == "stdout")


def kinds(cell: Any) -> list[str]:
    """What a cell shows besides text."""
    return [kind for output in cell["outputs"] for kind in output.get("data", {}) if kind == "image/png"]


def test_cells_compile_and_import_what_is_there() -> None:
    cells = code_cells(json.loads(NOTEBOOK.read_text(encoding="utf-8")))
    tree = ast.parse("\n".join("".join(cell["source"]) for cell in cells))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert len(imports) > 5
    for node in imports:
        module = importlib.import_module(node.module or "")
        assert all(hasattr(module, alias.name) for alias in node.names), node.module


def test_it_is_small_and_was_run_in_order() -> None:
    cells = code_cells(json.loads(NOTEBOOK.read_text(encoding="utf-8")))
    assert NOTEBOOK.stat().st_size < 200_000
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output["output_type"] == "error" or output.get("name") == "stderr" for cell in cells for output in cell["outputs"])


@pytest.mark.slow
def test_it_prints_what_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    shown, ran = (nbformat.read(NOTEBOOK, as_version=4) for _ in range(2))
    nbclient.NotebookClient(ran, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    for before, now in zip(code_cells(shown), code_cells(ran), strict=True):
        assert printed(now) == printed(before)
        assert kinds(now) == kinds(before)
