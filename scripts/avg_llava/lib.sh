# shellcheck shell=bash
# What the four stage scripts share: checks of paths, batch sizes, and the launcher. Sourced, not run.
#
#   LAUNCHER       deepspeed (default), torchrun, srun (SLURM: one task per node, which starts torchrun) or python (one process)
#   ZERO           2, 3, 3_offload or none (plain data parallelism): which scripts/zero*.json is used; each stage has its default
#   DEVICE         cuda (default) or cpu
#   PRECISION      bf16 (default on cuda), fp16 or fp32 (default on cpu)
#   NPROC          processes per node; default: the GPUs of this node, or 1 on a CPU
#   NNODES         nodes (1); NODE_RANK: number of this node, 0 to NNODES-1, where every node's command is started by hand
#   MASTER_ADDR    address of node 0; MASTER_PORT: a port that is free on it (one node: found; several: 29500)
#   HOSTFILE       for LAUNCHER=deepspeed on several nodes: lines like "node1 slots=8"; without NODE_RANK, node 0 starts the others by ssh
#   SRUN_ARGS      for LAUNCHER=srun: further arguments, as in "--partition=gpu --gres=gpu:8"
#   GLOBAL_BATCH   rows per optimizer step over all processes; BATCH: rows per process at a time; accumulation follows from the two
#   RESUME=1       resumes from the newest checkpoint in OUTPUT_DIR; OVERWRITE=1 starts over although OUTPUT_DIR holds a run
#   PYTHON         the interpreter (python)
#
# Flags after a script's name are passed on and win over the script's own.

# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

python=${PYTHON:-python}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

one_of() { # one_of NAME CHOICES...: stop unless the variable NAME is one of them.
  local name=$1 choice
  shift
  for choice in "$@"; do [[ ${!name} == "$choice" ]] && return; done
  stop "$name is ${!name}, expected one of: $*."
}

whole_number() { # whole_number NAME...: stop unless these variables are 1 or more.
  local name
  for name in "$@"; do
    [[ ${!name} =~ ^[1-9][0-9]*$ ]] || stop "$name is ${!name:-empty}, expected a whole number of 1 or more."
  done
}

