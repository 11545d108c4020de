#!/usr/bin/env bash
# Compiles the workspace's own crates with coverage counters: the RUSTC_WORKSPACE_WRAPPER of deploy/fuzz.sh. Build scripts
# run without libFuzzer, which has what the counters call.
set -euo pipefail

counters=(-Cpasses=sancov-module)
for option in level=4 inline-8bit-counters pc-table trace-compares; do
  counters+=("-Cllvm-args=-sanitizer-coverage-$option")
done
case " $* " in
  *" --crate-name build_script_"* | *" --crate-name ___ "*) exec "$@" ;;
  *" --crate-name "*) exec "$@" "${counters[@]}" ;;
  *) exec "$@" ;;
esac
