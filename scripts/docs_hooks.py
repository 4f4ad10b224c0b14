"""What `mkdocs.yml` cannot say: pages that lie outside of docs/, links to them, and a page for each module of the package."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = (
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "playground/README.md",
    "playground/results/ablations.md",
    "playground/results/results.md",
    "playground/results/results.png",
    "lmms-eval/README.md",
    "tests/oracle/README.md",
)
"""Files of the repository that are part of the site under their own paths."""
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^()\s]+)\)")


def modules() -> list[str]:
    """The names of the package's public modules."""
    paths = (path.relative_to(ROOT).with_suffix("") for path in sorted((ROOT / "llava").rglob("*.py")))
    return [".".join(path.parts) for path in paths if not path.name.startswith("_")]


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the modules to the navigation, package by package."""
    packages: dict[str, list[str]] = {}
    for module in modules():
        packages.setdefault(module.rpartition(".")[0], []).append(f"python/{module}.md")
    assert config.nav is not None
    config.nav.append({"Python": [{package: pages} for package, pages in sorted(packages.items())]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that do not lie in docs/."""
    for name in OUTSIDE:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    for module in modules():
        content = f"---\ntitle: {module.rpartition('.')[2]}\n---\n\n::: {module}\n"
        files.append(File.generated(config, f"python/{module}.md", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, files: Files, **kwargs: Any) -> str:
    """Make links follow where pages lie in the site; files that are no part of it are named instead of linked."""
    if page.file.src_uri.startswith("python/"):
        return markdown
    inside = page.file.src_uri in OUTSIDE
    folder = (ROOT / ("" if inside else "docs") / page.file.src_uri).parent

    def follow(found: re.Match[str]) -> str:
        mark, text, target = found.groups()
        name, hash_sign, anchor = target.partition("#")
        if not name or ":" in name:
            return found[0]
        path = PurePosixPath(os.path.relpath(folder / name, ROOT))
        uri = str(path).removeprefix("docs/")
        if files.get_file_from_path(uri) is None:
            return text if text == f"`{path}`" else f"{text} (`{path}`)"
        return f"{mark}[{text}]({os.path.relpath(uri, PurePosixPath(page.file.src_uri).parent)}{hash_sign}{anchor})"

    return LINK.sub(follow, markdown)
