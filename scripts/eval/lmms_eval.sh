#!/usr/bin/env bash
# Runs the stock lmms-eval harness in its own environment: on the shipped micro model and the local tasks by default.
#
#   bash scripts/eval/lmms_eval.sh                                            # micro model, playground and easy_vqa, no network
#   MODEL_PATH=DIR TASKS=gqa,pope bash scripts/eval/lmms_eval.sh              # public tasks fetch their data
#   MODEL_ARGS=granularity=8:32 bash scripts/eval/lmms_eval.sh --limit 100    # more for the model, any flag for the harness
#
# Needs  bash scripts/eval/setup_lmms_eval.sh, once.
# Costs  both local tasks in full: 13,673 questions, six and a half minutes with the micro model on two shared CPU cores.
# Makes  runs/lmms_eval/MODEL-GRANULARITY: the harness's results and samples, and a line per sample of granularity, visual tokens and
#        milliseconds. Another model, granularity or other MODEL_ARGS make another folder.
# Knobs  MODEL_PATH: checkpoint folder or hub id.           TASKS (playground,easy_vqa): comma-separated.
#        MODEL (avg_llava): or llava, avg_llava_hf.         MODEL_ARGS: further arguments of the model, comma-separated.
#        BATCH_SIZE (8): questions per batch.                OUTPUT: where results go, in place of that folder.
#        NUM_PROCESSES (1): one model per process, for as many GPUs (or CPU processes). LMMS_EVAL_ENV: the environment's folder.
# Exits  with 1 if anything failed: a task or model that is not there, an argument that cannot be, a question that crashed, results that
#        found no room.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

model_path=${MODEL_PATH:-$root/playground/avg-llava-micro}
tasks=${TASKS:-playground,easy_vqa}
folder=${LMMS_EVAL_ENV:-$root/.venv-lmms-eval}
python=$folder/bin/python
[[ -x $python ]] || stop "$folder is not there; run: bash scripts/eval/setup_lmms_eval.sh"

# The local tasks need no hub: whoever reaches for one fails at once instead of waiting.
if [[ $tasks =~ ^((playground|easy_vqa|easy_vqa_plain|my_questions)(,|$))+$ ]]; then
  export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
fi
export TOKENIZERS_PARALLELISM=false

launch=("$python")
if [[ ${NUM_PROCESSES:-1} -gt 1 ]]; then
  launch+=(-m torch.distributed.run --standalone --nproc_per_node "$NUM_PROCESSES")
  if "$python" -c 'import sys, torch; sys.exit(torch.cuda.is_available())'; then
    export ACCELERATE_USE_CPU=true
  fi
fi

exec "${launch[@]}" -m avg_llava_lmms_eval \
  --model "${MODEL:-avg_llava}" \
  --model_args "pretrained=$model_path${MODEL_ARGS:+,$MODEL_ARGS}" \
  --tasks "$tasks" \
  --batch_size "${BATCH_SIZE:-8}" \
  --output_path "${OUTPUT:-$root/runs/lmms_eval/$(run_name "$model_path" "${MODEL_ARGS:-}" "${MODEL:-avg_llava}")}" \
  --log_samples \
  --timezone UTC \
  "$@"
