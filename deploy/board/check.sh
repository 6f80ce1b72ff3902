# check.sh DIR: facts of the board, a line each, `has` for each file of the active release; changes nothing.
echo "arch $(uname -m)"
echo "user $(id -un)"
echo "disk_kb $(df -Pk "$dir" | awk 'NR == 2 { print $4 }')"
awk '$1 == "MemTotal:" { print "memory_kb " $2 } $1 == "MemAvailable:" { print "available_kb " $2 }' /proc/meminfo
command -v rsync >/dev/null && echo "rsync yes"
[ -r /etc/nv_tegra_release ] && echo "l4t $(head -n 1 /etc/nv_tegra_release)"
# The system's own Python first: only that one sees JetPack's TensorRT.
for name in python3 python3.10 python3.12 python3.11 python3.13; do
  found=$(command -v "$name") || continue
  version=$("$found" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
  case $version in 3.10 | 3.11 | 3.12 | 3.13) ;; *) echo "old_python $version"; continue ;; esac
  "$found" -c 'import ensurepip, venv' 2>/dev/null || { echo "bare_python $version"; continue; }
  echo "python $found $version"
  break
done
current=$(readlink "$dir/current" 2>/dev/null) && echo "current ${current##*/}"
sed -n 's/^\([0-9a-f]*\) .*/has \1/p' "$dir/current/SHA256SUMS" 2>/dev/null
for staged in "$dir"/staging/*; do
  [ -d "$staged" ] && echo "staged $(du -sk --apparent-size "$staged" | cut -f 1) ${staged##*/}"
done
for ready in "$dir"/venvs/*/ready; do [ -e "$ready" ] && ready=${ready%/ready} && echo "venv ${ready##*/}"; done
if [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null; then echo "root yes"; fi
find_unit
echo "unit $scope"
