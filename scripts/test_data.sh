#!/usr/bin/env bash
# Fetches, once, the real data that tests read, out of ordinary packages, into .cache/test-data (about 35 MB; what is downloaded for it is
# removed, but for wordnet-base). Called by scripts/setup.sh test.
#
#     query_sources/       WordNet's database (Debian's wordnet-base) and word counts (PyPI's wordfreq)
#     enwiki.xml.bz2       206 pages of a dump of the English Wikipedia, as gensim's wheel carries it
set -euo pipefail
cd "$(dirname "$0")/.."
data=.cache/test-data
python=.venv/bin/python
say() { echo "test data: $*"; }
fail() { echo "test data: $*" >&2 && exit 1; }
mkdir -p "$data/packages"

if ! [ -f "$data/query_sources/made_of.txt" ]; then
  demo/get_data.sh "$data/packages" wordnet-base
  "$python" demo/query_sources.py --packages "$data/packages" --out "$data/query_sources"
fi

if ! [ -f "$data/enwiki.xml.bz2" ]; then
  say "fetching a piece of Wikipedia (gensim's wheel from PyPI, 28 MB)"
  wheel=$(mktemp -d)
  trap 'rm -rf "$wheel"' EXIT
  # One wheel for all machines: it is only unpacked.
  "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --dest "$wheel" \
    --python-version 3.11 --implementation cp --abi cp311 --platform manylinux_2_28_x86_64 gensim==4.4.0 || fail "could not fetch gensim from PyPI"
  "$python" - "$wheel"/gensim-*.whl "$data/enwiki.xml.bz2" <<'PYTHON'
import os, sys, zipfile

with zipfile.ZipFile(sys.argv[1]) as wheel:
    name = next(n for n in wheel.namelist() if n.endswith("/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"))
    with open(sys.argv[2] + ".part", "wb") as file:
        file.write(wheel.read(name))
os.replace(sys.argv[2] + ".part", sys.argv[2])
PYTHON
  say "$data holds a piece of Wikipedia, WordNet and word counts"
fi
