#!/usr/bin/env bash
# Install hfkd into .venv, train a teacher and three students on scikit-learn's digits, and print one table.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh
.venv/bin/python scripts/quickstart.py
