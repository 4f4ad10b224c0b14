#!/usr/bin/env bash
# Stage 3, multi-granularity: all but the router is trained to answer from 36, 72, 144, 288 and 576 tokens a view; the loss is their mean.
#
#   DATA_PATH=data/open-llava-next_instruct_mix1M.json IMAGE_FOLDER=data bash scripts/avg_llava/stage3_multi_granularity.sh [flags]
#
# Needs  the model of stage 2 (or a public LLaVA-NeXT: MODEL=Lin-Chen/open-llava-next-vicuna-7b), and the rows of stage 2.
# Costs  a million rows with a 7B model: up to 3.7e20 operations, some 830 A100 hours at 40 % of its peak. Images are encoded once
#        a step. Memory as in stage 2; the five granularities together hold about twice the visual tokens of the finest.
# Makes  OUTPUT_DIR: a model that answers at any of the granularities and loads for inference. Stage 4 starts from it.
# Knobs  MODEL (checkpoints/stage2-instruct), DATA_PATH (no default), IMAGE_FOLDER (the folder of DATA_PATH),
#        OUTPUT_DIR (checkpoints/stage3-multi-granularity), VIS_TOKEN_GRANULARITY (36,72,144,288,576)
#        LEARNING_RATE (1e-5), TOWER_LEARNING_RATE (2e-5), EPOCHS (1), GLOBAL_BATCH (128), BATCH (4), MODEL_MAX_LENGTH (4096),
#        WORKERS (8), SAVE_STEPS (1595)
#        ZERO (3), LAUNCHER, DEVICE, NPROC, NNODES ...: see scripts/avg_llava/lib.sh
set -euo pipefail
# shellcheck source=scripts/avg_llava/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

OUTPUT_DIR=${OUTPUT_DIR:-checkpoints/stage3-multi-granularity}
ZERO=${ZERO:-3} GLOBAL_BATCH=${GLOBAL_BATCH:-128} BATCH=${BATCH:-4}
WORKERS=${WORKERS:-8} SAVE_STEPS=${SAVE_STEPS:-1595}

start_from checkpoints/stage2-instruct stage2_instruct.sh
check_data
check_output "$@"
check_launcher
set_run_flags

train multi_granularity \
  --version v1 \
  --vis_token_granularity "${VIS_TOKEN_GRANULARITY:-36,72,144,288,576}" \
  --unfreeze_mm_vision_tower True \
  --mm_vision_tower_lr "${TOWER_LEARNING_RATE:-2e-5}" \
  --learning_rate "${LEARNING_RATE:-1e-5}" \
  --group_by_modality_length True \
  "$@"
