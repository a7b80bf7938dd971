#!/usr/bin/env bash
# Fetches the demo's packages, by name, into .cache/demo/packages (about 300 MB). Idempotent.
#
#     demo/get_data.sh [FOLDER [NAME ...]]       with names, only those packages
#
# They are ordinary Debian packages; they are opened, never installed. apt-get checks what it downloads; here only the
# size is looked at, so that half a file from an interrupted copy is fetched again. Three packages are needed, the
# rest makes the site larger.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.cache/demo/packages}
only=" ${*:2} "
mkdir -p "$folder"
cd "$folder"

# name, smallest size in bytes that a whole one has, what it gives
packages="
tuxpaint-stamps-default 100000000 needed
ruby-tanuki-emoji         4000000 needed
wordnet-base              6000000 needed
ruby-gemojione            3000000 wanted
openclipart-svg          20000000 wanted
gcompris-qt-data         30000000 wanted
games-thumbnails         20000000 wanted
pysiogame                10000000 wanted
"

whole() { # whole NAME SIZE: is there a file of this package, and of a plausible size?
  local file
  for file in "$1"_*.deb; do
    [ -f "$file" ] || return 1
    [ "$(wc -c <"$file")" -ge "$2" ] && return 0
    echo "get_data: $file is too small to be whole: fetching it again" >&2
    rm -f "$file"
  done
  return 1
}

updated=
download() { # download NAME: with one update of the package lists if the name is not known yet
  local said
  said=$(apt-get -qq download "$1" 2>&1) && return 0
  if [ -z "$updated" ]; then
    updated=yes
    echo "get_data: apt-get cannot fetch $1 yet: updating the package lists"
    if [ "$(id -u)" = 0 ]; then apt-get -qq update || true; elif command -v sudo >/dev/null; then sudo apt-get -qq update || true; fi
    said=$(apt-get -qq download "$1" 2>&1) && return 0
  fi
  echo "$said" >&2
  return 1
}

missing=
while read -r name size need; do
  [ -n "$name" ] || continue
  [ $# -lt 2 ] || [[ $only = *" $name "* ]] || continue
  whole "$name" "$size" && continue
  if ! command -v apt-get >/dev/null; then
    echo "get_data: apt-get is not here; put a $name package file (.deb) into $folder yourself" >&2
    missing="$missing $name:$need"
    continue
  fi
  echo "get_data: fetching $name ($((size / 1000000)) MB or more)"
  download "$name" || missing="$missing $name:$need"
done <<<"$packages"

for name in $missing; do
  echo "get_data: could not fetch ${name%:*} (${name#*:})" >&2
done
case "$missing" in *:needed*) exit 1 ;; esac
echo "get_data: $(find . -name '*.deb' | wc -l) packages in $folder"
