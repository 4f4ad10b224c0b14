"""Samples mutants of some files with mutmut and lists those that no test noticed; see scripts/mutation.sh."""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIED = ("killed", "timeout", "segfault")
"""What mutmut calls mutants that made their tests fail, hang or crash."""


def mirrored_test(file: str) -> str:
    """The tests of a file of the package: `tests/serve/test_x.py` for `llava/serve/x.py`.

    Raises:
        SystemExit: there is no such file.
    """
    path = Path(file)
    test = Path("tests", *path.parts[1:-1], f"test_{path.name}")
    if not (ROOT / test).is_file():
        raise SystemExit(f"{file} has no {test}; name the tests to run behind it.")
    return str(test)


def copy_tree(target: Path) -> None:
    """Copy what git tracks, and what it would, into an empty folder."""
    listed = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


@contextmanager
def log_on_failure() -> Iterator[None]:
    """Keep mutmut's spinners and the tests' output back, unless the run itself fails. They go around `sys.stdout`, hence the descriptor."""
    sys.stdout.flush()
    own = os.dup(1)
    with open("mutation.log", "wb") as log:
        os.dup2(log.fileno(), 1)
    try:
        yield
    except BaseException:
        lines = Path("mutation.log").read_text(errors="replace").splitlines()
        os.write(own, "\n".join(line for line in lines if not line.startswith(tuple("⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"))).encode())
        raise
    finally:
        sys.stdout.flush()
        os.dup2(own, 1)
        os.close(own)


def sampled(file: str, size: int, seed: int) -> list[str]:
    """Names of so many of a file's mutants, in random order; of all of them where `size` is 0."""
    from mutmut.mutation.file_mutation import mutate_file_contents
    from mutmut.utils.format_utils import get_mutant_name

    names = [get_mutant_name(Path(file), name) for name in mutate_file_contents(file, Path(file).read_text()).mutant_names]
    return random.Random(f"{seed} {file}").sample(names, min(size or len(names), len(names)))


def run(files: Sequence[str], tests: Sequence[str], size: int, seed: int, processes: int) -> int:
    """Run a sample in the current folder, which is a copy of the repository. Returns how many mutants lived."""
    from mutmut.__main__ import cli
    from mutmut.configuration import config
    from mutmut.mutation.data import SourceFileMutationData
    from mutmut.mutation.diff_apply import get_diff_for_mutant
    from mutmut.stats import status_by_exit_code

    settings = config()
    settings.only_mutate = list(files)
    settings.pytest_add_cli_args_test_selection = list(tests)
    settings.also_copy = [Path(name) for name in os.listdir() if name not in ("llava", "mutants")]
    names = {file: sampled(file, size, seed) for file in files}
    with log_on_failure():
        cli(["run", "--max-children", str(processes), *(name for sample in names.values() for name in sample)], standalone_mode=False)
    lived: list[tuple[str, str]] = []
    lines = []
    for file, sample in names.items():
        found = SourceFileMutationData(path=Path(file))
        found.load()
        status = {name: status_by_exit_code[found.exit_code_by_key[name]] for name in sample}
        counts = Counter(status.values())
        lived += [(name, status[name]) for name in sample if status[name] not in DIED]
        of = len(found.exit_code_by_key)
        died = sum(counts[each] for each in DIED)
        lines.append(f"{file}: of {len(sample)} sampled mutants (of {of}) {died} died; {dict(sorted(counts.items()))}")
    for name, end in lived:
        print(f"\n{end}: {name}\n{get_diff_for_mutant(name)}")
    print("\n" + "\n".join(lines))
    return len(lived)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="+", metavar="FILE", help="files of llava/, and tests to run instead of the mirrored ones")
    parser.add_argument("--sample", type=int, default=12, help="mutants of each file; 0 for all")
    parser.add_argument("--seed", type=int, default=0, help="draws another sample")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    paths = [os.path.relpath(path, ROOT) for path in args.paths]
    files = [path for path in paths if path.startswith("llava/")]
    tests = [path for path in paths if path.startswith("tests/")] or [mirrored_test(file) for file in files]
    missing = [path for path in paths if not (ROOT / path.split("::")[0]).exists() or not path.startswith(("llava/", "tests/"))]
    if missing or not files:
        parser.error(f"expected files of llava/, and perhaps of tests/, but got {' '.join(missing or paths)}")
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        copy_tree(Path(folder))
        os.chdir(folder)
        try:
            return min(run(files, tests, args.sample, args.seed, args.processes), 1)
        finally:
            os.chdir(ROOT)


if __name__ == "__main__":
    sys.exit(main())
