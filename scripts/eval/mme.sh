#!/usr/bin/env bash
# MME: the stock task mme of lmms-eval at a pinned revision of its data.
#
#   MODEL_PATH=zhibinlan/AVG-LLaVA GRANULARITY=auto bash scripts/eval/mme.sh [flags of the harness]
#
# Needs  bash scripts/eval/setup_lmms_eval.sh, once; a network the first time. Knobs: see scripts/eval/lib.sh.
set -euo pipefail
# shellcheck source=scripts/eval/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

benchmark=mme
task=mme
dataset=lmms-lab-encoder/MME
revision=d6c9023f017b564f7b3ccccf5348166bce8fdbcd
configs=(default)
split=test
metric=mme_perception_score

run_benchmark "$@"
