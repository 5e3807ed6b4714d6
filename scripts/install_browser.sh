#!/usr/bin/env bash
# Install what the test of examples/browser needs: onnxruntime-web from npm and, as root on Debian, Chromium.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -d examples/browser/node_modules/onnxruntime-web ] ||
    timeout 300 npm install --prefix examples/browser --no-package-lock --no-audit --no-fund --silent
if ! command -v chromium chromium-browser google-chrome >/dev/null; then
    timeout 120 apt-get update -qq
    DEBIAN_FRONTEND=noninteractive timeout 300 apt-get install -qq -y --no-install-recommends chromium >/dev/null
fi
