#!/usr/bin/env bash
# DocVQA: the stock task docvqa_val of lmms-eval at a pinned revision of its data.
#
#   MODEL_PATH=zhibinlan/AVG-LLaVA GRANULARITY=auto bash scripts/eval/docvqa.sh [flags of the harness]
#
# Needs  bash scripts/eval/setup_lmms_eval.sh, once; a network the first time. Knobs: see scripts/eval/lib.sh.
set -euo pipefail
# shellcheck source=scripts/eval/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

benchmark=docvqa
task=docvqa_val
dataset=lmms-lab-encoder/DocVQA
revision=539088ef8a8ada01ac8e2e6d4e372586748a265e
configs=(DocVQA)
split=validation
metric=anls

run_benchmark "$@"
