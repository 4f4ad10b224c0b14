"""Run transformers' own test mixins on the native face beside LlavaNext, and print how many pass: scripts/test_transformers.sh.

Exit status: 0; 1 where something fails that LlavaNext passes and `exceptions.py` does not list, or passes although it is listed; 77 where
transformers' tests cannot be had.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import unittest
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exceptions import EXCEPTIONS
from source import NotFetchedError, enter, find_source

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "playground" / "images" / "scene_pink.png"
NOT_FETCHED = 77
"""As automake's tests say that they were skipped."""
COLUMNS = ("passed", "failed", "skipped")
REFERENCE = "LlavaNext"
MIXINS = ("ModelTesterMixin", "GenerationTesterMixin", "PipelineTesterMixin", "ProcessorTesterMixin")

Results = dict[str, dict[str, str]]
"""By form: the outcome of each test."""


class Outcomes(unittest.TestResult):
    """What became of each test, by name; the traceback of those that failed."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self.tracebacks: dict[str, str] = {}

    def addSuccess(self, test: unittest.TestCase) -> None:
        self.found.setdefault(name_of(test), "passed")

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        self.found.setdefault(name_of(test), "skipped")

    def addFailure(self, test: unittest.TestCase, err: Any) -> None:
        name = name_of(test)
        self.found[name], self.tracebacks[name] = "failed", self._exc_info_to_string(err, test)  # type: ignore[attr-defined]

    addError = addFailure

    def addSubTest(self, test: unittest.TestCase, subtest: unittest.TestCase, err: Any) -> None:
        if err is not None:
            self.addFailure(test, err)


def name_of(test: Any) -> str:
    """The method's name; a subtest is its test's."""
    return str(getattr(getattr(test, "test_case", test), "_testMethodName", test))


def run_case(case: type[unittest.TestCase], pattern: str) -> Outcomes:
    """The outcomes of the tests whose name has the pattern in it; what they print is dropped."""
    outcomes = Outcomes()
    names = [name for name in unittest.TestLoader().getTestCaseNames(case) if pattern in name]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        unittest.TestSuite(map(case, names)).run(outcomes)
    return outcomes


def owners(cases: Sequence[type[unittest.TestCase]]) -> dict[str, str]:
    """The mixin that each test of the cases comes from, the most general one last."""
    classes = {base.__name__: base for case in cases for base in case.__mro__ if base.__name__ in MIXINS}
    order = sorted(classes, key=lambda name: name == "ModelTesterMixin")
    names = {name for case in cases for name in unittest.TestLoader().getTestCaseNames(case)}
    return {name: next(owner for owner in order if hasattr(classes[owner], name)) for name in sorted(names)}


def table(results: Results, owner: Mapping[str, str]) -> list[str]:
    """Lines of a table: for each mixin and form, how many tests passed, failed and were skipped."""
    lines = [f"| {'mixin':22} | {'form':10} | {' | '.join(f'{column:>7}' for column in COLUMNS)} |"]
    lines.append(f"| {'-' * 22} | {'-' * 10} | {' | '.join('-' * 6 + ':' for _ in COLUMNS)} |")
    for mixin in MIXINS:
        for form, found in results.items():
            counts = Counter(outcome for name, outcome in found.items() if owner[name] == mixin)
            if counts:
                lines.append(f"| {mixin:22} | {form:10} | {' | '.join(f'{counts[column]:7}' for column in COLUMNS)} |")
    return lines


def surprises(results: Results) -> list[str]:
    """What is neither as with LlavaNext nor as the exceptions say, a sentence each."""
    found = []
    for form, outcomes in results.items():
        listed = {name for names in EXCEPTIONS.get(form, {}).values() for name in names if name in outcomes}
        short = {name for name, outcome in outcomes.items() if falls_short(outcome, results[REFERENCE].get(name))}
        if form != REFERENCE:
            theirs = results[REFERENCE]
            found += [f"{form}: {name} {outcomes[name]}, where {REFERENCE} {theirs.get(name)}." for name in sorted(short - listed)]
            found += [f"{form}: {name} is as with {REFERENCE}; take it out of exceptions.py." for name in sorted(listed - short)]
    return found


def falls_short(outcome: str, reference: str | None) -> bool:
    """Whether a test did worse than with LlavaNext."""
    return (reference == "passed" and outcome != "passed") or (reference == "skipped" and outcome == "failed")


def exceptions_of(results: Results) -> list[str]:
    """Lines of a list: for each form and reason, the tests."""
    entries = ((form, reason, names) for form in results for reason, names in EXCEPTIONS.get(form, {}).items())
    return [f"- {form}, {len(names)}: {reason}" for form, reason, names in entries]


def run_forms(
    root: Path, tiny: Path, wanted: Sequence[str] | None, pattern: str
) -> tuple[list[type[unittest.TestCase]], Results, dict[str, str]]:
    """The test cases, the outcomes of each form, and the tracebacks by form and test.

    Args:
        root: where transformers' tests are. tiny: an empty folder for models.
    """
    enter(root, SAMPLE)
    import forms

    os.environ[forms.TINY_MODELS] = str(tiny)
    forms.write_summary(tiny)
    forms.prepare_tests()
    cases: list[type[unittest.TestCase]] = []
    results: Results = {}
    tracebacks: dict[str, str] = {}
    for form in forms.FORMS:
        if wanted is not None and form not in (*wanted, REFERENCE):
            continue
        forms.write_tiny_model(form, tiny)
        results[form] = {}
        of_form = [forms.model_case(form, root), *([forms.processor_case(form)] if form in forms.PROCESSORS else [])]
        for case in of_form:
            outcomes = run_case(case, pattern)
            results[form] |= outcomes.found
            tracebacks |= {f"{form}: {name}": text for name, text in outcomes.tracebacks.items()}
        cases += of_form
        print(f"{form}: {Counter(results[form].values())['passed']} passed", file=sys.stderr)
    return cases, results, tracebacks


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--source", type=Path, metavar="DIR", help="a checkout of transformers, in place of fetching its release")
    parser.add_argument("--forms", nargs="+", metavar="FORM", help="which forms, beside LlavaNext; by default all")
    parser.add_argument("-k", dest="pattern", default="", metavar="TEXT", help="only tests with this in their name")
    parser.add_argument("-v", "--verbose", action="store_true", help="print the traceback of what surprises")
    args = parser.parse_args(argv)
    try:
        root = find_source(args.source and args.source.resolve())
    except NotFetchedError as error:
        print(f"skipped: transformers' own tests cannot be had. {error}")
        return NOT_FETCHED
    with tempfile.TemporaryDirectory() as folder:
        cases, results, tracebacks = run_forms(root, Path(folder), args.forms, args.pattern)
    print("\n".join(table(results, owners(cases))))
    if not (root / "tests" / "generation").is_dir():
        print("Generation and pipelines were not tested: they are in transformers' repository alone, which cannot be reached.")
    print("\n".join(["", "Exceptions, see exceptions.py:", *exceptions_of(results), ""]))
    found = surprises(results)
    for line in found:
        print(line)
        if args.verbose:
            print(tracebacks.get(" ".join(line.split()[:2]), ""))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
