# Sourced: starts the server of a corpus, which ends with the script that sources this, and sets `port`. Needs `python`, `server`, `corpus`.
exec {lines}< <(exec "$python" "$server" "$corpus" --port 0 2>/dev/null)
pid=$!
trap 'kill "$pid" 2>/dev/null || true' EXIT
read -r -t 60 -u "$lines" first || { echo "${0##*/}: $server did not start" >&2 && exit 1; }
port=$(sed -n 's/.*127\.0\.0\.1:\([0-9]\{1,\}\).*/\1/p' <<<"$first")
[ -n "$port" ] || { echo "${0##*/}: no port in the server's first line: $first" >&2 && exit 1; }
