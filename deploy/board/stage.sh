# stage.sh DIR ID KEY WHEEL SUMS: a folder for the new release. What the active one has of it is linked: files by their
# sha256 (rsync's --link-dest takes no --append-verify beside it), and engines that were built from the same bundle.
staging=$dir/staging/$2
for other in "$dir"/staging/*; do [ "$other" = "$staging" ] || rm -rf "$other"; done
mkdir -p "$dir/staging" "$dir/wheels/$4" "$dir/logs" "$dir/cache" "$dir/releases" "$dir/venvs" ||
  fail "no folder can be made in $dir on the board; see there: df -h $dir"
[ -d "$staging" ] || [ ! -d "$dir/releases/$2" ] || cp -al "$dir/releases/$2" "$staging"
mkdir -p "$staging/bundle" || fail "no folder can be made in $dir on the board; see there: df -h $dir"
printf '%s\n' "$5" | while read -r hash name; do
  there=$(sed -n "s/^$hash  //p" "$dir/current/SHA256SUMS" 2>/dev/null | head -n 1)
  [ -z "$there" ] || [ -e "$staging/$name" ] || ln "$dir/current/$there" "$staging/$name"
done
for engine in "$dir"/current/bundle/engines/*.json; do
  grep -qF "\"$3\"" "$engine" 2>/dev/null || continue
  mkdir -p "$staging/bundle/engines"
  cp -lfp "$engine" "${engine%.json}.engine" "$staging/bundle/engines/"
done
exit 0
