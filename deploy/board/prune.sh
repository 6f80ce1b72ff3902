# prune.sh DIR KEEP: the last KEEP good releases stay; others go, and environments and wheels that none needs.
tail -n "$2" "$dir/history" >"$dir/history.new" && mv -f "$dir/history.new" "$dir/history"
for release in "$dir"/releases/*; do
  [ -d "$release" ] && ! grep -qx "${release##*/}" "$dir/history" && rm -rf "$release" && echo "${release##*/}"
done
used=" $(for link in "$dir"/releases/*/venv; do readlink "$link"; done | sed 's|.*/||' | tr '\n' ' ')"
for venv in "$dir"/venvs/*; do
  case $used in *" ${venv##*/} "*) ;; *) rm -rf "$venv" ;; esac
done
for wheel in "$dir"/wheels/*; do
  case $used in *" ${wheel##*/}"-*) ;; *) rm -rf "$wheel" ;; esac
done
rm -rf "$dir/staging" "$dir/wheelhouse"
