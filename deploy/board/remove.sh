# remove.sh DIR list|delete: what push and bench put on the board, each with its size; and its end.
case $dir in /*) ;; *) dir=$HOME/$dir ;; esac
find_unit
own="current current.new releases staging venvs wheels wheelhouse cache logs reports history history.new running lock \
lock.holder clocks.mode clocks.conf"
if [ "$2" = list ]; then
  [ -n "$scope" ] && echo "the $scope unit $unit"
  for name in $own; do
    [ -e "$dir/$name" ] || [ -L "$dir/$name" ] && echo "$dir/$name ($(du -sh "$dir/$name" | cut -f 1))"
  done
  exit 0
fi
if [ -n "$scope" ]; then
  $as systemctl $by disable --now "$unit" || fail "the unit could not be stopped; run on the board: systemctl $by stop $unit"
  if [ "$scope" = user ]; then rm -f "$HOME/.config/systemd/user/$unit"; else $as rm -f "/etc/systemd/system/$unit"; fi
  $as systemctl $by daemon-reload
fi
for name in $own; do rm -rf "${dir:?}/$name"; done
rmdir "$dir" 2>/dev/null || echo "left: $dir (it has other files)"
