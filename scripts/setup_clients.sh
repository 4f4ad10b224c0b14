#!/usr/bin/env bash
# Makes the environment of the stock clients that tests/clients asks with: OpenAI's SDKs, LangChain, LiteLLM, LlamaIndex, pydantic-ai,
# instructor, the Vercel AI SDK, and the routers of vLLM and SGLang.
#
#   bash scripts/setup_clients.sh
#
# Needs  Python 3.10 to 3.13, and a network or local package files; Node.js 20 or newer with npm for the JavaScript clients, which are left
#        out without it.
# Costs  about 0.9 GB of disk, two minutes.
# Makes  .venv-clients in the repository and nothing elsewhere; an active environment is left alone. Run it as often as you like.
# Why    their requirements exclude one another's and ours; none of them is needed to use this project.
# Knobs  CLIENTS_ENV: another folder. PYTHON, REINSTALL: see scripts/lib.sh.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

folder=${CLIENTS_ENV:-$root/.venv-clients}
clients=$root/tests/clients
python=$folder/bin/python

make_environment "$folder"

key=$(cat "$clients/requirements.txt" "$clients/package.json" "${BASH_SOURCE[0]}" | cksum)
if [[ -z ${REINSTALL:-} && $(cat "$folder/.clients-installed" 2>/dev/null) == "$key" ]]; then
  say "The clients are already installed; REINSTALL=1 installs again"
  exit 0
fi
say "Installing the Python clients and the routers"
pip_install -r "$clients/requirements.txt" || stop "pip could not install tests/clients/requirements.txt; its message is above."
if command -v npm >/dev/null; then
  say "Installing the JavaScript clients"
  cp "$clients/package.json" "$folder/package.json"
  npm install --silent --no-audit --no-fund --prefix "$folder" || stop "npm could not install tests/clients/package.json; its message is above."
else
  say "There is no npm: the JavaScript clients are left out"
fi
echo "$key" >"$folder/.clients-installed"
