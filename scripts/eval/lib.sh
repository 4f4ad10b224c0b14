# shellcheck shell=bash
# What the benchmark scripts share: data at a pinned revision, runs that go on after a kill, and the number that the paper reports.
# Sourced, not run. A script says what the benchmark is and calls run_benchmark with its own arguments, which go to the harness.
#
#   MODEL_PATH     checkpoint folder or hub id (zhibinlan/AVG-LLaVA)
#   GRANULARITY    auto (default), tokens per view such as 36, or several to choose from such as 36:144
#   MODEL_ARGS     further arguments of the model, comma-separated; MODEL: avg_llava (default), or llava, the harness's own
#   BATCH_SIZE     questions per batch and process (8)
#   NUM_PROCESSES  processes, one model each; default: the GPUs that are visible, or 1
#   REVISION       another commit of the data set than the pinned one, in full
#   DATA           where data sets are kept (data/eval); OFFLINE=1: nothing is fetched; FETCH_ONLY=1: nothing is run
#   OUTPUT         where results go (runs/eval/MODEL-GRANULARITY/BENCHMARK; further MODEL_ARGS stand behind the granularity)
#   SLICE          questions per slice (2000; an even number): the harness keeps answers only when all that it was asked are
#                  through, so it is asked slice by slice and then scores the whole from its cache. A killed run loses one slice.
#                  0 asks everything at once; so does a --limit or --offset behind the script
#   DRY_RUN=1      print what would be done, and do nothing
#   LMMS_EVAL_ENV  the harness's environment (.venv-lmms-eval), made by scripts/eval/setup_lmms_eval.sh

# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

# run_benchmark FLAGS...: reads benchmark, task, dataset, revision, configs, split and metric, which the script has set.
# shellcheck disable=SC2154 # they are the script's
run_benchmark() {
  local environment=${LMMS_EVAL_ENV:-$root/.venv-lmms-eval} prepared rows state cache
  local python=$environment/bin/python
  set_defaults
  if [[ ${DRY_RUN:-0} == 1 ]]; then
    describe "$@"
    return
  fi
  [[ -x $python ]] || stop "$environment is not there; run: bash scripts/eval/setup_lmms_eval.sh"
  say "$benchmark: $dataset at $revision, and $MODEL_PATH"
  prepared=$(prepare "$python") || exit 1
  read -r rows state <<<"$prepared"
  [[ ${FETCH_ONLY:-0} != 1 ]] || return 0
  # The harness knows models by name only; another state of the same folder must not reuse the old one's answers.
  cache=$OUTPUT/cache-$(printf '%s' "$state" | cksum | cut -d ' ' -f 1)
  if ((SLICE > 0)) && [[ " $* " != *" --limit"* && " $* " != *" --offset"* ]]; then
    run_slices "$rows" "$cache" "$@"
  fi
  say "$benchmark: $rows questions, scored"
  ask "$OUTPUT" "$cache" "$@"
  report "$python"
}

set_defaults() {
  revision=${REVISION:-$revision}
  MODEL_PATH=${MODEL_PATH:-zhibinlan/AVG-LLaVA} GRANULARITY=${GRANULARITY:-auto} SLICE=${SLICE:-2000}
  [[ $SLICE =~ ^[0-9]+$ && $((SLICE % 2)) == 0 ]] || stop "SLICE is $SLICE, expected an even number of questions, or 0."
  [[ $GRANULARITY =~ ^(auto|[1-9][0-9]*([:\;][1-9][0-9]*)*)$ ]] || stop "GRANULARITY is $GRANULARITY, expected auto, tokens per view such as 36, or several to choose from such as 36:144."
  [[ $revision =~ ^[0-9a-f]{40}$ ]] || stop "REVISION is $revision, expected a commit of $dataset in full, 40 hexadecimal digits."
  data=${DATA:-$root/data/eval}/$benchmark-${revision:0:8}
  arguments=${MODEL_ARGS:-}
  [[ ${MODEL:-avg_llava} != avg_llava ]] || arguments=granularity=$GRANULARITY${arguments:+,$arguments}
  [[ ${MODEL:-avg_llava} == avg_llava || $GRANULARITY == auto ]] || stop "GRANULARITY is $GRANULARITY, but the model ${MODEL:-} has no such argument; leave it out."
  OUTPUT=${OUTPUT:-$root/runs/eval/$(run_name "$MODEL_PATH" "$arguments" "${MODEL:-avg_llava}")/$benchmark}
}

