#!/usr/bin/env bash
# Makes a Debian machine ready to build, run and test Sandgate. Idempotent: what is there is left alone, and when
# nothing is missing it takes well under a second.
#
#   deploy/setup.sh            install what building and running need
#   deploy/setup.sh --tests    the same, and what the tests need
#   deploy/setup.sh --bench    the same, and the peers of the benchmarks (nginx, haproxy, squid, mitmproxy, unbound), which are not started
#   deploy/setup.sh --fuzz     the same, and what fuzzing needs: a C++ compiler
#   deploy/setup.sh --check    change nothing: list what is missing; exit 1 if anything is
#
# What it makes, and where (each may be moved by the variable in front):
#   SANDGATE_TOOLCHAIN_DIR  /opt/sandgate               bin/bpf-linker (built once), notes on how it was built, and
#                                                       (--tests) clients/: the published clients that are tested with
#   SANDGATE_IMAGE_DIR      /var/lib/sandgate/images    default/rootfs and default/image.json (deploy/image.sh)
#
# Everything comes from package registries through their own clients: apt (with this machine's sources), cargo, pip
# and rustup.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
TOOLCHAIN_DIR=${SANDGATE_TOOLCHAIN_DIR:-/opt/sandgate}
IMAGE_DIR=${SANDGATE_IMAGE_DIR:-/var/lib/sandgate/images}
export SANDGATE_IMAGE_DIR=$IMAGE_DIR

MIN_KERNEL=5.13 # older ones surely lack something; of newer ones netd finds out itself (`netd --check`)
MIN_RUST=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$here/../Cargo.toml")
BPF_LINKER_VERSION=0.13.0
BPF_LINKER_LLVM="21 22 23" # LLVM majors that this bpf-linker can be built with

# The whole machine's worth of packages. gcc, make: crates that compile C. e2fsprogs: writable layers are ext4 images.
PACKAGES=(ca-certificates debian-archive-keyring e2fsprogs gcc iproute2 kmod libc6-dev make mmdebstrap mount nftables
  python3 runc util-linux)
TEST_PACKAGES=(curl jq openssl tcpdump)
FUZZ_PACKAGES=(g++) # libFuzzer is C++
BENCH_PACKAGES=(nginx libnginx-mod-stream haproxy squid-openssl mitmproxy unbound)

check_only=false
with_tests=false
with_bench=false
with_fuzz=false
for arg in "$@"; do
  case $arg in
    --check) check_only=true ;;
    --tests) with_tests=true ;;
    --bench) with_bench=true ;;
    --fuzz) with_fuzz=true ;;
    -h | --help) sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    *) echo "setup: unknown argument '$arg' (known: --tests, --bench, --fuzz, --check, --help)" >&2; exit 64 ;;
  esac
done

say() { echo "setup: $*"; }
fail() { echo "setup: error: $*" >&2; exit 1; }

# Runs the command of a slow step, quietly: its output is shown only when it fails.
quietly() {
  local log
  log=$(mktemp)
  if ! "$@" >"$log" 2>&1 </dev/null; then
    cat "$log" >&2
    rm -f "$log"
    return 1
  fi
  rm -f "$log"
}

# --- 1. Is this a machine that can run Sandgate at all? --------------------------------------------------------------

