#!/usr/bin/env bash
# AI2D: the stock task ai2d of lmms-eval at a pinned revision of its data.
#
#   MODEL_PATH=zhibinlan/AVG-LLaVA GRANULARITY=auto bash scripts/eval/ai2d.sh [flags of the harness]
#
# Needs  bash scripts/eval/setup_lmms_eval.sh, once; a network the first time. Knobs: see scripts/eval/lib.sh.
set -euo pipefail
# shellcheck source=scripts/eval/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

benchmark=ai2d
task=ai2d
dataset=lmms-lab-encoder/ai2d
revision=c83a9b9692933aff8349157c88a413df9d02c4e5
configs=(default)
split=test
metric=exact_match

run_benchmark "$@"
