# bench.sh DIR MODE NAME ARGUMENTS...: `edge bench` on the active release with clocks and power mode held, if that is
# allowed without a password; they are given back in every case. Its reports: reports/NAME.*.
mode=$2; name=$3; shift 3
stored=$dir/clocks
cd "$dir" || fail "$dir is gone from the board; push a bundle first"
[ -e "$dir/current/bundle" ] || fail "no bundle is active on the board; run deploy/push first"
mkdir -p "$dir/reports" "$dir/logs"
told() { echo "condition $*" >&2; }
as_root() { if [ "$(id -u)" = 0 ]; then "$@" </dev/null; else sudo -n "$@" </dev/null; fi; }

restore() {
  trap '' INT TERM HUP
  if [ -e "$stored.mode" ]; then
    as_root nvpmodel -m "$(cat "$stored.mode")" >/dev/null 2>&1 && rm -f "$stored.mode" ||
      told "the power mode could not be set back to $(cat "$stored.mode")"
  fi
  if [ -e "$stored.conf" ]; then
    as_root jetson_clocks --restore "$stored.conf" >/dev/null 2>&1 && as_root rm -f "$stored.conf" ||
      told "the clocks could not be set back; run on the board: sudo jetson_clocks --restore $stored.conf"
  fi
}

# What an earlier run could not give back, because the board's own process was killed.
[ -e "$stored.mode" ] || [ -e "$stored.conf" ] && { restore; told "an earlier run's clocks were set back first"; }
trap restore EXIT
trap 'exit 130' INT TERM HUP

was=$( { nvpmodel -q || as_root nvpmodel -q; } </dev/null 2>/dev/null | awk '/^[0-9]+$/ { print; exit }')
if [ -z "$was" ]; then told "power mode not held: this board has no nvpmodel, or it does not tell"
elif [ "$mode" = keep ] || [ "$mode" = "$was" ]; then told "power mode $was, as it was"
else
  echo "$was" >"$stored.mode"
  if said=$(as_root nvpmodel -m "$mode" 2>&1); then told "power mode $mode, for this run instead of $was"
  else rm -f "$stored.mode"; told "power mode $was, not $mode: $(echo "$said" | tail -n 1)"; fi
fi
if ! command -v jetson_clocks >/dev/null; then told "clocks not locked: this board has no jetson_clocks"
elif ! said=$(as_root jetson_clocks --store "$stored.conf" 2>&1); then
  told "clocks not locked: $(echo "$said" | tail -n 1)"
elif ! said=$(as_root jetson_clocks 2>&1); then
  told "clocks not locked: $(echo "$said" | tail -n 1)"
else told "clocks locked by jetson_clocks"; fi

EDGE_CACHE=$dir/cache NO_COLOR=1; export EDGE_CACHE NO_COLOR
out=$dir/reports/$name
guarded "$dir/current/venv/bin/edge" bench "$dir/current/bundle" "$@" \
  --html "$out.html" --markdown "$out.md" --output "$out.json"
