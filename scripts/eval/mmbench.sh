#!/usr/bin/env bash
# MMBench (English): the stock task mmbench_en_dev_static of lmms-eval at a pinned revision of its data.
#
#   MODEL_PATH=zhibinlan/AVG-LLaVA GRANULARITY=auto bash scripts/eval/mmbench.sh [flags of the harness]
#
# Needs  bash scripts/eval/setup_lmms_eval.sh, once; a network the first time. Knobs: see scripts/eval/lib.sh.
# mmbench_en_dev, whose score is the same rule but asks an OpenAI model where an answer names no option, needs a key; this one reads
# such answers by rules and needs none.
set -euo pipefail
# shellcheck source=scripts/eval/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

benchmark=mmbench
task=mmbench_en_dev_static
dataset=lmms-lab-encoder/MMBench
revision=56ba1af8954932c4804bd3f522e05ed96e63b654
configs=(en)
split=dev
metric=gpt_eval_score

run_benchmark "$@"
