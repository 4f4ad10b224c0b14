#!/usr/bin/env bash
# Every check a reviewer would run: ruff, mypy, import-linter, pytest.
#
#   bash scripts/test.sh [--slow] [arguments of pytest]
#
# Needs  Python 3.10 to 3.13, and a network or local package files for the first run. No GPU; the tests themselves use no network.
# Costs  first run: about 2.5 GB of disk with a CPU build of torch, and a few minutes of downloads; the checks take a few minutes
#        on two cores. --slow adds the tests that take more than half a minute each.
# Makes  .venv in the repository, unless a virtual environment is active. Safe to run again.
# Knobs  PYTEST_WORKERS (2): test processes; OMP_NUM_THREADS (1): threads of each, see below.
#        PYTHON, TORCH_VERSION, TORCH_INSTALL_ARGS, REINSTALL: see scripts/lib.sh.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

selection=(-m "not slow")
if [[ ${1:-} == --slow ]]; then
  selection=(-m "slow or not slow")
  shift
fi

enter_environment
install_package dev
cd "$root"

# The models under test are tiny: a second thread only waits for the first, while a second process halves the time.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
# A test that reaches for a hub fails at once instead of waiting for a network.
export HF_HUB_OFFLINE=1

say "ruff"
"$python" -m ruff check

say "mypy"
"$python" -m mypy

say "import-linter"
"${python%/*}/lint-imports" --no-cache

say "pytest"
"$python" -m pytest -n "${PYTEST_WORKERS:-2}" "${selection[@]}" "$@"
