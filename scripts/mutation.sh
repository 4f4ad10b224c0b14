#!/usr/bin/env bash
# Would the tests notice? Changes one thing at a time in a copy of the code, runs its tests, and says which changes nobody saw.
#
#   bash scripts/mutation.sh [--sample N] [--seed N] [--processes N] FILE... [TEST...]
#   bash scripts/mutation.sh llava/serve/engine/scheduling.py                                    # 12 changes, against tests/serve/engine/test_scheduling.py
#   bash scripts/mutation.sh --sample 0 llava/model/splice.py tests/model/test_llava_arch.py  # all changes, against these tests
#
# FILE   a file of llava/; its tests are those of the same name and place under tests/, unless TEST names others.
# Needs  what scripts/test.sh needs.
# Costs  for each change a run of those tests that reach the changed function, in a process that has torch loaded already: a second or
#        two for most files. --sample (12) changes of each file are drawn by --seed (0); 0 takes all.
# Makes  nothing here: it works in a temporary copy of the tree, with mutmut.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

enter_environment
install_package dev

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
unset PYTHONPATH # the copy is what is to be tested
exec "$python" "$root/scripts/mutation.py" "$@"
