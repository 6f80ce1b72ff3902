# activate.sh DIR ID SECONDS: the link gets its new end, and the server its new release, if there is one. If that does
# not become ready in time, or the connection ends before, all is as it was.
id=$2; seconds=$3
old=$(readlink "$dir/current" 2>/dev/null)
find_unit

serve() { # restart the server, if there is one, and wait until it answers
  [ -n "$scope" ] || return 0
  $as systemctl $by reset-failed "$unit" 2>/dev/null
  timeout "$seconds" $as systemctl $by restart "$unit" || return 1  # Type=notify: until READY=1 or the failure
  "$dir/current/venv/bin/python" - "$dir/current/serve.env" "$seconds" <<'PYTHON'
import re, sys, time, urllib.request
url = re.search(r"^EDGE_READY=(.*)$", open(sys.argv[1]).read(), re.MULTILINE)[1]
end = time.monotonic() + float(sys.argv[2])
while time.monotonic() < end:
    try:
        sys.exit(urllib.request.urlopen(url, timeout=5).status != 200)
    except OSError:
        time.sleep(0.2)
sys.exit(1)
PYTHON
}

undo() {
  trap '' TERM HUP INT
  if [ -n "$old" ]; then point "$old" "$dir/current"; else rm -f "$dir/current"; fi
  if [ -n "$old" ]; then serve >/dev/null 2>&1; elif [ -n "$scope" ]; then $as systemctl $by stop "$unit"; fi
}

if [ "$old" = "releases/$id" ]; then rm -rf "$dir/staging/$id"  # it stays, and gets its unit
elif [ -d "$dir/staging/$id" ]; then
  rm -rf "$dir/releases/$id"
  mv "$dir/staging/$id" "$dir/releases/$id" || fail "$dir/releases/$id cannot be made; see there: df -h $dir"
fi
trap 'undo; exit 1' TERM HUP INT
on_disconnect kill -TERM $$
point "releases/$id" "$dir/current" || fail "the link $dir/current cannot be changed; see there: df -h $dir"
serve >"$dir/logs/serve.log" 2>&1 & serving=$!
wait "$serving" || {
  [ -n "$scope" ] && $as journalctl $by -u "$unit" -n 20 --no-pager -o cat >>"$dir/logs/serve.log" 2>/dev/null
  undo
  tail -n 20 "$dir/logs/serve.log" >&2
  kill "$watcher" 2>/dev/null
  exit 1
}
kill "$watcher" 2>/dev/null
trap '' TERM HUP INT
# A line for each release that did, the newest last: the one before it is where --rollback goes.
{ grep -vx "$id" "$dir/history" 2>/dev/null; echo "$id"; } >"$dir/history.new"
mv -f "$dir/history.new" "$dir/history"
