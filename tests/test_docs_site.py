"""The documentation's site: every page has its place in it, and it builds, without a broken link and without anything from elsewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_every_page_has_its_place() -> None:
    places = re.findall(r"^ +- .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(places) == len(set(places))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} <= set(places)
    assert [place for place in places if not (ROOT / "docs" / place).is_file() and not (ROOT / place).is_file()] == []


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "GranularityRouter" in (tmp_path / "python" / "llava.model.router.html").read_text(encoding="utf-8")
    loaded = r'<(?:script|img|link rel="(?:stylesheet|icon|preconnect)")[^>]*(?:src|href)="(?:https?:)?//[^"]*"'
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 100
    assert {found for page in pages for found in re.findall(loaded, page.read_text(encoding="utf-8"))} == set()
