#!/usr/bin/env bash
# Installs hfkd with its test extra into .venv and runs the linter and the whole test suite.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh "[test]"
.venv/bin/ruff check .
exec .venv/bin/python -m pytest -q -n auto --dist worksteal tests "$@"
