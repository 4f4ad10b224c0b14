#!/usr/bin/env bash
# From nothing to an address: serves a checkpoint by vLLM, one server or several behind a router, and ends all it started when it ends.
#
#   bash scripts/serve_vllm.sh [MODEL] [--replicas N] [--split] [--port PORT] [-- FLAGS OF VLLM]
#
#   bash scripts/serve_vllm.sh                                             # the micro model that ships with us
#   bash scripts/serve_vllm.sh zhibinlan/AVG-LLaVA --replicas 2            # one per GPU, behind vllm-router
#   bash scripts/serve_vllm.sh zhibinlan/AVG-LLaVA --split                 # our worker encodes and routes, vLLM sees visual tokens only
#   bash scripts/serve_vllm.sh zhibinlan/AVG-LLaVA -- --max-model-len 4096
#
# Needs  what scripts/setup_vllm.sh needs, which it runs where its environment is missing. A GPU per replica, or CPUs.
# Costs  from a minute until the model is ready, and the environments' disk.
# Makes  .venv-vllm; with --split also .venv (or uses the active environment); nothing else but logs in a temporary folder.
# Serves http://127.0.0.1:PORT (8000). --host 0.0.0.0 is for the router, the only server, or the only worker; everything behind them stays
#        on loopback. Requests may choose a granularity, so it is for clients that you trust: docs/Scaling.md says what that opens.
# Ends   with Ctrl-C, TERM, or when one of its processes ends; then it says which and shows the end of its log, and its status is 1.
# Knobs  VLLM_ENV: vLLM's environment. VLLM_ROUTER: the router's command, installed into that environment where it is missing.
#        GPUS_PER_REPLICA (1): more than one shards the model. START_SECONDS (1800): how long a replica may take to be ready.
#        END_SECONDS (30): how long running answers may take when it ends; what is left then is killed.
#        VLLM_CPU_KVCACHE_SPACE (1): GiB of KV cache of a replica on a CPU. PYTHON, VLLM_DEVICE and others: see scripts/setup_vllm.sh.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

router_version="vllm-router>=0.1.17,<0.2"
model=$root/playground/avg-llava-micro replicas=1 split=false host=127.0.0.1 port=8000 flags=()
if [[ $# -gt 0 && $1 != -* ]]; then model=$1 && shift; fi
while [[ $# -gt 0 ]]; do
  case $1 in
    --replicas | --port | --host) [[ $# -gt 1 ]] || stop "$1 needs a value." ;;&
    --replicas) replicas=$2 && shift 2 ;;
    --port) port=$2 && shift 2 ;;
    --host) host=$2 && shift 2 ;;
    --split) split=true && shift ;;
    --) shift && flags=("$@") && break ;;
    *) stop "$1 is not known here, expected [MODEL] [--replicas N] [--split] [--port PORT] [--host HOST] [-- FLAGS OF VLLM]." ;;
  esac
done
[[ $replicas =~ ^[1-9][0-9]*$ ]] || stop "--replicas is $replicas, expected 1 or more."
[[ $port =~ ^[1-9][0-9]*$ && $((port + replicas + 1)) -lt 65536 ]] || stop "--port is $port, expected a port with room for $replicas replicas behind it."
[[ ! -e $model || -f $model/config.json ]] || stop "$model holds no config.json; give a checkpoint folder or a hub id."

# ---- what is needed

export VLLM_ENV=${VLLM_ENV:-$root/.venv-vllm} VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}
[[ -x $VLLM_ENV/bin/vllm ]] || bash "$root/scripts/setup_vllm.sh" "$VLLM_ENV"
router=${VLLM_ROUTER:-$VLLM_ENV/bin/vllm-router}
if [[ $replicas -gt 1 && ! -x $router ]]; then
  say "Installing $router_version"
  "$VLLM_ENV/bin/python" -m pip install "$router_version" || stop "pip could not install $router_version; its message is above."
fi
if $split; then
  enter_environment
  install_package serve
