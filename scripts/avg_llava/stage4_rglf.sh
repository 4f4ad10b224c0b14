#!/usr/bin/env bash
# Stage 4, RGLF: the router learns to rank the granularities as the frozen language model's losses rank them.
#
#   DATA_PATH=data/open-llava-next_instruct_mix1M.json IMAGE_FOLDER=data bash scripts/avg_llava/stage4_rglf.sh [flags]
#
# Needs  the model of stage 3, and the rows of stage 3.
# Costs  online, a million rows with a 7B model: up to 9e19 operations, some 210 A100 hours at 40 % of its peak, for every epoch.
#        SCORE=1 spends them once on a file of losses; router epochs then run the tower and the router only. Only the router has
#        optimizer states, so ZERO=2 and even ZERO=none serve where the bf16 weights (14 GB for a 7B) fit one GPU.
# Makes  OUTPUT_DIR: the finished AVG-LLaVA, which loads for inference.
# Knobs  MODEL (checkpoints/stage3-multi-granularity), DATA_PATH (no default), IMAGE_FOLDER (the folder of DATA_PATH),
#        OUTPUT_DIR (checkpoints/stage4-rglf)
#        SCORE=1: score first, all processes together, to SCORES (OUTPUT_DIR-scores.parquet); an interrupted pass resumes
#        SCORES=FILE without SCORE=1: train from this file. Neither: score online, batch by batch
#        MARGIN (1), RANK_LOSS_WEIGHT (1), CE_LOSS_WEIGHT (0.1), FILTERED_TEXT_NUM (32), GRANULARITY_COST_WEIGHT (0)
#        LEARNING_RATE (1e-3), EPOCHS (1), GLOBAL_BATCH (128), BATCH (8), SCORE_BATCH (8), MODEL_MAX_LENGTH (4096), WORKERS (4),
#        SAVE_STEPS (1595)
#        ZERO (3), LAUNCHER, DEVICE, NPROC, NNODES ...: see scripts/avg_llava/lib.sh
set -euo pipefail
# shellcheck source=scripts/avg_llava/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

OUTPUT_DIR=${OUTPUT_DIR:-checkpoints/stage4-rglf}
ZERO=${ZERO:-3} GLOBAL_BATCH=${GLOBAL_BATCH:-128} BATCH=${BATCH:-8}
WORKERS=${WORKERS:-4} SAVE_STEPS=${SAVE_STEPS:-1595}

start_from checkpoints/stage3-multi-granularity stage3_multi_granularity.sh
check_data
check_output "$@"
check_launcher
set_run_flags

offline=()
if [[ ${SCORE:-0} == 1 ]]; then
  SCORES=${SCORES:-$OUTPUT_DIR-scores.parquet}
  score "$@"
elif [[ -n ${SCORES:-} ]]; then
  there_or_stop SCORES "a file of python -m llava.train.score_granularities, or SCORE=1 to make it"
fi
[[ -z ${SCORES:-} ]] || offline=(--granularity_scores "$SCORES")

train rglf \
  --version v1 \
  --tune_router True \
  --router_select True \
  --filtered_text_num "${FILTERED_TEXT_NUM:-32}" \
  --margin "${MARGIN:-1}" \
  --rank_loss_weight "${RANK_LOSS_WEIGHT:-1}" \
  --ce_loss_weight "${CE_LOSS_WEIGHT:-0.1}" \
  --granularity_cost_weight "${GRANULARITY_COST_WEIGHT:-0}" \
  ${offline[@]+"${offline[@]}"} \
  --learning_rate "${LEARNING_RATE:-1e-3}" \
  --group_by_modality_length True \
  "$@"
