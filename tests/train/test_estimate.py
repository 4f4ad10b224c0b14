"""`python -m llava.train.estimate`: tables on standard output, numbers in a file, one sentence about flags that cannot work."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from llava.train.estimate import main
from llava.train.flags import ZERO_SETTINGS

MICRO = Path(__file__).parents[2] / "playground" / "avg-llava-micro"


def test_command_line_writes_tables_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "estimate.json"
    command = ["estimate", "--model_name_or_path", str(MICRO), "--stage", "rglf", "--image_size", "128x64", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", command)
    assert main() == 0
    text = capsys.readouterr().out
    assert "Image 128x64 (3 views)" in text and "computed from shapes, not measured" in text
    assert all(f"ZeRO {name}" in text for name in ZERO_SETTINGS) and "rglf, scored before" in text
    stored = json.loads(file.read_text())
    assert stored["settings"]["image_size"] == [128, 64] and set(stored["memory"]) == set(ZERO_SETTINGS)
    assert [line["tokens_per_view"] for line in stored["granularities"]] == [4, 8, 16, 32, 64]
    online, offline = (stored["operations"][name] for name in ("rglf", "rglf, scored before"))
    assert online["total"] - offline["total"] == online["language"] > 0 < offline["router"]
    monkeypatch.setattr(sys, "argv", ["estimate", "--preset", "vicuna"])
    with pytest.raises(SystemExit, match="estimate stopped: (?s:.*)--preset is 'vicuna'; choose one of vicuna-7b"):
        main()
