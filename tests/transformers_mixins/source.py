"""transformers' own tests, as its release has them: fetched once into a cache, and imported as the package `tests`."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
import types
from collections.abc import Sequence
from pathlib import Path

import transformers

REPOSITORY = "https://github.com/huggingface/transformers"
PARTS = ("tests", "utils")
"""Folders of the repository that are needed."""
GENERATION = "tests/generation/test_utils.py"
"""In the repository, not in the source package."""
COMMON = "tests/test_modeling_common.py"
"""In both."""


class NotFetchedError(Exception):
    """No network, or no such release in it."""


def find_source(given: Path | None) -> Path:
    """A folder with transformers' `tests/`: the given one, or that of the installed release, from the cache or fetched into it.

    Args:
        given: a checkout of transformers.

    Raises:
        NotFetchedError: neither the repository nor the source package can be had.
    """
    if given is not None:
        if not (given / COMMON).is_file():
            raise NotFetchedError(f"{given} has no {COMMON}; give a checkout of transformers")
        return given
    version = transformers.__version__
    caches = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "avg-llava"
    folder = caches / f"transformers-{version}"
    if (folder / GENERATION).is_file():
        return folder
    caches.mkdir(parents=True, exist_ok=True)
    try:
        return _keep(caches, folder, lambda staging: _clone(staging, f"v{version}"))
    except (subprocess.SubprocessError, OSError) as error:
        reason = _last_line(error)
    if (folder / COMMON).is_file():
        return folder
    try:
        return _keep(caches, folder, lambda staging: _unpack(staging, version))
    except (subprocess.SubprocessError, OSError) as error:
        raise NotFetchedError(f"transformers {version}: {REPOSITORY}: {reason}; its source package: {_last_line(error)}") from error


def _keep(caches: Path, folder: Path, fetch) -> Path:  # type: ignore[no-untyped-def]
    """Fetch into a folder beside the final one, which appears whole."""
    with tempfile.TemporaryDirectory(dir=caches) as staging:
        fetched = fetch(Path(staging))
        if folder.exists():  # the source package's, which the repository's replaces
            folder.rename(Path(staging) / "former")
        fetched.rename(folder)
    return folder


def _clone(staging: Path, tag: str) -> Path:
    target = staging / "repository"
    options = ["--quiet", "--depth", "1", "--filter", "blob:none", "--sparse", "--branch", tag]
    _run(["git", "clone", *options, REPOSITORY, str(target)])
    _run(["git", "-C", str(target), "sparse-checkout", "set", *PARTS])
    return target


def _unpack(staging: Path, version: str) -> Path:
    """What the source package has of them: the common mixins, without those of generation."""
    options = ["--quiet", "--no-deps", "--no-binary", "transformers", "--no-build-isolation", "--dest", str(staging)]
    _run([sys.executable, "-m", "pip", "download", *options, f"transformers=={version}"])
    (archive,) = staging.glob("transformers-*.tar.gz")
    with tarfile.open(archive) as package:
        members = [member for member in package.getmembers() if "/tests/" in member.name]
        package.extractall(staging, members=members, filter="data")
    root = staging / f"transformers-{version}"
    (root / "tests" / "__init__.py").touch()  # left out there, and without it another package of the name would go first
    return root


def _run(command: Sequence[str]) -> None:
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=300, env=environment)


def _last_line(error: Exception) -> str:
    """What a command said of its failure."""
    said = str(getattr(error, "stderr", None) or error).strip().splitlines()
    return said[-1] if said else type(error).__name__


class MissingModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules of `tests` that a source package leaves out: every name in them is an empty class, so that what inherits it can be read."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith("tests."):
            return None
        return importlib.util.spec_from_loader(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class _Empty(types.ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {})
        setattr(self, name, made)
        return made


def enter(root: Path, sample: Path) -> None:
    """Make a fetched folder's `tests` importable, in place of any other of that name.

    Args:
        sample: an image on the disk, for those that the tests would download.
    """
    sys.path.insert(0, str(root))
    sys.meta_path.append(MissingModules())
    os.chdir(root)
    local = types.ModuleType("fetch_hub_objects_for_ci")
    local.url_to_local_path = lambda url: str(sample)  # type: ignore[attr-defined]
    sys.modules[local.__name__] = local
    package = root / "src" / "transformers"
    if not package.exists():
        package.parent.mkdir(exist_ok=True)
        package.symlink_to(Path(transformers.__file__).parent)
