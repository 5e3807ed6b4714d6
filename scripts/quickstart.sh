#!/usr/bin/env bash
# Installs hfkd into .venv, trains a teacher and three students on scikit-learn's digits, and prints one table.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh
.venv/bin/python scripts/quickstart.py
