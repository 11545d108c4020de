# Runs what it is given, line by line, in one shell.
exec 3<&0 </dev/null
__count=0
__run() { eval "$1"; }
trap ':' INT
printf '\036ready\037'
while IFS=' ' read -r -u 3 __name __code; do
  __count=$((__count + 1))
  printf '\036%s begin\037' "$__name"
  trap 'return 130' INT
  __run "$(printf %s "$__code" | base64 -d)"
  __status=$?
  trap ':' INT
  __error=
  [ "$__status" = 0 ] || __error="exit status $__status"
  printf '\036%s end %s\037' "$__name" "$(printf '{"error":"%s","count":%d}' "$__error" "$__count" | base64 -w 0)"
done
