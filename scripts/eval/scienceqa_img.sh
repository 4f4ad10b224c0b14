#!/usr/bin/env bash
# ScienceQA, questions with an image: the stock task scienceqa_img of lmms-eval at a pinned revision of its data.
#
#   MODEL_PATH=zhibinlan/AVG-LLaVA GRANULARITY=auto bash scripts/eval/scienceqa_img.sh [flags of the harness]
#
# Needs  bash scripts/eval/setup_lmms_eval.sh, once; a network the first time. Knobs: see scripts/eval/lib.sh.
set -euo pipefail
# shellcheck source=scripts/eval/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

benchmark=scienceqa_img
task=scienceqa_img
dataset=lmms-lab-encoder/ScienceQA
revision=69dd4d6b67373d38f96a5badd5d24d0eb5bcdc50
configs=(ScienceQA-IMG)
split=test
metric=exact_match

run_benchmark "$@"
