#!/usr/bin/env bash
# Runs the benches, or the one named: scripts/bench.sh [NAME]
set -euo pipefail
cd "$(dirname "$0")/.."
command -v cargo >/dev/null || export PATH="$HOME/.cargo/bin:$PATH"
exec cargo bench --workspace --locked ${1:+--bench "$1"}
