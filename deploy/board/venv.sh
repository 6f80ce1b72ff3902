# venv.sh DIR NAME PYTHON WHEEL EXTRAS WHEELHOUSE: an environment that sees the system's packages; a ready one stays.
venv=$dir/venvs/$2
[ -e "$venv/ready" ] && exit 0
rm -rf "$venv"
set -- "$3" "$4" "$5" "$6"
install() {
  if [ -n "$wheelhouse" ]; then set -- --no-index --find-links "$wheelhouse" "$@"; fi
  guarded "$venv/bin/python" -m pip --disable-pip-version-check --no-input install --quiet "$@"
}
wheelhouse=$4
# First the wheel by itself: a system's own copy of the same version must not do instead of it.
# Then what it needs and the system does not have.
{ guarded "$1" -m venv --system-site-packages "$venv" &&
  install --no-deps --force-reinstall "$2" && install "minicpm-edge[$3]"; } >"$dir/logs/venv.log" 2>&1 || {
  cat "$dir/logs/venv.log" >&2
  rm -rf "$venv"
  exit 1
}
touch "$venv/ready"
