#!/usr/bin/env bash
# Install hfkd with its test extra into .venv, run the linter, mypy, the build of the site and the whole test suite, and
# name its slowest tests. With --lowest first: the test suite alone, in .venv-lowest, with the oldest libraries that
# setup.cfg allows.
set -euo pipefail
cd "$(dirname "$0")/.."
# Many tests start Python. Without stored bytecode each compiles 4,000 modules, and takes 18 seconds instead of 8.
unset PYTHONDONTWRITEBYTECODE
if [ "${1:-}" = --lowest ]; then
    shift
    bash scripts/install.sh "[test]" --lowest
    exec .venv-lowest/bin/python -m pytest -q -n auto --dist worksteal --durations=25 "${@:-tests}"
fi
bash scripts/install.sh "[test]"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet
exec .venv/bin/python -m pytest -q -n auto --dist worksteal --durations=25 tests "$@"
