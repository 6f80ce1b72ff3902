# before.sh DIR: the active release, and the good one before it that is still there.
current=$(readlink "$dir/current" 2>/dev/null); current=${current##*/}
sed "/^$current\$/,\$d" "$dir/history" 2>/dev/null | while read -r id; do
  [ -d "$dir/releases/$id" ] && echo "$current $id"
done | tail -n 1
