# Goes before every script here. They run as `sh -c`, their standard input open as long as the connection is:
# its end is how a board learns that the laptop is gone. The first argument of each is the folder of all that is pushed.
set -u
LC_ALL=C.UTF-8; export LC_ALL
unit=edge-serve.service
dir=$1; case $dir in /*) ;; *) dir=$HOME/$dir ;; esac

fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

# Runs a command if the connection ends; `kill $watcher` calls that off.
on_disconnect() {
  exec 3<&0
  (
    trap 'kill "$reader" 2>/dev/null; exit' TERM
    cat <&3 & reader=$!
    wait "$reader"
    "$@"
  ) >/dev/null 2>&1 &
  watcher=$!
}

# Runs a command in a process group of its own, and ends it if the connection ends; -> its exit code.
guarded() {
  setsid "$@" </dev/null &
  group=$!
  echo "$group" >"$dir/running"
  on_disconnect end_group "$group"
  wait "$group"; status=$?
  kill "$watcher" 2>/dev/null
  rm -f "$dir/running"
  return "$status"
}

end_group() { # PID, which has no group of its own in its first moment
  kill -s TERM -- "-$1" || kill -s TERM "$1"
}

# A link that is never absent: made beside its place, then renamed to it.
point() { # TARGET LINK
  ln -sfn "$1" "$2.new" && mv -fT "$2.new" "$2" && sync -f "${2%/*}"
}

# Where the unit is installed: sets scope to user, system or "", and how its manager is called: $as systemctl $by ...
find_unit() {
  scope=; as=env; by=--system
  if grep -qF "$dir/" "$HOME/.config/systemd/user/$unit" 2>/dev/null; then use_manager user
  elif grep -qF "$dir/" "/etc/systemd/system/$unit" 2>/dev/null; then use_manager system; fi
}

use_manager() { # user or system
  scope=$1; by=--$1; as=env
  if [ "$1" = user ]; then as="env XDG_RUNTIME_DIR=${XDG_RUNTIME_DIR:-/run/user/$(id -u)}"
  elif [ "$(id -u)" != 0 ]; then as="sudo -n"; fi
}
