#!/usr/bin/env bash
# ChartQA: the stock task chartqa of lmms-eval at a pinned revision of its data.
#
#   MODEL_PATH=zhibinlan/AVG-LLaVA GRANULARITY=auto bash scripts/eval/chartqa.sh [flags of the harness]
#
# Needs  bash scripts/eval/setup_lmms_eval.sh, once; a network the first time. Knobs: see scripts/eval/lib.sh.
set -euo pipefail
# shellcheck source=scripts/eval/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

benchmark=chartqa
task=chartqa
dataset=lmms-lab-encoder/ChartQA
revision=9e63b7df1592a1c2158e735cc1725454aef0d6d9
configs=(default)
split=test
metric=relaxed_overall

run_benchmark "$@"
