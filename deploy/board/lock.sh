# lock.sh DIR WHO: holds the board's lock until the connection ends. The laptop writes a line every few seconds.
mkdir -p "$dir" 2>/dev/null || fail "the folder $dir cannot be made on the board; choose another with --dir"
[ -w "$dir" ] || fail "the folder $dir on the board is not writable for $(id -un); choose another with --dir"
command -v flock >/dev/null || fail "the board has no flock; run there: sudo apt install util-linux"

end() { # PID WORD [-]: a process (-: and its group), if its command has the word: numbers are used again
  tr '\0' ' ' <"/proc/$1/cmdline" | grep -qF "$2" && kill -s TERM -- "${3:-}$1"
} 2>/dev/null

exec 9>>"$dir/lock"
if ! flock -n 9; then
  age=$(($(date +%s) - $(stat -c %Y "$dir/lock.holder" 2>/dev/null || date +%s)))
  holder=$(sed -n 's/^who //p' "$dir/lock.holder" 2>/dev/null)
  # Who was cut off without a word leaves a process that waits for lines which do not come any more.
  [ "$age" -gt 60 ] && end "$(sed -n 's/^pid //p' "$dir/lock.holder")" edge-deploy
  [ "$age" -gt 60 ] && flock -w 5 9 || fail "the board is in use by ${holder:-another push}; wait until it has ended"
fi
printf 'pid %s\nwho %s\n' "$$" "$2" >"$dir/lock.holder"
# What a lost connection left running would write into the same folders.
[ -s "$dir/running" ] && end "$(cat "$dir/running")" "$dir/" -
rm -f "$dir/running"
echo "$dir"
while read -r _; do touch "$dir/lock.holder"; done
rm -f "$dir/lock.holder"
