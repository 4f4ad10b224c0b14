#!/usr/bin/env bash
# Stage 2, instruct: language model, projector and vision tower learn to follow instructions about images, at full granularity.
#
#   DATA_PATH=data/open-llava-next_instruct_mix1M.json IMAGE_FOLDER=data bash scripts/avg_llava/stage2_instruct.sh [flags]
#
# Needs  the model of stage 1, and conversations. docs/Data.md lists the public mixture.
# Costs  a million rows with a 7B model: up to 1.7e20 operations, some 370 A100 hours at 40 % of its peak.
#        Weights, gradients and optimizer states take 16 bytes a parameter, 113 GB for a 7B. ZeRO-2 keeps the weights on every GPU
#        and divides the rest; ZERO=3 divides all of it; ZERO=3_offload keeps it in the hosts' memory.
# Makes  OUTPUT_DIR: a LLaVA-NeXT, which loads for inference. Stage 3 starts from it.
# Knobs  MODEL (checkpoints/stage1-align), or with a projector trained elsewhere MODEL, VISION_TOWER and PROJECTOR
#        DATA_PATH (no default), IMAGE_FOLDER (the folder of DATA_PATH), OUTPUT_DIR (checkpoints/stage2-instruct)
#        LEARNING_RATE (2e-5), TOWER_LEARNING_RATE (2e-6), EPOCHS (1), GLOBAL_BATCH (128), BATCH (4), MODEL_MAX_LENGTH (4096),
#        WORKERS (4), SAVE_STEPS (1000)
#        ZERO (2), LAUNCHER, DEVICE, NPROC, NNODES ...: see scripts/avg_llava/lib.sh
set -euo pipefail
# shellcheck source=scripts/avg_llava/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

OUTPUT_DIR=${OUTPUT_DIR:-checkpoints/stage2-instruct}
ZERO=${ZERO:-2} GLOBAL_BATCH=${GLOBAL_BATCH:-128} BATCH=${BATCH:-4}
WORKERS=${WORKERS:-4} SAVE_STEPS=${SAVE_STEPS:-1000}

start_from checkpoints/stage1-align stage1_align.sh
new_model=()
if [[ -n ${PROJECTOR:-} ]]; then
  # A plain language model and a projector that lies alone: what stage 1 says about the new model must be said again.
  there_or_stop PROJECTOR "mm_projector.safetensors or the folder that holds it"
  VISION_TOWER=${VISION_TOWER:-openai/clip-vit-large-patch14-336}
  model_or_stop VISION_TOWER
  new_model=(--pretrain_mm_mlp_adapter "$PROJECTOR" --vision_tower "$VISION_TOWER" --mm_vision_select_layer -2
    --mm_vision_select_feature patch --mm_projector_type mlp2x_gelu --mm_patch_merge_type spatial_unpad --image_aspect_ratio anyres
    --image_grid_pinpoints "[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]")
fi
check_data
check_output "$@"
check_launcher
set_run_flags

train instruct \
  --version v1 \
  ${new_model[@]+"${new_model[@]}"} \
  --unfreeze_mm_vision_tower True \
  --mm_vision_tower_lr "${TOWER_LEARNING_RATE:-2e-6}" \
  --learning_rate "${LEARNING_RATE:-2e-5}" \
  --group_by_modality_length True \
  "$@"
