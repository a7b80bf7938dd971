#!/usr/bin/env bash
# Makes the small checkpoints of the tests again: for each tests/checkpoints/<role>.json (settings of the trainer and of the judge), trains on
# the demo's annotated pictures, judges on its held-out ones, and replaces tests/checkpoints/<role>/. The filter starts from the captioner.
#
#     scripts/checkpoint.sh [ROLE ...]        without a role: captioner, then filter
#
# An unfinished training goes on from where it was saved. The same settings and pictures give the same files on the same kind of CPU.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v cargo >/dev/null || export PATH="$HOME/.cargo/bin:$PATH"
data=.cache/demo
folder=tests/checkpoints

roles=("$@")
[ ${#roles[@]} -gt 0 ] || roles=(captioner filter)
for role in "${roles[@]}"; do
  [ -f "$folder/$role.json" ] || { echo "checkpoint: there is no $folder/$role.json" >&2 && exit 2; }
done

scripts/setup.sh demo
demo/get_data.sh "$data/packages"
.venv/bin/python demo/build_site.py --packages "$data/packages" --out "$data"
for role in "${roles[@]}"; do
  echo "checkpoint: training $role"
  parent=()
  [ "$role" = captioner ] || parent=("$folder/captioner")
  cargo run --quiet --package capfilt-trainer --example train_coco --locked -- \
    "$folder/$role.json" "$data/annotated/annotated.json" "$data/heldout/heldout.json" "$folder/$role" "${parent[@]}"
done