# Fetch what is missing; prints rows and the model's state.
prepare() { # prepare PYTHON
  local config
  local -a command=("$1" "$root/scripts/eval/prepare.py" --dataset "$dataset" --revision "$revision" --split "$split" --cache "$data" --model "$MODEL_PATH")
  for config in "${configs[@]}"; do command+=(--config "$config"); done
  [[ ${OFFLINE:-0} != 1 ]] || command+=(--offline)
  PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} "${command[@]}"
}

count_processes() {
  "$python" -c 'import torch; print(max(1, torch.cuda.device_count()))'
}

# The variables of one call of scripts/eval/lmms_eval.sh. The harness leaves a cache on a network file system aside unless it is named
# in its own variable; tasks that read data themselves know the library's alone.
call_variables() { # call_variables OUTPUT
  printf '%s\n' HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 "HF_DATASETS_CACHE=$data" "LMMS_EVAL_DATASETS_CACHE=$data" \
    "MODEL_PATH=$MODEL_PATH" "TASKS=$task" "BATCH_SIZE=${BATCH_SIZE:-8}" "OUTPUT=$1"
  [[ -z ${MODEL:-} ]] || printf '%s\n' "MODEL=$MODEL"
  [[ -z $arguments ]] || printf '%s\n' "MODEL_ARGS=$arguments"
}

ask() { # ask OUTPUT CACHE FLAGS...
  local output=$1 cache=$2
  local word
  local -a variables=()
  shift 2
  while read -r word; do variables+=("$word"); done < <(call_variables "$output")
  # A run of its own in the cache: launchers give all their runs the same name.
  env "${variables[@]}" NUM_PROCESSES="${NUM_PROCESSES:-$(count_processes)}" LMMS_CACHE_RUN_ID="$(date +%s)-$$-$RANDOM" \
    bash "$root/scripts/eval/lmms_eval.sh" --use_cache "$cache" "$@" || stop "$benchmark failed; the harness's message is above. The same command resumes."
}

run_slices() { # run_slices ROWS CACHE FLAGS...
  local rows=$1 cache=$2 offset done_file
  shift 2
  for ((offset = 0; offset < rows; offset += SLICE)); do
    done_file=$cache/slices/$(printf '%s ' "$SLICE" "$offset" "$task" "$revision" "$arguments" "$@" | cksum | cut -d ' ' -f 1)
    [[ ! -e $done_file ]] || continue
    say "$benchmark: questions $offset to $((offset + SLICE < rows ? offset + SLICE : rows)) of $rows"
    ask "$OUTPUT/slices" "$cache" --offset "$offset" --limit "$SLICE" "$@"
    mkdir -p "$cache/slices"
    touch "$done_file"
  done
}

# The paper's number out of the newest results file.
report() { # report PYTHON
  "$1" - "$OUTPUT" "$task" "$metric" <<'PYTHON'
import json, pathlib, sys

folder, task, metric = sys.argv[1:]
files = list(pathlib.Path(folder).glob("*/*_results.json"))
if not files:
    sys.exit(f"error: {folder} holds no results; the harness's messages are above.")
newest = max(files, key=lambda file: file.stat().st_mtime)
scores = json.loads(newest.read_text())["results"][task]
values = [value for name, value in scores.items() if name.split(",")[0] == metric]
if not values or not isinstance(values[0], (int, float)):
    sys.exit(f"error: {newest} has no {metric} of {task}, only {', '.join(scores)}.")
print(f"\n{task} {metric}: {values[0]:.4f}   ({newest})")
PYTHON
}

describe() {
  local word
  printf '%s %s of %s, reported as %s\n' "task:" "$task" "split $split" "$metric"
  printf '%s %s at %s (%s) in %s\n' "data:" "$dataset" "$revision" "${configs[*]}" "$data"
  ((SLICE == 0)) || printf 'first: the same in slices, --offset N --limit %s\n' "$SLICE"
  printf 'run:'
  while read -r word; do printf ' %q' "$word"; done < <(call_variables "$OUTPUT")
  printf ' bash scripts/eval/lmms_eval.sh'
  (($# == 0)) || printf ' %q' "$@"
  printf '\n'
}
