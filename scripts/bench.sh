#!/usr/bin/env bash
# Runs the benches, or the one named: scripts/bench.sh [fetch|models|rebuild]. They are built in the one profile of everything.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v cargo >/dev/null || export PATH="$HOME/.cargo/bin:$PATH"
if [ $# -gt 0 ]; then selection=(--bench "$1"); else selection=(--bench fetch --bench models --bench rebuild); fi
exec cargo bench --profile dev --package capfilt-tests --locked --quiet "${selection[@]}"