fi
gpus=() per=${GPUS_PER_REPLICA:-1}
if [[ ${VLLM_DEVICE:-} != cpu ]] && command -v nvidia-smi >/dev/null; then
  IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES:-$(nvidia-smi --query-gpu=index --format=csv,noheader | paste -sd, -)}"
  [[ ${#gpus[@]} -ge $((replicas * per)) ]] || stop "There are ${#gpus[@]} GPUs, but $replicas replicas of $per need $((replicas * per))."
fi
[[ $per -eq 1 ]] || flags=(--tensor-parallel-size "$per" ${flags[@]+"${flags[@]}"})

# ---- what was started, and how it ends

logs=$(mktemp -d) names=() groups=()

# start NAME COMMAND...: in the background, in a process group of its own, so that Ctrl-C is ours to handle and nothing outlives it.
start() {
  local name=$1
  shift
  setsid "$@" >"$logs/$name.log" 2>&1 </dev/null &
  names+=("$name") groups+=($!)
}

finish() {
  trap '' INT TERM
  trap - EXIT
  local group waited=0
  for group in ${groups[@]+"${groups[@]}"}; do kill -TERM -- "-$group" 2>/dev/null || true; done
  while [[ $waited -lt $((2 * ${END_SECONDS:-30})) ]] && any_left; do sleep 0.5 && waited=$((waited + 1)); done
  for group in ${groups[@]+"${groups[@]}"}; do kill -KILL -- "-$group" 2>/dev/null || true; done
  wait
  rm -rf "$logs"
}

any_left() {
  local group
  for group in ${groups[@]+"${groups[@]}"}; do kill -0 -- "-$group" 2>/dev/null && return 0; done
  return 1
}

trap finish EXIT
trap 'say "Stopping"; exit 130' INT
trap 'say "Stopping"; exit 143' TERM

# Stop with the end of its log where one of the processes has ended.
look() {
  local place
  for place in "${!groups[@]}"; do
    kill -0 "${groups[$place]}" 2>/dev/null && continue
    tail -n 30 "$logs/${names[$place]}.log" >&2
    stop "${names[$place]} has ended; the end of its log is above. The others are ended, too."
  done
}

# reached_at HOST: the host that a server which listens on HOST has for this machine.
reached_at() { if [[ $1 == 0.0.0.0 ]]; then echo 127.0.0.1; else echo "$1"; fi; }

# until_healthy NAME URL
until_healthy() {
  local waited=0
  until curl -sf -o /dev/null --max-time 5 "$2"; do
    look
    [[ $waited -lt ${START_SECONDS:-1800} ]] || stop "$1 is not ready after $waited s (START_SECONDS); its log ends with: $(tail -n 5 "$logs/$1.log")"
    sleep 1
    waited=$((waited + 1))
    [[ $((waited % 10)) -ne 0 ]] || printf '%s: %s s, %s\n' "$1" "$waited" "$(tail -n 1 "$logs/$1.log" | cut -c1-150)"
  done
  printf '%s: ready after %s s\n' "$1" "$waited"
}

# ---- replicas, and a router before them

name=$(basename "$model")
addresses=()
say "Starting $replicas of $name; logs in $logs"
for ((place = 0; place < replicas; place++)); do
  own_port=$port own_host=$host
  [[ $replicas -eq 1 ]] || own_port=$((port + 1 + place)) own_host=127.0.0.1
  [[ ${#gpus[@]} -eq 0 ]] || export CUDA_VISIBLE_DEVICES=$(IFS=, && echo "${gpus[*]:$((place * per)):$per}")
  if $split; then
    own=(--host "$own_host" --port "$own_port" --model-path "$model" --model-name "$name" --engine vllm --vllm-python "$VLLM_ENV/bin/python")
    [[ ${#flags[@]} -eq 0 ]] || own+=("--vllm-args=$(printf '%q ' "${flags[@]}")")
    start "replica-$place" "$python" -m llava.serve.model_worker "${own[@]}"
  else
    # Kwargs of requests carry the granularity; usage says what images took.
    start "replica-$place" "$VLLM_ENV/bin/vllm" serve "$model" --served-model-name "$name" --host "$own_host" --port "$own_port" \
      --trust-request-mm-kwargs --enable-prompt-tokens-details ${flags[@]+"${flags[@]}"}
  fi
  addresses+=("http://$(reached_at "$own_host"):$own_port")
done
probe=health # a worker is ready when the vLLM behind it is
if $split; then probe=ready; fi
for place in "${!addresses[@]}"; do until_healthy "replica-$place" "${addresses[$place]}/$probe"; done
if [[ $replicas -gt 1 ]]; then
  start router "$router" --host "$host" --port "$port" --policy power_of_two --worker-urls "${addresses[@]}" \
    --prometheus-host 127.0.0.1 --prometheus-port "$((port + replicas + 1))" \
    --health-check-interval-secs 5 --health-failure-threshold 2 --cb-timeout-duration-secs 10
  until_healthy router "http://$(reached_at "$host"):$port/health"
fi

granularity='"mm_processor_kwargs": {"vis_token_granularity": "auto"}'
if $split; then granularity='"granularity": "auto"'; fi
cat <<END

$name is served at http://$host:$port/v1. Try it:

curl -s http://$(reached_at "$host"):$port/v1/chat/completions -H 'Content-Type: application/json' -d @- <<JSON
{"model": "$name", $granularity, "messages": [{"role": "user", "content": [
  {"type": "image_url", "image_url": {"url": "data:image/png;base64,\$(base64 <$root/playground/images/scene_pink.png | tr -d '\n')"}},
  {"type": "text", "text": "Which number does the sign show?"}]}]}
JSON

Ctrl-C ends it.
END
while true; do look && sleep 1; done