# An existing folder, or what looks like a hub id (owner/name).
model_or_stop() { # model_or_stop NAME WHAT
  local value=${!1}
  [[ -d $value ]] && return
  [[ -n ${2:-} ]] || [[ ! $value =~ ^[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*$ ]] || return 0
  stop "$1 is $value, which is not a folder${2:+; $2}."
}

there_or_stop() { # there_or_stop NAME WHAT: stop unless the variable names something that exists.
  [[ -n ${!1:-} ]] || stop "$1 is not set; give $2, as in: $1=/path/to/it bash $0"
  [[ -e ${!1} ]] || stop "$1 is ${!1}, which does not exist; give $2."
}

# The model a stage starts from: MODEL, or what the stage before made.
start_from() { # start_from FOLDER SCRIPT
  if [[ -n ${MODEL:-} ]]; then
    model_or_stop MODEL
  else
    MODEL=$1
    model_or_stop MODEL "run scripts/avg_llava/$2 first, or give MODEL a checkpoint folder or a hub id"
  fi
}

# The rows and their images. Image names are relative to IMAGE_FOLDER, by default the folder that holds the rows.
check_data() {
  there_or_stop DATA_PATH "the rows to train on (docs/Data.md)"
  IMAGE_FOLDER=${IMAGE_FOLDER:-$(dirname "$DATA_PATH")}
  there_or_stop IMAGE_FOLDER "the folder that image names are relative to"
}

# A finished or interrupted run is not overwritten by accident.
check_output() {
  local -a earlier
  [[ -n $OUTPUT_DIR ]] || stop "OUTPUT_DIR is empty; give the folder that the model is written to."
  [[ ${RESUME:-0} == 1 || ${OVERWRITE:-0} == 1 || " $* " == *" --resume_from_checkpoint"* ]] && return
  earlier=("$OUTPUT_DIR"/config.json "$OUTPUT_DIR"/adapter_config.json "$OUTPUT_DIR"/checkpoint-*)
  local found
  for found in "${earlier[@]}"; do
    [[ ! -e $found ]] || stop "$OUTPUT_DIR holds an earlier run ($(basename "$found")); choose another OUTPUT_DIR, resume with RESUME=1, or start over with OVERWRITE=1."
  done
}

count_gpus() {
  "$python" -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null ||
    stop "$python has no working torch; activate the environment, or name its interpreter: PYTHON=/path/to/python bash $0"
}

free_port() {
  "$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# Defaults and checks of the launcher's variables. Sets `world`, the number of processes.
check_launcher() {
  LAUNCHER=${LAUNCHER:-deepspeed} DEVICE=${DEVICE:-cuda} NNODES=${NNODES:-1}
  one_of LAUNCHER deepspeed torchrun srun python
  one_of DEVICE cuda cpu
  one_of ZERO none 2 3 3_offload
  if [[ -z ${NPROC:-} ]]; then
    NPROC=1
    if [[ $DEVICE == cuda && $LAUNCHER != python ]]; then
      NPROC=${SLURM_GPUS_ON_NODE:-$(count_gpus)}
      [[ $NPROC != 0 ]] || stop "NPROC is not set and this machine shows no GPU; give NPROC (GPUs per node), or DEVICE=cpu."
    fi
  fi
  whole_number NPROC NNODES BATCH GLOBAL_BATCH
  world=$((NPROC * NNODES))
  [[ $LAUNCHER != python || $world == 1 ]] ||
    stop "LAUNCHER is python, which is one process, but NPROC x NNODES is $world; choose LAUNCHER=torchrun."
  if ((NNODES > 1)) && [[ $LAUNCHER != srun ]]; then
    [[ $LAUNCHER != deepspeed || -f ${HOSTFILE:-} ]] ||
      stop "HOSTFILE is ${HOSTFILE:-not set}, but LAUNCHER=deepspeed on $NNODES nodes needs a file of lines like \"node1 slots=8\"."
    [[ $LAUNCHER == deepspeed || -n ${NODE_RANK:-} ]] || stop "NODE_RANK is not set; give this node's number, 0 to $((NNODES - 1))."
    [[ ($LAUNCHER == deepspeed && -z ${NODE_RANK:-}) || -n ${MASTER_ADDR:-} ]] || stop "MASTER_ADDR is not set; give the address of node 0."
    [[ -z ${NODE_RANK:-} || $NODE_RANK =~ ^[0-9]+$ && $NODE_RANK -lt $NNODES ]] ||
      stop "NODE_RANK is $NODE_RANK, expected a number from 0 to $((NNODES - 1))."
    MASTER_PORT=${MASTER_PORT:-29500}
  elif [[ $LAUNCHER == srun ]]; then
    MASTER_PORT=${MASTER_PORT:-29500}
  else
    MASTER_ADDR=${MASTER_ADDR:-127.0.0.1} MASTER_PORT=${MASTER_PORT:-$(free_port)}
  fi
}

# Flags that follow from the variables above: batch, device, precision, ZeRO, resuming. Sets `run_flags`.
set_run_flags() {
  local together=$((BATCH * world))
  ((GLOBAL_BATCH % together == 0)) ||
    stop "GLOBAL_BATCH is $GLOBAL_BATCH, no multiple of BATCH ($BATCH) x $world processes; change one of the three."
  run_flags=(--per_device_train_batch_size "$BATCH" --gradient_accumulation_steps $((GLOBAL_BATCH / together)))
  if [[ $DEVICE == cpu ]]; then
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    run_flags+=(--use_cpu True --dataloader_pin_memory False)
  fi
  PRECISION=${PRECISION:-$([[ $DEVICE == cpu ]] && echo fp32 || echo bf16)}
  one_of PRECISION bf16 fp16 fp32
  [[ $PRECISION == fp32 ]] || run_flags+=("--$PRECISION" True)
  [[ $PRECISION != bf16 || $DEVICE != cuda ]] || run_flags+=(--tf32 True)
  [[ $ZERO == none ]] || run_flags+=(--deepspeed "$root/scripts/zero$ZERO.json")
  [[ ${RESUME:-0} != 1 ]] || run_flags+=(--resume_from_checkpoint True)
  [[ ${OVERWRITE:-0} != 1 ]] || run_flags+=(--overwrite_output_dir True)
}

# launch PROGRAM ARGUMENTS...: run a Python file (or, as `-m MODULE`, a module) in every process of the run.
launch() {
  local -a program=("$@") nodes=(--nproc_per_node "$NPROC" --nnodes "$NNODES")
  case $LAUNCHER in
    python)
      # One process is a world of its own: DeepSpeed asks for these, and more GPUs than one would be used by copies of the model.
      export RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR MASTER_PORT CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}"
      "$python" "${program[@]}"
      ;;
    torchrun)
      nodes+=(--node_rank "${NODE_RANK:-0}" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT")
      "$python" -m torch.distributed.run "${nodes[@]}" "${program[@]}"
      ;;
    srun)
      launch_by_slurm "${nodes[@]}" --master_port "$MASTER_PORT" "${program[@]}"
      ;;
    deepspeed)
      launch_by_deepspeed "${program[@]}"
      ;;
  esac
}

