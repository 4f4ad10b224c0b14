#!/usr/bin/env bash
# POPE: the stock task pope of lmms-eval at a pinned revision of its data.
#
#   MODEL_PATH=zhibinlan/AVG-LLaVA GRANULARITY=auto bash scripts/eval/pope.sh [flags of the harness]
#
# Needs  bash scripts/eval/setup_lmms_eval.sh, once; a network the first time. Knobs: see scripts/eval/lib.sh.
set -euo pipefail
# shellcheck source=scripts/eval/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

benchmark=pope
task=pope
dataset=lmms-lab-encoder/POPE
revision=4db1276663dfa5eb8ad16a52d24c31a09e470896
configs=(default)
split=test
metric=pope_f1_score

run_benchmark "$@"
