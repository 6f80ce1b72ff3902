# finish.sh DIR ID VENV ENVIRONMENT: what a staged release has beside its bundle.
cd "$dir/staging/$2" || fail "$dir/staging/$2 is gone from the board; push again"
ln -sfn "../../venvs/$3" venv && printf '%s\n' "$4" >serve.env || fail "$dir is full; see there: df -h $dir"
