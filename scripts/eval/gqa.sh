#!/usr/bin/env bash
# GQA: the stock task gqa of lmms-eval at a pinned revision of its data.
#
#   MODEL_PATH=zhibinlan/AVG-LLaVA GRANULARITY=auto bash scripts/eval/gqa.sh [flags of the harness]
#
# Needs  bash scripts/eval/setup_lmms_eval.sh, once; a network the first time. Knobs: see scripts/eval/lib.sh.
set -euo pipefail
# shellcheck source=scripts/eval/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

benchmark=gqa
task=gqa
dataset=lmms-lab-encoder/GQA
revision=a6e72d6e1b912da88af8b2f9eba05d5ea8ec2dd8
configs=(testdev_balanced_instructions testdev_balanced_images)
split=testdev
metric=exact_match

run_benchmark "$@"
