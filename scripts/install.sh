#!/usr/bin/env bash
# Make .venv and install hfkd into it with the extras in $1 (e.g. "[test]"). Run it again to update .venv.
# With --lowest as $2 make .venv-lowest, with the oldest versions of the libraries, and Python 3.10 where there is one.
set -euo pipefail
cd "$(dirname "$0")/.."
uv=uv
if ! command -v uv >/dev/null; then
    # Install uv into a folder of the project, to leave the user's Python as it is.
    uv=.uv/bin/uv
    [ -x "$uv" ] || python3 -m pip install --quiet --target .uv uv
fi
environment=.venv python=">=3.10" resolution=highest
if [ "${2:-}" = --lowest ]; then
    environment=.venv-lowest resolution=lowest-direct
    "$uv" python find 3.10 >/dev/null 2>&1 && python=3.10
fi
[ -x "$environment/bin/python" ] || "$uv" venv --quiet --python "$python" "$environment"
"$uv" pip install --quiet --python "$environment/bin/python" --resolution "$resolution" --editable ".${1:-}"
