#!/usr/bin/env bash
# Builds the documentation as a site in site/, with a reference of the Python package; a broken link or anchor fails the build.
#
#   bash scripts/docs.sh            # build, then open site/index.html
#   bash scripts/docs.sh --serve    # build, serve on http://127.0.0.1:8001, and rebuild what changes
#
# Needs  Python 3.10 to 3.13, and a network or local package files for the first run.
# Costs  what scripts/quickstart.sh costs, where that has not run yet; then less than a minute a build.
# Makes  site/, which git ignores, and .venv in the repository unless a virtual environment is active.
# Knobs  PYTHON, TORCH_VERSION, TORCH_INSTALL_ARGS, REINSTALL: see scripts/lib.sh.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

case ${1:-} in
  "") command=(build) ;;
  --serve) command=(serve --dev-addr 127.0.0.1:8001) ;;
  *) stop "$1 is unknown; the only option is --serve." ;;
esac

enter_environment
install_package docs
cd "$root"

say "Building the documentation"
export NO_MKDOCS_2_WARNING=1 # an advertisement of its successor
exec "$python" -m mkdocs "${command[@]}" --strict
