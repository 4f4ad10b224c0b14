#!/usr/bin/env bash
# The micro model from nothing: world, three warm-ups, the four stages by scripts/avg_llava, three router seeds, the table and its plots.
#
#   bash playground/train_micro.sh [OUTPUT]          (default: playground/build)
#
# Needs  the package with its extras: pip install -e ".[playground]", and no GPU.
# Costs  two CPU cores for about two hours (its parts took 130 minutes when run one by one, most beside other work), and half a GB of disk.
# Again  a step whose result exists is skipped, so an interrupted run resumes; the warm-ups resume within a step.
# Ships  COPY=1 copies the finished checkpoint to playground/avg-llava-micro and the results to playground/results.
#
# The warm-ups stand for what CLIP and Vicuna bring to the real model: a vision tower that knows what it sees, a language model that can
# read notes and answer, and a common code between the two. The tower stays frozen afterwards: its features are settled so that pooling
# loses order and place (see pretrain_vision.py), further training would pack them into the pooled tokens, and frozen features are
# computed once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=${1:-playground/build}
threads=${THREADS:-2}
data=$out/data
scale=${SCALE:-1} # SCALE=0.01 is a quick trial of every step
export OMP_NUM_THREADS=$threads OMP_WAIT_POLICY=passive TOKENIZERS_PARALLELISM=false
export LAUNCHER=python DEVICE=cpu ZERO=none WORKERS=0 MODEL_MAX_LENGTH=2048 IMAGE_FOLDER=$data # read by scripts/avg_llava

say() { printf '\n== %s\n' "$*"; }
steps() { python -c "print(max(2, round($1 * $scale)))"; }

say "World"
[[ -e $data/.done ]] || {
  python -m playground.make_data --output "$data" --scenes "$(steps 8000)" --pairs "$(steps 1000)" --miniatures "$(steps 1000)" \
    --stage4 "$(steps 400)" --validation "$(steps 200)" --test "$(steps 400)"
  touch "$data/.done"
}

shape=(--mm_projector_type mlp2x_gelu --mm_vision_select_layer -1 --image_aspect_ratio anyres --vis_token_granularity 4,8,16,32,64
  --image_grid_pinpoints "[[64,64],[64,128],[128,64],[128,128],[192,64],[64,192]]")

say "Warm-up of the vision tower"
[[ -e $out/vision/preprocessor_config.json ]] ||
  python -m playground.pretrain_vision --output "$out/vision" --threads "$threads" --steps "$(steps 4000)" --settle-steps "$(steps 700)"

say "Warm-up of the language model"
[[ -e $out/language/model.safetensors ]] ||
  python -m playground.pretrain_language --output "$out/language" --threads "$threads" --steps "$(steps 1000)"

say "Warm-up of both: a common code"
[[ -e $out/reader/model.safetensors ]] ||
  python -m playground.pretrain_reader --language "$out/language" --vision "$out/vision" --output "$out/reader" --threads "$threads" \
    --steps "$(steps 500)" --projector-steps "$(steps 300)" "${shape[@]}"

common=(--cache_image_features_gb 6 --adam_beta2 0.98 --gradient_checkpointing False --save_strategy no --report_to none
  --logging_steps 20)

# stage SCRIPT NAME FROM ROWS STEPS BATCH RATE [FLAGS]: one training run by its script, unless its result is there.
stage() {
  local script=$1 name=$2 from=$3 rows=$4 count=$5 batch=$6 rate=$7
  shift 7
  [[ -e $out/$name/trainer_state.json ]] && return
  MODEL=$out/$from DATA_PATH=$data/$rows.json OUTPUT_DIR=$out/$name GLOBAL_BATCH=$batch BATCH=$batch LEARNING_RATE=$rate OVERWRITE=1 \
    bash "scripts/avg_llava/$script.sh" --max_steps "$(steps "$count")" "${common[@]}" "$@"
}
frozen=(--unfreeze_mm_vision_tower False)

VISION_TOWER=$out/vision stage stage1_align stage1 reader stage1 150 16 1e-3 --pretrain_mm_mlp_adapter "$out/reader" "${shape[@]}"
stage stage2_instruct stage2 stage1 instruct 400 16 1e-3 "${frozen[@]}"
stage stage3_multi_granularity stage3 stage2 instruct 400 8 1e-3 "${frozen[@]}" --vis_token_granularity 4,8,16,32,64

# route NAME SEED [FLAGS]: one router. The first run scores every row at every granularity; the language model never runs again.
route() {
  local name=$1 seed=$2
  shift 2
  SCORE=1 SCORES=$out/scores.parquet SCORE_BATCH=16 FILTERED_TEXT_NUM=${TEXT:-32} \
    stage stage4_rglf "$name-$seed" stage3 stage4 900 32 3e-3 --router_hidden_size 32 --router_dropout 0.0 --seed "$seed" "$@"
}
cost=(--granularity_cost_weight "${COST:-0.01}")
for seed in 0 1 2; do
  route cost-aware "$seed" --router_attention_axis "${AXIS:-views}" "${cost[@]}"
  route paper-loss "$seed" --router_attention_axis "${AXIS:-views}"
done
route other-axis 0 --router_attention_axis "${OTHER_AXIS:-tokens}" "${cost[@]}"
TEXT=0 route no-instruction 0 --router_attention_axis "${AXIS:-views}" "${cost[@]}" --router_without_instruction True

say "Table"
[[ -e $out/records.json ]] || python -m playground.evaluate answer --model "$out/stage3" --questions "$data/test.jsonl" --output "$out/records.json"
seeds() { printf '%s=%s-0,%s-1,%s-2' "$1" "$out/$2" "$out/$2" "$out/$2"; }
python -m playground.evaluate table --records "$out/records.json" --questions "$data/test.jsonl" --output "$out/results" \
  --router "$(seeds "adaptive, cost-aware" cost-aware)" --router "$(seeds "adaptive, the paper's loss" paper-loss)" \
  --router "adaptive, other attention axis=$out/other-axis-0" --router "control: no instruction=$out/no-instruction-0"
python -m playground.evaluate time --model "$out/cost-aware-0" --questions "$data/test.jsonl" --output "$out/results/timing.json"
cat "$out/results/results.md" "$out/results/timing.json"

if [[ ${COPY:-0} == 1 ]]; then
  say "Copying to playground/avg-llava-micro and playground/results"
  python -m playground.ship "$out/cost-aware-0" playground/avg-llava-micro
  cp -r "$out/results" playground/
fi
