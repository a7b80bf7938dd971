#!/usr/bin/env bash
# Runs the benches, or those named: scripts/bench.sh [fetch|wat|matching|balance|models|training|worker|rebuild ...], each beside its peer
# where there is one. Prints a line for a person and a line of JSON for each figure; the JSON is kept in target/bench/<name>.jsonl. Built with all
# optimisations, each for itself: the first three need neither DataFusion nor candle. `balance` makes some 20 GB of temporary
# files, and its peer more than twice that again; BALANCE_ROWS=20000000 is a size that both get through with 28 GB.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v cargo >/dev/null || export PATH="$HOME/.cargo/bin:$PATH"
scripts/setup.sh bench
export IMG2DATASET=$PWD/.venv-bench/bin/img2dataset
# The peer of `models` and `training` is large; it takes part where `scripts/setup.sh goldens` has been run.
[ ! -x .venv-goldens/bin/python ] || export TRANSFORMERS_PYTHON=$PWD/.venv-goldens/bin/python
export CC2DATASET_PYTHON=$PWD/.venv-bench/bin/python MATCHING_PYTHON=$PWD/.venv-bench/bin/python DUCKDB_PYTHON=$PWD/.venv-bench/bin/python
data=$PWD/.cache/bench
mkdir -p "$data"

[ $# -gt 0 ] || set -- fetch wat matching balance models training worker rebuild
for name in "$@"; do
  package=capfilt-crawler
  case "$name" in
    fetch)
      export FETCH_DATA=$data/fetch
      .venv-bench/bin/python workers/crawler/benches/fetch_data.py "$FETCH_DATA"
      ;;
    wat)
      export CAPFILT_PAGES=$data/pages
      workers/crawler/benches/wat_data.sh "$CAPFILT_PAGES" .venv-bench
      ;;
    matching)
      export MATCHING_DATA=$data/matching
      .venv-bench/bin/python workers/crawler/benches/matching_data.py "$MATCHING_DATA"
      ;;
    balance) package=capfilt-coordinator ;;
    models | training) package=capfilt-models ;;
    worker) package=capfilt-vision ;;
    rebuild) package=capfilt-tests ;;
    *) echo "bench: there is no bench '$name'" >&2 && exit 2 ;;
  esac
  cargo bench --package "$package" --locked --quiet --bench "$name"
done
