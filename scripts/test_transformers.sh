#!/usr/bin/env bash
# transformers' own test mixins (models, generation, pipelines, processors) on the native face, beside LlavaNext in the same run.
#
#   bash scripts/test_transformers.sh [--source DIR] [--forms FORM ...] [-k TEXT] [-v]
#
# Needs  the environment of scripts/test.sh, which it makes where it is missing; for the first run git and a way to github.com, whence the
#        tests of the installed release are cloned into ~/.cache/avg-llava. Without that way, what the release's source package holds is
#        taken (no tests of generation and pipelines); without either, it says so in one line and ends with status 77.
# Costs  about a minute on one core; 100 MB in the cache.
# Prints a table of passed, failed and skipped by mixin and form, and what is neither as with LlavaNext nor listed with its reason in
#        tests/transformers_mixins/exceptions.py; ends with 1 where there is any.
# Knobs  --source: a checkout of transformers in place of the clone. --forms: some of the forms in tests/transformers_mixins/forms.py.
#        -k: tests with a text in their name. -v: tracebacks. PYTHON, TORCH_VERSION, REINSTALL: see scripts/lib.sh.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

enter_environment
install_package dev
cd "$root"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PYTHONPATH=$root
"$python" tests/transformers_mixins/run.py "$@"
