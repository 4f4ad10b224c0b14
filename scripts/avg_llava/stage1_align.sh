#!/usr/bin/env bash
# Stage 1, align: the projector learns to map image features into the language model's embedding space. All else is frozen.
#
#   DATA_PATH=data/blip_laion_cc_sbu_558k.json IMAGE_FOLDER=data bash scripts/avg_llava/stage1_align.sh [flags]
#
# Needs  a language model, a CLIP tower, and captions (one image, one answer). docs/Data.md lists the public ones.
# Costs  558,000 rows, a Vicuna 7B and 336 px views: up to 6e19 operations, some 140 A100 hours at 40 % of its peak.
#        ZeRO-2 keeps all weights (14 GB in bf16) on every GPU; there are almost no optimizer states.
# Makes  OUTPUT_DIR: a model that loads for inference, and mm_projector.safetensors, the projector alone. Stage 2 starts from it.
# Knobs  MODEL (lmsys/vicuna-7b-v1.5), VISION_TOWER (openai/clip-vit-large-patch14-336): folders or hub ids
#        DATA_PATH (no default), IMAGE_FOLDER (the folder of DATA_PATH), OUTPUT_DIR (checkpoints/stage1-align)
#        LEARNING_RATE (1e-3), EPOCHS (1), GLOBAL_BATCH (256), BATCH (8), MODEL_MAX_LENGTH (4096), WORKERS (4), SAVE_STEPS (1000)
#        ZERO (2), LAUNCHER, DEVICE, NPROC, NNODES ...: see scripts/avg_llava/lib.sh
set -euo pipefail
# shellcheck source=scripts/avg_llava/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

MODEL=${MODEL:-lmsys/vicuna-7b-v1.5}
VISION_TOWER=${VISION_TOWER:-openai/clip-vit-large-patch14-336}
OUTPUT_DIR=${OUTPUT_DIR:-checkpoints/stage1-align}
ZERO=${ZERO:-2} GLOBAL_BATCH=${GLOBAL_BATCH:-256} BATCH=${BATCH:-8}
WORKERS=${WORKERS:-4} SAVE_STEPS=${SAVE_STEPS:-1000}

model_or_stop MODEL
model_or_stop VISION_TOWER
check_data
check_output "$@"
check_launcher
set_run_flags

train align \
  --version plain \
  --vision_tower "$VISION_TOWER" \
  --mm_vision_select_layer -2 \
  --mm_vision_select_feature patch \
  --mm_projector_type mlp2x_gelu \
  --mm_patch_merge_type spatial_unpad \
  --mm_use_im_start_end False \
  --mm_use_im_patch_token False \
  --image_aspect_ratio anyres \
  --image_grid_pinpoints "[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]" \
  --learning_rate "${LEARNING_RATE:-1e-3}" \
  "$@"
