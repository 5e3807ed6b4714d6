#!/usr/bin/env bash
# Makes .venv and installs hfkd into it with the extras named in $1 (e.g. "[test]"); nothing to do where it is up to date.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! command -v uv >/dev/null; then
    python3 -m pip install --quiet --user uv || python3 -m pip install --quiet --user --break-system-packages uv
    export PATH="$(python3 -m site --user-base)/bin:$PATH"
fi
[ -d .venv ] || uv venv --quiet .venv
uv pip install --quiet --python .venv --editable ".${1:-}"
