# shellcheck shell=bash
# What the scripts share: finding Python, entering an environment, installing once. Sourced, not run.
# Sets `root` (the repository) and, after enter_environment, `python` (the environment's interpreter).

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf '\n== %s\n' "$*"; }

stop() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# Whether an interpreter is one of the supported versions.
supported() {
  "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

version_of() {
  "$1" -c 'import platform; print(platform.python_version())' 2>/dev/null || echo "not a working Python"
}

# The interpreter that .venv is made with: $PYTHON, or the first supported one that is installed.
find_python() {
  local candidate
  if [[ -n ${PYTHON:-} ]]; then
    supported "$PYTHON" || stop "PYTHON is $PYTHON ($(version_of "$PYTHON")), expected Python 3.10 to 3.13."
    printf '%s\n' "$PYTHON"
    return
  fi
  for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
    if supported "$candidate"; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  stop "python3 is $(version_of python3), expected Python 3.10 to 3.13; install one, or name it: PYTHON=/path/to/python3.12 bash $0"
}

# Use the active virtual environment, or make .venv in the repository and use that.
enter_environment() {
  local folder
  if [[ -n ${VIRTUAL_ENV:-} ]]; then
    folder=$VIRTUAL_ENV
    say "Using the active virtual environment $folder"
  else
    folder=$root/.venv
    if [[ -e $folder ]]; then
      say "Using $folder"
    else
      make_environment "$folder"
    fi
  fi
  python=$folder/bin/python
  stamp=$folder/.avg-llava-installed
  supported "$python" ||
    stop "The Python of $folder is $(version_of "$python"), expected 3.10 to 3.13; deactivate that environment or remove the folder, then run this again."
  "$python" -m pip --version >/dev/null 2>&1 || stop "$folder has no working pip; remove the folder, or run: $python -m ensurepip"
}

# run_name MODEL_PATH MODEL_ARGS MODEL: a folder name for an evaluation, different for every model and granularity policy.
run_name() {
  local policy=${2#granularity=} name
  name=$(basename "$1")-${policy:-auto}
  [[ $3 == avg_llava ]] || name=$3-$name
  printf '%s\n' "${name//[^A-Za-z0-9._=-]/-}"
}

# make_environment FOLDER: an environment of its own, for packages that conflict with the repository's; git ignores it.
make_environment() {
  local folder=$1 base
  [[ ! -e $folder ]] || return 0
  base=$(find_python)
  say "Making $folder with $base ($(version_of "$base"))"
  "$base" -m venv "$folder" || {
    rm -rf "$folder"
    stop "$base could not make a virtual environment; on Debian and Ubuntu install python3-venv, then run this again."
  }
  echo '*' >"$folder/.gitignore"
}

# pip install, without a line for each requirement that was there before.
pip_install() {
  "$python" -m pip install "$@" | { grep --line-buffered -v '^Requirement already satisfied' || true; }
}

# What an installation depends on: where the repository is, and the contents of pyproject.toml.
install_key() {
  "$python" - "$root" <<'PYTHON'
import hashlib, pathlib, sys

root = pathlib.Path(sys.argv[1])
print(hashlib.sha256(str(root).encode() + (root / "pyproject.toml").read_bytes()).hexdigest())
PYTHON
}

# install_package EXTRA: torch first, then this package with an extra ("core" for none). Does nothing if that is installed already.
# The stamp holds the key and the extras that are installed; REINSTALL=1 ignores it.
install_package() {
  local extra=$1 key installed="" target=.
  key=$(install_key)
  if [[ -z ${REINSTALL:-} && -f $stamp ]]; then
    installed=$(awk -v key="$key" '$1 == key { $1 = ""; print }' "$stamp")
    if [[ " $installed " == *" $extra "* ]]; then
      say "Already installed ($extra); REINSTALL=1 installs again"
      return
    fi
  fi
  install_torch
  [[ $extra == core ]] || target=".[$extra]"
  say "Installing this package: pip install -e \"$target\""
  (cd "$root" && pip_install -e "$target" --constraint "$constraint") || {
    rm -f "$constraint"
    stop "pip could not install the package beside torch $torch_version, which it must leave as it is; its message is above."
  }
  rm -f "$constraint"
  printf '%s %s\n' "$key" "$(printf '%s\n' $installed core "$extra" | sort -u | tr '\n' ' ')" >"$stamp"
}

# Install torch if it is missing, and pin the installed version in a constraint file, so that no later step changes it: otherwise a CPU
# build would be replaced by a CUDA build of several gigabytes, or the other way round.
# TORCH_VERSION chooses the version, TORCH_INSTALL_ARGS is passed on to pip (for instance an --index-url for a build of your choice).
install_torch() {
  local -a arguments=()
  if ! "$python" -c 'import torch' 2>/dev/null; then
    say "Installing torch ${TORCH_VERSION:-2.13.0}"
    read -r -a arguments <<<"${TORCH_INSTALL_ARGS:-}"
    pip_install "torch==${TORCH_VERSION:-2.13.0}" ${arguments[@]+"${arguments[@]}"} ||
      stop "pip could not install torch ${TORCH_VERSION:-2.13.0}; choose another build with TORCH_VERSION and TORCH_INSTALL_ARGS."
  fi
  torch_version=$("$python" -c 'from importlib.metadata import version; print(version("torch"))')
  constraint=$(mktemp)
  printf 'torch==%s\n' "$torch_version" >"$constraint"
}
