#!/usr/bin/env bash
# The tests that start real vLLM servers with the plug-in: answers, token ids and prompt lengths against our own, hostile requests, failures.
#
#   bash scripts/test_vllm.sh [arguments of pytest]
#
# Needs  what scripts/setup_vllm.sh needs. On a CPU: 8 GB of memory.
# Costs  about 15 minutes on two idle cores, and the environments' disk.
# Makes  .venv (or uses the active environment) for pytest and our own side, .venv-vllm for vLLM's; nothing elsewhere.
# Knobs  VLLM_ENV: vLLM's folder, made by scripts/setup_vllm.sh if it is not there. VLLM_TEST_QUESTIONS: about how many of the 4,000
#        questions to ask (all). VLLM_TEST_EXPECTED: a file that keeps our own answers from one run to the next.
#        PYTHON, VLLM_DEVICE, TORCH_VERSION, TORCH_INSTALL_ARGS, REINSTALL: see scripts/lib.sh and scripts/setup_vllm.sh.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

VLLM_ENV=${VLLM_ENV:-$root/.venv-vllm}
if [[ ! -x $VLLM_ENV/bin/vllm ]]; then
  bash "$root/scripts/setup_vllm.sh" "$VLLM_ENV" ||
    stop "vLLM cannot be had here, so nothing was tested; scripts/test.sh tests the parts of the plug-in that know no vLLM."
fi
export VLLM_ENV
enter_environment
install_package dev
cd "$root"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

say "pytest tests/vllm"
"$python" -m pytest -m "slow or not slow" tests/vllm "$@"
