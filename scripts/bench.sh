#!/usr/bin/env bash
# Runs the benches, or the one named: scripts/bench.sh [fetch|models|rebuild|balance], each beside its peer where there is one. Prints a
# line for a person and a line of JSON for each figure; the JSON is kept in target/bench/<name>.jsonl. Built in the one profile of
# everything, but for `balance`: most of its time is spent in libraries below ours, so it is a release build, which takes a while. It
# makes some 20 GB of temporary files; BALANCE_ROWS=5000000 makes it a tenth of that.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v cargo >/dev/null || export PATH="$HOME/.cargo/bin:$PATH"
scripts/setup.sh bench
export IMG2DATASET=$PWD/.venv-bench/bin/img2dataset
# The peer of `models` is large; it takes part where `scripts/setup.sh goldens` has been run.
[ ! -x .venv-goldens/bin/python ] || export BLIP_PYTHON=$PWD/.venv-goldens/bin/python
export DUCKDB_PYTHON=$PWD/.venv-bench/bin/python
selection=(--bench fetch --bench models --bench rebuild)
[ $# -eq 0 ] || selection=(--bench "$1")
if [ "${1:-}" != balance ]; then cargo bench --profile dev --workspace --locked --quiet "${selection[@]}"; fi
if [ "${1:-balance}" = balance ]; then cargo bench --package capfilt-coordinator --locked --quiet --bench balance; fi
