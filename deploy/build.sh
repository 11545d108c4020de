#!/usr/bin/env bash
# Builds the release programs into target/release (CARGO_TARGET_DIR is honoured): controller, netd, tunnel-proxy, and the static sandboxd and redteam.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

read -ra flags <<<"${CARGO_FLAGS:-}"
release=${CARGO_TARGET_DIR:-target}/release
arch=$(uname -m)

cargo build "${flags[@]}" --release -p controller -p netd -p tunnel-proxy

# sandboxd and redteam run inside any root file system, so nothing in them is linked dynamically: musl where rustup has it
# (deploy/setup.sh adds it), else glibc. Naming a target keeps the flags away from build scripts and macros.
if [[ -d $(rustc --print sysroot)/lib/rustlib/$arch-unknown-linux-musl/lib ]]; then
  triple=$arch-unknown-linux-musl
  cargo build "${flags[@]}" --release -p sandboxd -p redteam --target "$triple"
else
  triple=$arch-unknown-linux-gnu
  RUSTFLAGS="${RUSTFLAGS:-} -C target-feature=+crt-static" cargo build "${flags[@]}" --release -p sandboxd -p redteam --target "$triple"
fi

for program in sandboxd redteam; do
  built=${CARGO_TARGET_DIR:-target}/$triple/release/$program
  if readelf -lW "$built" | grep -q INTERP; then
    echo "build: error: $built is linked dynamically; it would not start in another root file system" >&2
    exit 1
  fi
  # A new file, never a write into the old one: sandboxes may be running it.
  if ! cmp -s "$built" "$release/$program"; then
    install -m 0755 "$built" "$release/.$program.new"
    mv -f "$release/.$program.new" "$release/$program"
  fi
done
echo "build: controller, netd, tunnel-proxy, sandboxd and redteam are in $release"
