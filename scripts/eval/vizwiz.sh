#!/usr/bin/env bash
# VizWiz-VQA: the stock task vizwiz_vqa_val of lmms-eval at a pinned revision of its data.
#
#   MODEL_PATH=zhibinlan/AVG-LLaVA GRANULARITY=auto bash scripts/eval/vizwiz.sh [flags of the harness]
#
# Needs  bash scripts/eval/setup_lmms_eval.sh, once; a network the first time. Knobs: see scripts/eval/lib.sh.
set -euo pipefail
# shellcheck source=scripts/eval/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

benchmark=vizwiz
task=vizwiz_vqa_val
dataset=lmms-lab-encoder/VizWiz-VQA
revision=d428a2dae984f79cf1b9d99467dfa883e0c30686
configs=(default)
split=val
metric=exact_match

run_benchmark "$@"