# Prints every reason why not, one a line.
machine_problems() {
  local major minor release controller caps
  [[ $(id -u) == 0 ]] || echo "not root: Sandgate makes namespaces, mounts and eBPF programs; run this as root"
  [[ $ARCH == x86_64 || $ARCH == aarch64 ]] || echo "this machine is $ARCH; Sandgate runs on x86_64 and aarch64"
  [[ -n $CODENAME ]] || echo "this is not Debian (no VERSION_CODENAME with ID=debian in /etc/os-release); Debian 12 is what this script supports"

  release=$(</proc/sys/kernel/osrelease)
  IFS=.- read -r major minor _ <<<"$release"
  ((major > ${MIN_KERNEL%.*} || (major == ${MIN_KERNEL%.*} && minor >= ${MIN_KERNEL#*.}))) ||
    echo "the kernel is $release; Sandgate needs $MIN_KERNEL or newer (batches of entries in BPF_MAP_TYPE_LPM_TRIE, which hold the policies). Debian 12's own kernel is newer: 'apt-get install linux-image-$(dpkg --print-architecture)', reboot"

  # CAP_NET_ADMIN is bit 12, CAP_SYS_ADMIN bit 21: an ordinary container has neither.
  caps=$((16#$(awk '/^CapEff:/ { print $2 }' /proc/self/status)))
  (((caps >> 12 & 1) && (caps >> 21 & 1))) ||
    echo "root without CAP_SYS_ADMIN and CAP_NET_ADMIN: this is an unprivileged container; use the machine itself or a privileged one"
  [[ $(tr -s ' ' </proc/self/uid_map) == " 0 0 4294967295" ]] ||
    echo "this is a user namespace, in which the kernel loads no eBPF; use the machine itself or a container without one"

  filesystem_known bpf || echo "the kernel has no bpf file system: it needs CONFIG_BPF_SYSCALL"
  filesystem_known overlay || echo "the kernel has no overlay file system: it needs CONFIG_OVERLAY_FS (module overlay)"
  filesystem_known ext4 || echo "the kernel has no ext4: it needs CONFIG_EXT4_FS (module ext4)"
  [[ -e /dev/loop-control ]] || modprobe -q loop 2>/dev/null || echo "no loop devices: it needs CONFIG_BLK_DEV_LOOP (module loop)"
  [[ -r /proc/sys/user/max_user_namespaces && $(</proc/sys/user/max_user_namespaces) -gt 0 ]] ||
    echo "user namespaces are off: 'sysctl user.max_user_namespaces=15000'"

  # cgroup v2 alone, or v1 (hybrid): either way the limits of a sandbox need these three.
  for controller in cpu memory pids; do
    if [[ -e /sys/fs/cgroup/cgroup.controllers ]]; then
      grep -qw "$controller" /sys/fs/cgroup/cgroup.controllers
    else
      grep -Eq "^cgroup [^ ]+ cgroup ([^ ]*,)?$controller(,| )" /proc/mounts
    fi || echo "no cgroup hierarchy with the '$controller' controller is mounted below /sys/fs/cgroup"
  done

  if command -v cargo >/dev/null && release=$(rustc --version 2>/dev/null); then
    IFS=' .' read -r _ major minor _ <<<"$release"
    ((major > ${MIN_RUST%.*} || (major == ${MIN_RUST%.*} && minor >= ${MIN_RUST#*.}))) ||
      echo "this is $release; Sandgate needs Rust $MIN_RUST or newer: 'rustup update stable'"
  else
    echo "no cargo in PATH: install Rust $MIN_RUST or newer with rustup, or '. ~/.cargo/env' if it is installed"
  fi
}

filesystem_known() {
  grep -qw "$1" /proc/filesystems || modprobe -q "$1" 2>/dev/null
}

# Builds and tests on a full disk fail late and with other words: said here, and never an error, as whoever builds
# less needs less.
TESTS_NEED_GIB=10
warn_of_little_space() {
  local what dir free
  while IFS='|' read -r what dir; do
    while [[ ! -d $dir ]]; do dir=$(dirname "$dir"); done
    free=$(df -Pk "$dir" | awk 'NR == 2 { printf "%d", $4 / 1024 / 1024 }') || continue
    ((free >= TESTS_NEED_GIB)) ||
      echo "setup: warning: the file system of $what ($dir) has $free GiB free; the tests and builds need about $TESTS_NEED_GIB GiB" >&2
  done <<<"the target directory|$(realpath -m "${CARGO_TARGET_DIR:-$here/../target}")
TMPDIR|$(realpath -m "${TMPDIR:-/tmp}")"
}

# --- 2. Debian packages ----------------------------------------------------------------------------------------------

# Of the given packages, those that are not installed.
packages_missing() {
  local installed
  installed=" $(dpkg-query -W -f '${db:Status-Status}/${Package} ' "$@" 2>/dev/null || true) "
  for package in "$@"; do
    [[ $installed == *" installed/$package "* ]] || echo "$package"
  done
}

apt_updated=false
apt_update() {
  $apt_updated && return
  say "reading package lists"
  quietly apt-get -o DPkg::Lock::Timeout=300 update || fail "apt-get update failed; see above"
  apt_updated=true
}

apt_install() {
  apt_update
  say "installing packages: $*"
  DEBIAN_FRONTEND=noninteractive quietly apt-get -o DPkg::Lock::Timeout=300 install -y --no-install-recommends "$@" ||
    fail "apt-get install failed; see above"
}

# Installs services without starting them: their programs are all that is wanted (invoke-rc.d asks policy-rc.d).
apt_install_stopped() {
  local policy=/usr/sbin/policy-rc.d status=0
  [[ -e $policy ]] || { printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod 755 "$policy"; local ours=true; }
  (apt_install "$@") || status=$?
  [[ -z ${ours:-} ]] || rm -f "$policy"
  ((status == 0)) || exit "$status"
}

apt_has() { apt-cache show --no-all-versions "$1" >/dev/null 2>&1; }

# --- 3. The eBPF compiler --------------------------------------------------------------------------------------------

# netd/build.rs takes rustup's nightly if it has rust-src (libcore is then built for the bpf target), else Debian's
# rustc-web, whose companion package holds a libcore compiled for it. The second comes first when neither is there:
# it is one version, tested and kept by the distribution, where "the newest nightly" is another one each day and may
# use an LLVM that nothing here can link with.
DEBIAN_RUSTC=/usr/bin/rustc
BPF_LIBCORE=/usr/lib/rustlib/bpfel-unknown-none/lib

nightly_sysroot() {
  local home=${RUSTUP_HOME:-$HOME/.rustup} dir
  for dir in "$home/toolchains/nightly-$ARCH-unknown-linux-gnu" "$home/toolchains/nightly"; do
    [[ -x $dir/bin/rustc ]] && { echo "$dir"; return; }
  done
  return 1
}
nightly_has_core() { [[ -e $(nightly_sysroot)/lib/rustlib/src/rust/library/core/src/lib.rs ]]; }
debian_has_core() { [[ -x $DEBIAN_RUSTC ]] && compgen -G "$BPF_LIBCORE/libcore-*" >/dev/null; }

# The compiler that netd/build.rs will use; fails when there is none.
ebpf_rustc() {
  if nightly_has_core 2>/dev/null; then
    echo "$(nightly_sysroot)/bin/rustc"
  elif debian_has_core; then
    echo "$DEBIAN_RUSTC"
  else
    return 1
  fi
}

get_ebpf_rustc() {
  if nightly_sysroot >/dev/null; then
    say "adding rust-src to rustup's nightly"
    quietly timeout 300 rustup component add rust-src --toolchain nightly && nightly_has_core && return
    say "rust-src could not be added; using Debian's compiler instead"
  fi
  apt_update
  if apt_has libstd-rust-web-dev-bpf; then
    apt_install rustc-web libstd-rust-web-dev-bpf
    debian_has_core && return
  fi
  command -v rustup >/dev/null ||
    fail "no compiler for eBPF: neither package libstd-rust-web-dev-bpf nor rustup is to be had"
  say "installing rustup's nightly with rust-src"
  quietly timeout 900 rustup toolchain install nightly --profile minimal --component rust-src || true
  nightly_has_core || fail "no compiler for eBPF. Either 'rustup toolchain install nightly --component rust-src', or 'apt-get install rustc-web libstd-rust-web-dev-bpf' (bookworm-security) must work"
}

# bpf-linker reads the bitcode that rustc writes, so its LLVM must not be older than the compiler's.
llvm_major_of() { "$1" -vV | sed -n 's/^LLVM version: \([0-9]*\).*/\1/p'; }

linker_ok() {
  local rustc built
  [[ -x $TOOLCHAIN_DIR/bin/bpf-linker && -r $TOOLCHAIN_DIR/bpf-linker.stamp ]] || return 1
  rustc=$(ebpf_rustc) || return 1
  read -r version built <"$TOOLCHAIN_DIR/bpf-linker.stamp"
  [[ $version == "$BPF_LINKER_VERSION" ]] && ((built >= $(llvm_major_of "$rustc"))) &&
    "$TOOLCHAIN_DIR/bin/bpf-linker" --version >/dev/null 2>&1 # its libLLVM is still there
}

get_linker() {
  local rustc need major library started=$SECONDS
  rustc=$(ebpf_rustc)
  need=$(llvm_major_of "$rustc")
  for major in $BPF_LINKER_LLVM none; do
    [[ $major == none ]] &&
      fail "$rustc uses LLVM $need, and no Debian package libllvm$need or newer fits bpf-linker $BPF_LINKER_VERSION (it takes LLVM $BPF_LINKER_LLVM). Remove rust-src from the nightly, so that Debian's compiler is used: 'rustup component remove rust-src --toolchain nightly'"
    ((major >= need)) || continue
    [[ -n $(packages_missing "libllvm$major") ]] || break
    apt_update
    apt_has "libllvm$major" && { apt_install "libllvm$major"; break; }
  done

  # The library is enough; the -dev package is not needed: LLVM_PREFIX points at a folder with the name the linker wants.
  library=$(find /usr/lib/"$ARCH"-linux-gnu -name "libLLVM.so.$major.*" -o -name "libLLVM-$major.so.*" | sort | tail -1)
  [[ -n $library ]] || fail "package libllvm$major holds no libLLVM.so for $ARCH"
  mkdir -p "$TOOLCHAIN_DIR/llvm/lib"
  ln -sfn "$library" "$TOOLCHAIN_DIR/llvm/lib/libLLVM.so"

  say "building bpf-linker $BPF_LINKER_VERSION with LLVM $major (about a minute, once)"
  local build
  build=$(mktemp -d)
  # A light profile: four times faster to build, and linking our object takes no longer.
  LLVM_PREFIX=$TOOLCHAIN_DIR/llvm CARGO_TARGET_DIR=$build CARGO_PROFILE_RELEASE_DEBUG=0 CARGO_PROFILE_RELEASE_LTO=off \
    CARGO_PROFILE_RELEASE_OPT_LEVEL=1 CARGO_PROFILE_RELEASE_STRIP=true \
    quietly cargo install bpf-linker --version "$BPF_LINKER_VERSION" --locked --force \
    --no-default-features --features "llvm-$major" --root "$TOOLCHAIN_DIR" ||
    { rm -rf "$build"; fail "building bpf-linker failed; see above"; }
  rm -rf "$build"
  echo "$BPF_LINKER_VERSION $major" >"$TOOLCHAIN_DIR/bpf-linker.stamp"
  linker_ok || fail "bpf-linker was built but does not run: try '$TOOLCHAIN_DIR/bin/bpf-linker --version'"
  say "bpf-linker is at $TOOLCHAIN_DIR/bin/bpf-linker ($((SECONDS - started)) s)"
}

# --- 4. A static sandboxd --------------------------------------------------------------------------------------------

# sandboxd runs inside any root file system, so it is linked statically: with musl where that target is to be had,
# else with glibc (deploy/build.sh makes the same choice by looking at the same folder).
musl_ok() { [[ -d $(rustc --print sysroot)/lib/rustlib/$ARCH-unknown-linux-musl/lib ]]; }
musl_refused=$TOOLCHAIN_DIR/no-musl # remembers that it could not be added, so that we do not ask each time
get_musl() {
  say "adding the rust target $ARCH-unknown-linux-musl"
  if ! quietly timeout 300 rustup target add "$ARCH-unknown-linux-musl" || ! musl_ok; then
    say "it could not be added: sandboxd will be linked statically with glibc instead"
    mkdir -p "$TOOLCHAIN_DIR"
    rustc --version >"$musl_refused"
  fi
}
musl_settled() {
  musl_ok || { [[ -r $musl_refused ]] && [[ $(<"$musl_refused") == "$(rustc --version)" ]]; }
}

# --- 5. What `make lint` needs: part of rustup's default profile, absent from its minimal one -------------------------

lint_tools_ok() { cargo fmt --version >/dev/null 2>&1 && cargo clippy --version >/dev/null 2>&1; }

get_lint_tools() {
  say "adding rustfmt and clippy"
  quietly timeout 300 rustup component add rustfmt clippy ||
    fail "rustfmt and clippy are missing and cannot be added: 'rustup component add rustfmt clippy'"
}

# --- 6. The default image --------------------------------------------------------------------------------------------

pip_ok() { python3 -m pip --version >/dev/null 2>&1; }

get_image() {
  pip_ok || apt_install python3-pip
  apt_update # the image is made from these lists
  "$here/image.sh" build
}

# --- 7. What `tests/conformance` runs: the published clients, and schemathesis ----------------------------------------

# A directory each, as they exclude one another. Folder and requirements.
CLIENTS=(
  "2.1.0 stateset-sandbox==2.1.0 httpx==0.28.1"
  "1.1.0 stateset-sandbox==1.1.0 httpx==0.28.1"
  "1.0.4 stateset-sandbox==1.0.4 httpx==0.28.1"
  "schemathesis schemathesis==4.32.5"
)
# What they were installed as, and for which Python: another one could not load their compiled parts.
client_stamp() { echo "$*, $(python3 -c 'import sys; print(sys.version)')"; }
client_ok() {
  local stamp=$TOOLCHAIN_DIR/clients/$1/.stamp
  [[ -r $stamp && $(<"$stamp") == "$(client_stamp "$@")" ]]
}
clients_ok() {
  local client
  for client in "${CLIENTS[@]}"; do
    # shellcheck disable=SC2086 # words
    client_ok $client || return 1
  done
}
get_client() {
  local dir=$TOOLCHAIN_DIR/clients/$1
  say "installing ${*:2} into $dir"
  rm -rf "$dir"
  mkdir -p "$dir"
  quietly python3 -m pip install --no-input --disable-pip-version-check --root-user-action=ignore --target "$dir" "${@:2}" ||
    fail "${*:2} cannot be installed; see above"
  client_stamp "$@" >"$dir/.stamp"
}
get_clients() {
  local client
  pip_ok || apt_install python3-pip
  for client in "${CLIENTS[@]}"; do
    # shellcheck disable=SC2086 # words
    client_ok $client || get_client $client
  done
}

# --- all of it, in order ---------------------------------------------------------------------------------------------

ARCH=$(uname -m)
CODENAME=$(. /etc/os-release && [[ ${ID:-} == debian ]] && echo "${VERSION_CODENAME:-}") || CODENAME=
wanted=("${PACKAGES[@]}")
! $with_tests || wanted+=("${TEST_PACKAGES[@]}")
! $with_bench || wanted+=("${BENCH_PACKAGES[@]}")
! $with_fuzz || wanted+=("${FUZZ_PACKAGES[@]}")

problems=$(machine_problems)
if [[ -n $problems ]]; then
  while read -r problem; do echo "setup: error: $problem" >&2; done <<<"$problems"
  exit 1
fi

! $with_tests || warn_of_little_space

if $check_only; then
  ok=true
  lacks() { say "missing: $*"; ok=false; }
  mapfile -t missing < <(packages_missing "${wanted[@]}")
  [[ ${#missing[@]} == 0 ]] || lacks "packages: ${missing[*]}"
  ebpf_rustc >/dev/null || lacks "a compiler for eBPF (rustup nightly with rust-src, or Debian's rustc-web with libstd-rust-web-dev-bpf)"
  linker_ok || lacks "$TOOLCHAIN_DIR/bin/bpf-linker $BPF_LINKER_VERSION, for the LLVM of that compiler"
  ! $with_tests || lint_tools_ok || lacks "rustfmt or clippy"
  ! $with_tests || clients_ok || lacks "the published clients or schemathesis in $TOOLCHAIN_DIR/clients"
  musl_settled || lacks "the rust target $ARCH-unknown-linux-musl"
  "$here/image.sh" check || lacks "the default image in $IMAGE_DIR (or it was made by another recipe)"
  $ok && say "nothing is missing"
  $ok
  exit
fi

# One set-up at a time: others wait, and then find everything there.
exec 9>/run/lock/sandgate-setup.lock
flock -n 9 || { say "waiting for another set-up to end"; flock 9; }

mapfile -t missing < <(packages_missing "${wanted[@]}")
if [[ ${#missing[@]} != 0 ]]; then
  if $with_bench; then apt_install_stopped "${missing[@]}"; else apt_install "${missing[@]}"; fi
fi
ebpf_rustc >/dev/null || get_ebpf_rustc
linker_ok || get_linker
musl_settled || get_musl
! $with_tests || lint_tools_ok || get_lint_tools
! $with_tests || clients_ok || get_clients
"$here/image.sh" check || get_image
say "everything is there"
