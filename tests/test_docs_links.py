"""Links between the repository's pages lead somewhere, to the heading where they name one, and files that pages name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SEARCHED = ("", "docs", "playground", "lmms-eval", "tests/oracle")
PAGES = sorted(page for folder in SEARCHED for page in (ROOT / folder).glob("*.md"))
FOLDERS = ("scripts", "playground", "tests", "docs", "deploy", "lmms-eval")


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What the headings of a page are called in its address, by GitHub's rule; two of one name would be told apart by numbers."""
    titles = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    names = [re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles]
    assert len(set(names)) == len(names), f"{page.name} has two headings of one name"
    return set(names)


def targets(page: Path) -> list[str]:
    """Where a page's links and images lead, within the repository."""
    found = re.findall(r"\]\(([^()\s]+)\)", prose(page)) + re.findall(r'(?:src|href)="([^"]+)"', prose(page))
    return [target for target in found if not target.startswith(("https://", "http://", "mailto:"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in targets(page):
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


def test_a_link_to_a_missing_heading_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One's own (heading)\n\n[a](#ones-own-heading) [b](#two)\n\n```\n# no heading, [c](no.md)\n```\n", encoding="utf-8")
    assert anchors(page) == {"ones-own-heading"}
    assert targets(page) == ["#ones-own-heading", "#two"]


@pytest.mark.parametrize("name", ["flow.md", "Extending.md"])
def test_names_of_the_code_exist(name: str) -> None:
    """Constants, classes and functions that these pages send a reader to."""
    files = [*(ROOT / "llava").rglob("*.py"), *(ROOT / "scripts").rglob("*.sh")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in files)
    named = re.findall(r"`(_?[A-Za-z]+(?:_[A-Za-z]+)+|[A-Z][a-z]+[A-Z]\w*)`", (ROOT / "docs" / name).read_text(encoding="utf-8"))
    assert len(set(named)) >= 5
    assert [word for word in named if not re.search(rf"\b{word}\b", code)] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page: Path) -> None:
    """The changelog is left out: it speaks of files as they were. LLaVA's data sets have folders below `llava/` too."""
    named = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*\w/?|llava/[\w./-]*(?:\.py|/))`", page.read_text(encoding="utf-8"))
    assert [path for path in named if not (ROOT / path).exists()] == []
