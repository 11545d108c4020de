#!/usr/bin/env bash
# Fuzzes what reads bytes of strangers (fuzz/README.md). Builds the program with coverage counters, once, and runs it for
# each target over its corpus.
#
#   deploy/fuzz.sh [target...]          each for $FUZZ_SECONDS (300), $FUZZ_JOBS (the number of cores) at a time
#   deploy/fuzz.sh --merge [target...]  takes into fuzz/corpora the least inputs that reach all that was ever reached
#
# New inputs are kept in target/fuzz/corpus, so that the next run goes on from there; what breaks a law is put into
# target/fuzz/found and the exit code is 1. The seed may be set by $FUZZ_SEED.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

read -ra flags <<<"${CARGO_FLAGS:-}"
read -ra libfuzzer <<<"${FUZZ_FLAGS:-}"
seconds=${FUZZ_SECONDS:-300}
jobs=${FUZZ_JOBS:-$(nproc)}
root=${CARGO_TARGET_DIR:-target}/fuzz
merge=false

# Name and longest input of each, as the code has them.
mapfile -t known < <(sed -n 's/^ *target("\([a-z0-9_]*\)", \([0-9]*\), .*/\1 \2/p' fuzz/src/lib.rs)

chosen=()
for argument in "$@"; do
  case $argument in
    --merge) merge=true ;;
    -h | --help) sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    *)
      [[ " ${known[*]%% *} " == *" $argument "* ]] || { echo "fuzz: unknown target '$argument'; there are ${known[*]%% *}" >&2; exit 64; }
      chosen+=("$argument") ;;
  esac
done
[[ ${#chosen[@]} != 0 ]] || chosen=("${known[@]%% *}")

# Our own crates with counters (LLVM's own, for which any rustc will do) and optimised; all else is what the tests are built
# with, and is not built again. No address sanitizer: what is fuzzed is safe Rust.
echo "fuzz: building (some minutes, once)"
optimised=()
for package in netd sandgate-api sandgate-fuzz sandgate-policy sandgate-relay; do
  optimised+=(--config "profile.dev.package.$package.opt-level=1")
done
RUSTC_WORKSPACE_WRAPPER=$PWD/fuzz/rustc.sh cargo build "${flags[@]}" "${optimised[@]}" -p sandgate-fuzz --features engine --bin fuzz
program=${CARGO_TARGET_DIR:-target}/debug/fuzz
mkdir -p "$root/found" "$root/log"

longest() { printf '%s\n' "${known[@]}" | awk -v name="$1" '$1 == name { print $2 }'; }

fuzz() {
  local name=$1 dictionary=fuzz/dictionaries/$1 log=$root/log/$1 options=() result=0
  mkdir -p "$root/corpus/$name"
  [[ ! -e $dictionary ]] || options+=("-dict=$dictionary")
  [[ -z ${FUZZ_SEED:-} ]] || options+=("-seed=$FUZZ_SEED")
  FUZZ_TARGET=$name "$program" -max_total_time="$seconds" -max_len="$(longest "$name")" -timeout=25 -rss_limit_mb=2048 \
    -artifact_prefix="$root/found/$name-" -print_final_stats=1 "${options[@]}" "${libfuzzer[@]}" \
    "$root/corpus/$name" "fuzz/corpora/$name" >"$log" 2>&1 || result=$?
  local units reached
  units=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
  reached=$(sed -n 's/.* cov: \([0-9]*\) ft: \([0-9]*\) .*/\1 edges, \2 features/p' "$log" | tail -1)
  if [[ $result == 0 ]]; then
    echo "fuzz: $name: ${units:-?} inputs, ${reached:-nothing reached}, nothing found"
  else
    echo "fuzz: $name: FOUND after ${units:-?} inputs; see $log:" >&2
    grep -a -m 5 -E "panicked at|ERROR|Test unit written|^[^#]*(left|right):" -A 1 "$log" | cut -c1-300 >&2 || tail -5 "$log" >&2
  fi
  return "$result"
}

# What was once found stays, however little it adds.
merge() {
  local name=$1 least kept
  least=$(mktemp -d)
  FUZZ_TARGET=$name "$program" -merge=1 -max_len="$(longest "$name")" -timeout=25 "${libfuzzer[@]}" \
    "$least" "fuzz/corpora/$name" "$root/corpus/$name" >"$root/log/$name-merge" 2>&1
  find "fuzz/corpora/$name" -type f ! -name 'found-*' -delete
  cp "$least"/* "fuzz/corpora/$name/"
  kept=$(find "$least" -type f | wc -l)
  rm -rf "$least"
  echo "fuzz: $name: $kept inputs, $(du -sb --apparent-size "fuzz/corpora/$name" | cut -f1) bytes"
}

if $merge; then
  for name in "${chosen[@]}"; do
    mkdir -p "$root/corpus/$name"
    merge "$name"
  done
  exit
fi

failed=0 running=0
for name in "${chosen[@]}"; do
  if ((running >= jobs)); then
    wait -n || failed=1
    running=$((running - 1))
  fi
  fuzz "$name" &
  running=$((running + 1))
done
while ((running > 0)); do
  wait -n || failed=1
  running=$((running - 1))
done
exit "$failed"
