#!/usr/bin/env bash
# Makes .venv and installs hfkd into it with the extras named in $1 (e.g. "[test]"); run again, it brings it up to date.
set -euo pipefail
cd "$(dirname "$0")/.."
uv=uv
if ! command -v uv >/dev/null; then
    # Into a folder of the project: the user's own or an externally managed Python stays as it is.
    uv=.uv/bin/uv
    [ -x "$uv" ] || python3 -m pip install --quiet --target .uv uv
fi
[ -x .venv/bin/python ] || "$uv" venv --quiet --python ">=3.10" .venv
"$uv" pip install --quiet --python .venv/bin/python --editable ".${1:-}"
