# verify.sh DIR FOLDER SUMS: the sha256 of what came, as lines of sha256sum; wrong files are deleted and named.
cd "$2" || fail "$2 is gone from the board; push again"
wrong=$(printf '%s\n' "$3" | sha256sum -c 2>/dev/null | sed -n 's/: FAILED.*//p')
if [ -z "$wrong" ]; then
  printf '%s\n' "$3" >SHA256SUMS
  exit 0
fi
printf '%s\n' "$wrong" | while read -r name; do echo "$name"; rm -f "$name"; done
