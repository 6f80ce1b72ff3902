# service.sh DIR SCOPE TEXT: installs the unit for this user or for the system; it starts with the next release.
find_unit
if [ -n "$scope" ] && [ "$scope" != "$2" ]; then
  $as systemctl $by disable --now "$unit" 2>/dev/null
  if [ "$scope" = user ]; then rm -f "$HOME/.config/systemd/user/$unit"; else $as rm -f "/etc/systemd/system/$unit"; fi
fi
use_manager "$2"
if [ "$scope" = system ]; then
  printf '%s' "$3" | $as tee "/etc/systemd/system/$unit" >/dev/null || fail "/etc/systemd/system is not writable as root"
else
  mkdir -p "$HOME/.config/systemd/user" && printf '%s' "$3" >"$HOME/.config/systemd/user/$unit" ||
    fail "$HOME/.config/systemd/user on the board is not writable"
  # Without lingering a user's units end with the last login.
  loginctl enable-linger 2>/dev/null || sudo -n loginctl enable-linger "$(id -un)" 2>/dev/null ||
    echo "the server ends when $(id -un) logs out; run on the board: sudo loginctl enable-linger $(id -un)"
fi
$as systemctl $by daemon-reload && $as systemctl $by enable --quiet "$unit" || fail "systemd did not take the unit"
