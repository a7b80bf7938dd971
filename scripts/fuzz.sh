#!/usr/bin/env bash
# Fuzzes the parsers of foreign bytes with cargo-fuzz: scripts/fuzz.sh [SECONDS] [TARGET...]; 600 seconds and all targets if not given.
# Needs a nightly toolchain and a C++ compiler. Corpora stay in .cache/fuzz. An input that breaks a parser is kept in
# workers/crawler/fuzz/artifacts; make it small, mend the parser, and move it to workers/crawler/fuzz/regressions/<target>/.
set -euo pipefail
cd "$(dirname "$0")/../workers/crawler"
command -v cargo >/dev/null || export PATH="$HOME/.cargo/bin:$PATH"
seconds=${1:-600}
shift || true
targets=("$@")
[ ${#targets[@]} -gt 0 ] || mapfile -t targets < <(sed -n 's/^path = "fuzz_targets\/\(.*\)\.rs"$/\1/p' fuzz/Cargo.toml)
cargo +nightly --version >/dev/null 2>&1 || { echo "fuzz: a nightly toolchain is needed: rustup toolchain install nightly" >&2 && exit 1; }
cargo fuzz --version >/dev/null 2>&1 || cargo install --quiet cargo-fuzz
cache=$(cd ../.. && pwd)/.cache/fuzz
failed=0
for target in "${targets[@]}"; do
  mkdir -p "$cache/$target" "fuzz/regressions/$target"
  echo "== fuzz $target for $seconds s"
  log=$cache/$target.log
  cargo +nightly fuzz run --release "$target" "$cache/$target" "fuzz/regressions/$target" "fuzz/seeds/$target" -- \
    -max_total_time="$seconds" -timeout=20 -rss_limit_mb=4096 -max_len=65536 -print_final_stats=1 >"$log" 2>&1 ||
    { echo "fuzz: $target broke; see $log and workers/crawler/fuzz/artifacts/$target" >&2 && failed=1; }
  grep -E '^(stat::|SUMMARY|#[0-9]+.*(DONE|INITED))' "$log" || tail -n 20 "$log" >&2
done
exit "$failed"
