#!/usr/bin/env bash
# MMMU: the stock task mmmu_val of lmms-eval at a pinned revision of its data.
#
#   MODEL_PATH=zhibinlan/AVG-LLaVA GRANULARITY=auto bash scripts/eval/mmmu.sh [flags of the harness]
#
# Needs  bash scripts/eval/setup_lmms_eval.sh, once; a network the first time. Knobs: see scripts/eval/lib.sh.
set -euo pipefail
# shellcheck source=scripts/eval/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

benchmark=mmmu
task=mmmu_val
dataset=lmms-lab-encoder/MMMU
revision=364f2e2eb107b36e07ff4c5a15f5947a759cef47
configs=(default)
split=validation
metric=mmmu_acc

run_benchmark "$@"
