#!/usr/bin/env bash
# From a fresh clone to answered questions: installs what is missing, then asks the shipped micro model about one image.
#
#   bash scripts/quickstart.sh [options of scripts/quickstart.py]
#
# Needs  Python 3.10 to 3.13, and a network or local package files for the first run. No GPU, no model download.
# Costs  first run: about 1.5 GB of disk with a CPU build of torch (a CUDA build takes several more) and a few minutes, most of it
#        downloading; later runs: seconds.
# Makes  .venv in the repository, unless a virtual environment is active. Safe to run again.
# Knobs  PYTHON, TORCH_VERSION, TORCH_INSTALL_ARGS, REINSTALL: see scripts/lib.sh.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

enter_environment
install_package core

say "Asking the micro model"
exec "$python" "$root/scripts/quickstart.py" "$@"
