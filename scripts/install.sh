#!/usr/bin/env bash
# Make .venv and install hfkd into it with the extras in $1 (e.g. "[test]"). Run it again to update .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
uv=uv
if ! command -v uv >/dev/null; then
    # Install uv into a folder of the project, to leave the user's Python as it is.
    uv=.uv/bin/uv
    [ -x "$uv" ] || python3 -m pip install --quiet --target .uv uv
fi
[ -x .venv/bin/python ] || "$uv" venv --quiet --python ">=3.10" .venv
"$uv" pip install --quiet --python .venv/bin/python --editable ".${1:-}"
