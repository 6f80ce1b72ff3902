# edge.sh DIR LOG VENV ARGUMENTS...: an `edge` command of an environment; what it says on stderr is kept in logs/LOG.
log=$dir/logs/$2; venv=$3; shift 3
EDGE_CACHE=$dir/cache NO_COLOR=1; export EDGE_CACHE NO_COLOR
cd "$dir" || fail "$dir is gone from the board; push again"
guarded "$venv/bin/edge" "$@" 2>"$log"; status=$?
cat "$log" >&2
exit "$status"
