//! Builds `netd-ebpf` for the kernel and puts the object at `$OUT_DIR/netd-ebpf`.
//!
//! Two ways, the first that is there: rustup's nightly with `rust-src` (libcore is built for the BPF target), or a
//! rustc that has a libcore compiled for it (Debian's `rustc-web` with `libstd-rust-web-dev-bpf`, or
//! `$SANDGATE_EBPF_RUSTC`). `$SANDGATE_EBPF_OBJECT` names an object built elsewhere. Both ways link with bpf-linker:
//! `$BPF_LINKER`, or in PATH, or where `deploy/setup.sh` puts it.

use std::{
    env,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

const OBJECT: &str = "netd-ebpf";
const INSTALL: &str = "`make setup` (deploy/setup.sh) installs it";

fn main() {
    for variable in [
        "SANDGATE_EBPF_OBJECT",
        "SANDGATE_EBPF_RUSTC",
        "SANDGATE_TOOLCHAIN_DIR",
        "BPF_LINKER",
    ] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let workspace = variable("CARGO_MANIFEST_DIR")
        .join("..")
        .canonicalize()
        .expect("netd stands in the workspace");
    for input in ["netd-ebpf", "crates/netd-common", "netd/build.rs"] {
        println!("cargo::rerun-if-changed={}", workspace.join(input).display());
    }
    let out = variable("OUT_DIR");
    let object = out.join(OBJECT);
    if let Some(built) = env::var_os("SANDGATE_EBPF_OBJECT").map(PathBuf::from) {
        println!("cargo::rerun-if-changed={}", built.display());
        fs::copy(&built, object)
            .unwrap_or_else(|error| panic!("$SANDGATE_EBPF_OBJECT {}: {error}", built.display()));
        return;
    }

    let little = env::var("CARGO_CFG_TARGET_ENDIAN").as_deref() != Ok("big");
    let target = if little {
        "bpfel-unknown-none"
    } else {
        "bpfeb-unknown-none"
    };
    let arch = env::var("CARGO_CFG_TARGET_ARCH").expect("set by cargo");
    let linker = linker();

    // A target directory of its own: the outer cargo holds the lock of its. Shared by all its profiles, and found
    // from OUT_DIR (<target>/<profile>/build/<package>/out), so that it follows wherever the outer one is.
    let directory = out
        .ancestors()
        .nth(4)
        .expect("cargo's layout of OUT_DIR")
        .join("ebpf");
    let mut flags = OsString::from(format!(
        "--cfg=bpf_target_arch=\"{arch}\"\x1f-Cdebuginfo=2\x1f-Clink-arg=--btf\x1f-Clinker="
    ));
    flags.push(&linker);

    let mut build = compiler(target);
    build
        .args(["--locked", "--release", "--package", OBJECT, "--bins", "--target", target, "--target-dir"])
        .arg(&directory)
        .current_dir(&workspace)
        .env("CARGO_ENCODED_RUSTFLAGS", flags)
        // The link is the linker's business, and its input must keep the debug information that BTF is made from.
        .env("CARGO_PROFILE_RELEASE_LTO", "false")
        .env("CARGO_PROFILE_RELEASE_STRIP", "none")
        .env("CARGO_PROFILE_RELEASE_PANIC", "abort");
    for variable in [
        "RUSTFLAGS",
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
        "CARGO_BUILD_TARGET",
        "CARGO_TARGET_DIR",
    ] {
        build.env_remove(variable);
    }
    let status = build
        .status()
        .unwrap_or_else(|error| panic!("cannot run {build:?}: {error}"));
    assert!(
        status.success(),
        "building the kernel programs failed (see above): {build:?}"
    );
    let built = directory.join(target).join("release").join(OBJECT);
    fs::copy(&built, object).unwrap_or_else(|error| panic!("{}: {error}", built.display()));
}

fn variable(name: &str) -> PathBuf {
    env::var_os(name)
        .map(PathBuf::from)
        .unwrap_or_else(|| panic!("cargo sets {name}"))
}

/// `cargo build` with a compiler that can build libcore for the target, or has it.
fn compiler(target: &str) -> Command {
    let chosen = env::var_os("SANDGATE_EBPF_RUSTC");
    let nightly = output(
        Command::new("rustup")
            .args(["run", "nightly", "rustc", "--print", "sysroot"])
            .env_remove("RUSTC")
            .env_remove("RUSTUP_TOOLCHAIN"),
    );
    let has_source = |sysroot: &str| {
        Path::new(sysroot)
            .join("lib/rustlib/src/rust/library/core/src/lib.rs")
            .exists()
    };
    if chosen.is_none() && nightly.as_deref().is_some_and(has_source) {
        let mut build = Command::new("rustup");
        build
            .args(["run", "nightly", "cargo", "build", "-Zbuild-std=core"])
            .env_remove("CARGO")
            .env_remove("RUSTC")
            .env_remove("RUSTUP_TOOLCHAIN");
        return build;
    }
    let rustc = chosen.unwrap_or_else(|| "/usr/bin/rustc".into());
    let sysroot = output(Command::new(&rustc).args(["--print", "sysroot"])).unwrap_or_default();
    let libraries = Path::new(&sysroot).join("lib/rustlib").join(target).join("lib");
    let has_core = fs::read_dir(&libraries).is_ok_and(|mut entries| {
        entries
            .any(|entry| entry.is_ok_and(|entry| entry.file_name().to_string_lossy().starts_with("libcore-")))
    });
    assert!(
        has_core,
        "no compiler for the kernel programs: rustup has no nightly with rust-src, and {} has no libcore for {target}. \
         {INSTALL}; by hand: `rustup toolchain install nightly --component rust-src`, or \
         `apt-get install rustc-web libstd-rust-web-dev-bpf`",
        rustc.display()
    );
    let mut build = Command::new(env::var_os("CARGO").expect("set by cargo"));
    // aya-ebpf needs an unstable feature; allowed in that crate alone.
    build
        .arg("build")
        .env("RUSTC", rustc)
        .env("RUSTC_BOOTSTRAP", "aya_ebpf,netd_ebpf");
    build
}

/// bpf-linker, tried out.
fn linker() -> PathBuf {
    let runs = |path: &Path| output(Command::new(path).arg("--version")).is_some();
    if let Some(chosen) = env::var_os("BPF_LINKER").map(PathBuf::from) {
        assert!(
            runs(&chosen),
            "$BPF_LINKER is {}, which does not run; without that variable, {INSTALL}",
            chosen.display()
        );
        return chosen;
    }
    let kept =
        env::var_os("SANDGATE_TOOLCHAIN_DIR").map_or_else(|| PathBuf::from("/opt/sandgate"), PathBuf::from);
    let kept = kept.join("bin/bpf-linker");
    [PathBuf::from("bpf-linker"), kept.clone()]
        .into_iter()
        .find(|path| runs(path))
        .unwrap_or_else(|| {
            panic!(
                "bpf-linker is neither in PATH nor at {}: {INSTALL}; or name it in $BPF_LINKER",
                kept.display()
            )
        })
}

fn output(command: &mut Command) -> Option<String> {
    let done = command.output().ok()?;
    done.status
        .success()
        .then(|| String::from_utf8_lossy(&done.stdout).trim().to_owned())
}
