#!/usr/bin/env bash
# Makes the environment of the stock lmms-eval harness: torch, this package, lmms-eval 0.7.3, the plug-in.
#
#   bash scripts/eval/setup_lmms_eval.sh
#
# Needs  Python 3.10 to 3.13, and a network or local package files. No GPU.
# Costs  about 1.6 GB of disk with a CPU build of torch; two minutes of computing, which took nine on two busy cores.
# Makes  .venv-lmms-eval in the repository and nothing elsewhere; an active environment is left alone. Run it as often as you like.
# Ends   with one question, asked of the shipped micro model through the harness: what is installed works, or the script fails.
# Why    the harness asks for torchvision, timm and some fifty others, which would replace torch and may break an environment that
#        works. Here it is installed without them; lmms-eval/requirements.txt lists what it needs to run a model on a task.
# Knobs  LMMS_EVAL_ENV: another folder. PYTHON, TORCH_VERSION, TORCH_INSTALL_ARGS, REINSTALL: see scripts/lib.sh.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

harness=lmms-eval==0.7.3
folder=${LMMS_EVAL_ENV:-$root/.venv-lmms-eval}

make_environment "$folder"
# What lib.sh installs goes here, whatever environment is active.
export VIRTUAL_ENV=$folder
enter_environment
install_package core

key=$(cat "$root/lmms-eval/pyproject.toml" "$root/lmms-eval/requirements.txt" "${BASH_SOURCE[0]}" | cksum)
if [[ -z ${REINSTALL:-} && $(cat "$folder/.lmms-eval-installed" 2>/dev/null) == "$key" ]]; then
  say "The harness is already installed; REINSTALL=1 installs again"
  exit 0
fi
install_torch # is there; holds its version in $constraint
trap 'rm -f "$constraint"' EXIT
say "Installing $harness without what it does not need here, and the plug-in"
pip_install --no-deps "$harness" || stop "pip could not install $harness; its message is above."
pip_install --constraint "$constraint" -r "$root/lmms-eval/requirements.txt" || stop "pip could not install lmms-eval/requirements.txt; its message is above."
pip_install --constraint "$constraint" -e "$root/lmms-eval" || stop "pip could not install the plug-in; its message is above."

say "Asking one question through the harness"
asked=$(mktemp -d)
trap 'rm -rf "$constraint" "$asked"' EXIT
LMMS_EVAL_ENV=$folder MODEL= MODEL_PATH= MODEL_ARGS=granularity=4 TASKS=playground BATCH_SIZE=1 NUM_PROCESSES=1 OUTPUT=$asked \
  bash "$root/scripts/eval/lmms_eval.sh" --limit 1 >"$asked/log" 2>&1 || {
  tail -n 40 "$asked/log" >&2
  stop "the harness could not answer its first question; the end of its output is above."
}
grep -h '^|playground|.*|accuracy' "$asked/log" || stop "the harness asked a question, but shows no score of it: $(tail -n 5 "$asked/log")"
echo "$key" >"$folder/.lmms-eval-installed"
