#!/usr/bin/env bash
# Runs capfilt on a corpus whose truth is known and judges the result.
#
#     tests/judge_corpus.sh CORPUS SERVER [FOLDER] [-- FURTHER ARGUMENTS OF capfilt run]
#
# CORPUS is a folder with the corpus: web/ and whatever its server needs, annotated/annotated.json, heldout/seen.json,
# queries.tsv, truth.jsonl. SERVER is the Python program that serves it: called as `SERVER CORPUS --port 0`, it prints its
# port in its first line and answers as an HTTP proxy and at /__stats. FOLDER is for the store, the report and
# judgement.json (default: a new folder below /tmp, named at the end). For example, two rounds with a lower threshold:
#
#     tests/judge_corpus.sh corpus serve_web.py out -- --set run.rounds=2 --set build.min_itm=0.4
set -euo pipefail
usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" >&2 && exit 2; }
[ $# -ge 2 ] || usage
corpus=$(cd "$1" && pwd)
server=$(cd "$(dirname "$2")" && pwd)/$(basename "$2")
shift 2
folder=
if [ $# -gt 0 ] && [ "$1" != -- ]; then
  mkdir -p "$1"
  folder=$(cd "$1" && pwd)
  shift
fi
[ $# -eq 0 ] || { [ "$1" = -- ] && shift; } || usage
cd "$(dirname "$0")/.."
[ -n "$folder" ] || folder=$(mktemp -d -t capfilt-corpus-XXXXXX)
command -v cargo >/dev/null || export PATH="$HOME/.cargo/bin:$PATH"
python=.venv/bin/python

scripts/setup.sh test
cargo build --package capfilt --locked
. scripts/serve_corpus.sh

started=$SECONDS
status=0
"${CARGO_TARGET_DIR:-target}/debug/capfilt" run tests/corpus.toml \
  --set "run.store=$folder/store" --set "worker.runtime.work_dir=$folder/work" --set "queries.path=$corpus/queries.tsv" --set "report.path=$folder/report.html" \
  --set "annotated.sources.0.annotations=$corpus/annotated/annotated.json" --set "heldout.sources.0.annotations=$corpus/heldout/seen.json" \
  --set "worker.crawler.proxy=http://127.0.0.1:$port" "$@" || status=$?
echo "judge_corpus: the run took $((SECONDS - started)) s and ended with $status"
# 4: done, but some tasks were given up; there is something to judge
[ "$status" = 0 ] || [ "$status" = 4 ] || exit "$status"
judged=0
"$python" tests/judge_corpus.py --truth "$corpus/truth.jsonl" --store "$folder/store" --queries "$corpus/queries.tsv" \
  --stats "http://127.0.0.1:$port/__stats" --json "$folder/judgement.json" || judged=$?
echo "judge_corpus: store, report and judgement.json are in $folder"
exit "$judged"
