#!/usr/bin/env bash
# Everything that a change must pass: format, lints, documentation, tests. The tests come last: their summary ends the output.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v cargo >/dev/null || export PATH="$HOME/.cargo/bin:$PATH"
if [ -n "${CI:-}" ] && [ -z "${CARGO_TARGET_DIR:-}" ]; then
  # clones come and go, their build output may stay
  export CARGO_TARGET_DIR="${XDG_CACHE_HOME:-$HOME/.cache}/capfilt/target"
fi
# The same cases on every machine; another seed looks further.
export PROPTEST_RNG_SEED=${PROPTEST_RNG_SEED:-7}
export CARGO_TERM_COLOR=${CARGO_TERM_COLOR:-auto}

step() { echo && echo "== $*" && "$@"; }

step cargo fmt --all --check
step cargo clippy --workspace --all-targets --locked --quiet -- -D warnings
RUSTDOCFLAGS="-D warnings" step cargo doc --workspace --no-deps --locked --quiet
if cargo nextest --version >/dev/null 2>&1; then
  step cargo test --workspace --doc --locked --quiet
  step cargo nextest run --workspace --locked --no-fail-fast
else
  step cargo test --workspace --locked --no-fail-fast
fi
