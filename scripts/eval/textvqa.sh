#!/usr/bin/env bash
# TextVQA: the stock task textvqa_val of lmms-eval at a pinned revision of its data.
#
#   MODEL_PATH=zhibinlan/AVG-LLaVA GRANULARITY=auto bash scripts/eval/textvqa.sh [flags of the harness]
#
# Needs  bash scripts/eval/setup_lmms_eval.sh, once; a network the first time. Knobs: see scripts/eval/lib.sh.
set -euo pipefail
# shellcheck source=scripts/eval/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

benchmark=textvqa
task=textvqa_val
dataset=lmms-lab-encoder/textvqa
revision=9c0699cd19768ac5ab97568f6b3cbac4c0062884
configs=(default)
split=validation
metric=exact_match

run_benchmark "$@"
