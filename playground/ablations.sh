#!/usr/bin/env bash
# The paper's ablation table at micro size: routers with one thing left out each, trained by stage 4 on the same frozen model.
#
#   bash playground/ablations.sh [RUN]               (default: playground/build)
#
# Needs  RUN: the output folder of playground/train_micro.sh (its data, stage3, the routers it trains, records.json), and no GPU.
# Costs  4 routers (3 minutes of an undisturbed CPU core each) and two passes of scoring (5 and 4); the language model answers nothing anew.
# Again  a router that exists is skipped, so an interrupted run resumes.
# Makes  RUN/ablations: the routers, ablations.md and ablations.json; COPY=1 copies the two files to playground/results.
#
# Rows follow the ablation table of arXiv 2410.02745: no instruction, fewer granularities, no ranking loss, no cross-entropy, fixed and
# random choices. Left out: a router trained by instruction tuning through a relaxed choice, which stage 4 has no loss for. Beyond the
# paper, from train_micro.sh: the price of tokens (--granularity_cost_weight), and under it no instruction and the other attention axis.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

run=${1:-playground/build}
out=$run/ablations
data=$run/data
steps=${STEPS:-900}         # those of train_micro.sh; fewer is a quick trial of every step
range=${RANGE:-4,16,64}     # the smaller range: as the paper keeps 36, 144 and 576
python=${PYTHON:-python}
export OMP_NUM_THREADS=${THREADS:-1} OMP_WAIT_POLICY=passive TOKENIZERS_PARALLELISM=false
export LAUNCHER=python DEVICE=cpu ZERO=none WORKERS=0 MODEL_MAX_LENGTH=2048 # read by scripts/avg_llava

say() { printf '\n== %s\n' "$*"; }
for needed in data/stage4.json data/test.jsonl stage3 records.json paper-loss-0 cost-aware-0 other-axis-0 no-instruction-0; do
  [[ -e $run/$needed ]] || {
    echo "$run has no $needed; run bash playground/train_micro.sh first, or give its output folder." >&2
    exit 1
  }
done
mkdir -p "$out"

# score FILE [FLAGS]: the answer losses that routers learn from, at every granularity; a file that already fits is kept.
score() {
  local file=$1
  shift
  "$python" -m llava.train.score_granularities --model_name_or_path "$run/stage3" --data_path "$data/stage4.json" --image_folder "$data" \
    --output_file "$file" --version v1 --batch_size 16 --device cpu "$@"
}

# route NAME SCORES [FLAGS]: one router by the paper's losses, changed by the flags.
route() {
  local name=$1 scores=$2
  shift 2
  [[ ! -e $out/$name/trainer_state.json ]] || return 0
  say "$name: $*"
  MODEL=$run/stage3 DATA_PATH=$data/stage4.json IMAGE_FOLDER=$data OUTPUT_DIR=$out/$name GLOBAL_BATCH=32 BATCH=32 LEARNING_RATE=3e-3 \
    OVERWRITE=1 SCORES=$scores bash scripts/avg_llava/stage4_rglf.sh --max_steps "$steps" --cache_image_features_gb 6 --adam_beta2 0.98 \
    --gradient_checkpointing False --save_strategy no --report_to none --logging_steps 20 --router_hidden_size 32 --router_dropout 0.0 \
    --seed 0 "$@"
}

say "Scores at all granularities, and at $range alone"
score "$out/scores.parquet"
score "$out/scores-$range.parquet" --vis_token_granularity "$range"

all=$out/scores.parquet
route without-ranking "$all" --rank_loss_weight 0
route without-cross-entropy "$all" --ce_loss_weight 0
route without-instruction "$all" --router_without_instruction True
route "range-$range" "$out/scores-$range.parquet" --vis_token_granularity "$range"

say "Table"
"$python" -m playground.ablations --records "$run/records.json" --questions "$data/test.jsonl" --output "$out" \
  --router "the paper's losses=$run/paper-loss-0" \
  --router "without the instruction=$out/without-instruction" \
  --router "granularities ${range//,/, } only=$out/range-$range" \
  --router "without the ranking loss=$out/without-ranking" \
  --router "without the cross-entropy=$out/without-cross-entropy" \
  --router "tokens priced=$run/cost-aware-0" \
  --router "tokens priced, without the instruction=$run/no-instruction-0" \
  --router "tokens priced, the other attention axis=$run/other-axis-0"
cat "$out/ablations.md"

if [[ ${COPY:-0} == 1 ]]; then
  say "Copying to playground/results"
  cp "$out/ablations.md" "$out/ablations.json" playground/results/
fi
