# logs.sh DIR LINES FOLLOW: the server's journal, or what the last push and bench left in files.
find_unit
if [ -n "$scope" ]; then
  set -- $as journalctl $by -u "$unit" --no-pager -n "$2" ${3:+-f}
else
  [ -d "$dir/logs" ] || fail "there are no logs in $dir on the board; nothing was pushed there"
  cd "$dir/logs" || exit 1
  set -- tail -n "$2" ${3:+-F} -v -- *.log
fi
guarded "$@"
