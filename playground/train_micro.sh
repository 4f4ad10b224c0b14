#!/usr/bin/env bash
# The micro model from nothing: world, two warm-ups, the four stages, three router seeds, the table and its plots.
#
#   bash playground/train_micro.sh [OUTPUT]          (default: playground/build)
#
# Needs  the package with its extras: pip install -e ".[playground]", and no GPU.
# Costs  two CPU cores for about two hours (its parts took 110 minutes when run one by one, some beside other work), and half a GB of disk.
# Again  a step whose result is there is left out, so a broken run goes on where it was; the two warm-ups resume within a step.
# Ships  COPY=1 copies the finished checkpoint to playground/avg-llava-micro and the results to playground/results.
#
# The two warm-ups stand for what CLIP and Vicuna bring to the real model: an eye that knows what it sees, and a tongue that can read
# notes and answer. The curriculum of stage 2 (one quadrant, then whole scenes, each first with the questions that are learned late)
# is part of the recipe. The tower stays frozen after its warm-up: its features are settled so that pooling loses order and place
# (see pretrain_vision.py), further training would pack them into the pooled tokens, and frozen features are computed once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=${1:-playground/build}
threads=${THREADS:-2}
data=$out/data
scale=${SCALE:-1} # SCALE=0.01 is a quick trial of every step
export OMP_NUM_THREADS=$threads OMP_WAIT_POLICY=passive TOKENIZERS_PARALLELISM=false

say() { printf '\n== %s\n' "$*"; }
steps() { python -c "print(max(2, round($1 * $scale)))"; }

# done_before FOLDER: whether a step's result is complete.
done_before() { [[ -e $1/trainer_state.json || -e $1/.done ]]; }

say "World"
[[ -e $data/.done ]] || {
  python -m playground.make_data --output "$data" --miniatures "$(steps 12000)" --pairs "$(steps 6000)" --scenes "$(steps 12000)" \
    --captions "$(steps 12000)" --stage4 "$(steps 400)" --validation "$(steps 200)" --test "$(steps 400)"
  touch "$data/.done"
}

say "Warm-up of the eye"
[[ -e $out/vision/preprocessor_config.json ]] ||
  python -m playground.pretrain_vision --output "$out/vision" --threads "$threads" --steps "$(steps 4000)" --settle-steps "$(steps 700)"

say "Warm-up of the tongue"
[[ -e $out/language/model.safetensors ]] ||
  python -m playground.pretrain_language --output "$out/language" --threads "$threads" --steps "$(steps 1500)"

common=(--image_folder "$data" --use_cpu --report_to none --save_strategy no --logging_steps 20 --cache_image_features_gb 6
  --warmup_ratio 0.03 --adam_beta2 0.98)
new=(--mm_projector_type mlp2x_gelu --mm_vision_select_layer -1 --image_aspect_ratio anyres --vis_token_granularity 4,8,16,32,64
  --image_grid_pinpoints "[[64,64],[64,128],[128,64],[128,128],[192,64],[64,192]]")

# learn NAME FROM STAGE DATA STEPS BATCH RATE [FLAGS]: one training run.
learn() {
  local name=$1 from=$2 stage=$3 rows=$4 count=$5 batch=$6 rate=$7
  shift 7
  done_before "$out/$name" && return
  say "Stage $stage: $name"
  python -m llava.train.train --stage "$stage" --model_name_or_path "$out/$from" --data_path "$data/$rows.json" --output_dir "$out/$name" \
    --max_steps "$(steps "$count")" --per_device_train_batch_size "$batch" --learning_rate "$rate" "${common[@]}" "$@"
}
frozen=(--unfreeze_mm_vision_tower False)
steady=(--lr_scheduler_type constant_with_warmup)

learn stage1 language align stage1 250 16 3e-3 --vision_tower "$out/vision" "${new[@]}" --seed 0
learn stage2-pairs stage1 instruct pairs 300 16 1e-3 "${frozen[@]}" --seed 0
learn stage2-scenes stage2-pairs instruct scenes 260 16 1e-3 "${frozen[@]}" --seed 0
learn stage2-drill stage2-scenes instruct drill_miniatures 330 32 2e-3 "${frozen[@]}" "${steady[@]}" --seed 2
learn stage2 stage2-drill instruct drill_scenes 200 16 2e-3 "${frozen[@]}" "${steady[@]}" --seed 3
learn stage3 stage2 multi_granularity scenes 240 8 1.5e-3 "${frozen[@]}" --seed 1

say "Scores of stage 4"
[[ -e $out/scores.parquet ]] || python -m llava.train.score_granularities --model_name_or_path "$out/stage3" \
  --data_path "$data/stage4.json" --image_folder "$data" --output_file "$out/scores.parquet" --batch_size 16 --device cpu

# route NAME SEED [FLAGS]: one router, trained on the scores; the language model does not run.
route() {
  local name=$1 seed=$2
  shift 2
  learn "$name-$seed" stage3 rglf stage4 375 32 3e-3 --granularity_scores "$out/scores.parquet" \
    --router_hidden_size 32 --filtered_text_num 16 --router_dropout 0.0 --seed "$seed" "$@"
}
cost=(--granularity_cost_weight "${COST:-0.03}")
for seed in 0 1 2; do
  route cost-aware "$seed" --router_attention_axis "${AXIS:-views}" "${cost[@]}"
  route paper-loss "$seed" --router_attention_axis "${AXIS:-views}"
done
route other-axis 0 --router_attention_axis "${OTHER_AXIS:-tokens}" "${cost[@]}"
route no-instruction 0 --router_attention_axis "${AXIS:-views}" "${cost[@]}" --router_without_instruction True --filtered_text_num 0

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
