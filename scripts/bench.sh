#!/usr/bin/env bash
# Runs the benches, or the one named: scripts/bench.sh [fetch|models|rebuild|wat], each beside its peer where there is one. Prints a line for
# a person and a line of JSON for each figure; the JSON is kept in target/bench/<name>.jsonl. Built in the one profile of everything.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v cargo >/dev/null || export PATH="$HOME/.cargo/bin:$PATH"
scripts/setup.sh bench
export IMG2DATASET=$PWD/.venv-bench/bin/img2dataset
# The peer of `models` is large; it takes part where `scripts/setup.sh goldens` has been run.
[ ! -x .venv-goldens/bin/python ] || export BLIP_PYTHON=$PWD/.venv-goldens/bin/python
if [ "${1:-wat}" = wat ]; then
  export CAPFILT_PAGES=$PWD/.cache/bench/pages CC2DATASET_PYTHON=$PWD/.venv-bench/bin/python
  mkdir -p .cache/bench && workers/crawler/benches/wat_data.sh "$CAPFILT_PAGES" .venv-bench
fi
if [ $# -gt 0 ]; then selection=(--bench "$1"); else selection=(--bench fetch --bench models --bench rebuild --bench wat); fi
exec cargo bench --profile dev --workspace --locked --quiet "${selection[@]}"