launch_by_slurm() {
  local -a extra
  command -v srun >/dev/null || stop "LAUNCHER is srun, but this machine has no srun; choose LAUNCHER=torchrun or deepspeed."
  read -r -a extra <<<"${SRUN_ARGS:-}"
  # shellcheck disable=SC2016 # the variables are those of the task on each node
  srun --nodes "$NNODES" --ntasks-per-node 1 --kill-on-bad-exit=1 ${extra[@]+"${extra[@]}"} bash -c '
    address=${MASTER_ADDR:-$(scontrol show hostnames "${SLURM_STEP_NODELIST:-$SLURM_JOB_NODELIST}" | head -n 1)}
    exec "$0" -m torch.distributed.run --node_rank "$SLURM_NODEID" --master_addr "$address" "$@"' "$python" "$@"
}

launch_by_deepspeed() {
  local -a how=(--no_local_rank --master_port "$MASTER_PORT")
  "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("deepspeed") is None)' ||
    stop "LAUNCHER is deepspeed, but $python does not have it; run pip install -e \".[train]\", or choose LAUNCHER=torchrun ZERO=none."
  if ((NNODES > 1)); then
    how+=(--hostfile "$HOSTFILE" --num_nodes "$NNODES" ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"})
    [[ -z ${NODE_RANK:-} ]] || how+=(--no_ssh --node_rank "$NODE_RANK")
  else
    how+=(--master_addr "$MASTER_ADDR")
    # Without a list of GPUs of the caller's own, the first NPROC are used.
    [[ -n ${CUDA_VISIBLE_DEVICES:-} ]] || how+=(--num_gpus "$NPROC")
  fi
  if [[ $1 == -m ]]; then
    shift
    how+=(--module)
  fi
  "$python" -m deepspeed.launcher.runner "${how[@]}" "$@"
}

# What the published runs of all stages have in common.
set_common_flags() {
  common_flags=(--lr_scheduler_type cosine --weight_decay 0 --num_train_epochs "${EPOCHS:-1}"
    --model_max_length "${MODEL_MAX_LENGTH:-4096}" --gradient_checkpointing True --lazy_preprocess True
    --dataloader_num_workers "$WORKERS" --eval_strategy no --save_strategy steps --save_steps "$SAVE_STEPS" --save_total_limit 1
    --logging_steps 1)
}

# train STAGE FLAGS...: say what is about to happen, and start.
train() {
  local stage=$1
  shift
  say "Stage $stage: $MODEL -> $OUTPUT_DIR ($LAUNCHER, $NNODES x $NPROC processes, ZeRO $ZERO, $DEVICE, $PRECISION)"
  set_common_flags
  launch "$root/llava/train/train_mem.py" --stage "$stage" --model_name_or_path "$MODEL" --data_path "$DATA_PATH" \
    --image_folder "$IMAGE_FOLDER" --output_dir "$OUTPUT_DIR" "${run_flags[@]}" "${common_flags[@]}" "$@"
}

# Write SCORES, the losses of every row at every granularity. Each process scores its share; finished parts are kept.
score() { # score FLAGS...: the flags that are passed on to the trainer; those that change how rows are read must reach the scorer too.
  local flag
  for flag in "$@"; do
    case $flag in
      --version* | --image_aspect_ratio* | --image_grid_pinpoints* | --vis_token_granularity* | --index_cache* | --on_bad_sample*)
        stop "SCORE=1 does not pass $flag on; run python -m llava.train.score_granularities yourself and give its file as SCORES."
        ;;
    esac
  done
  local dtype=float32
  # Scores belong to weights of one type: the type that the trainer holds them in, 16 bits under DeepSpeed and 32 otherwise.
  [[ $ZERO == none || $PRECISION != bf16 ]] || dtype=bfloat16
  [[ $ZERO == none || $PRECISION != fp16 ]] || dtype=float16
  local -a command=(-m llava.train.score_granularities --model_name_or_path "$MODEL" --data_path "$DATA_PATH"
    --image_folder "$IMAGE_FOLDER" --output_file "$SCORES" --version v1 --batch_size "${SCORE_BATCH:-8}" --num_workers "$WORKERS" --dtype "$dtype")
  [[ $DEVICE != cpu ]] || command+=(--device cpu)
  if [[ -e $SCORES ]]; then
    say "Scores: $SCORES is there; the trainer refuses it where it belongs to other weights or rows"
    return
  fi
  ((NNODES == 1)) || [[ $LAUNCHER == srun || $LAUNCHER == deepspeed && -z ${NODE_RANK:-} ]] ||
    stop "SCORE=1 needs one command that starts all nodes; score on one node (NNODES=1), then give every node SCORES=FILE."
  say "Scores: $MODEL on $DATA_PATH -> $SCORES ($NNODES x $NPROC processes)"
  launch "${command[@]}"
  [[ -e $SCORES ]] || stop "$SCORES was not written; the messages above say why."
}
