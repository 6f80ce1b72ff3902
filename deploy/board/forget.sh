# forget.sh DIR ID: a release that one went back from is not one to go back to.
grep -vx "$2" "$dir/history" >"$dir/history.new" && mv -f "$dir/history.new" "$dir/history"
