//! Whether this machine can run sandboxes, found out by running something.

use std::{collections::BTreeMap, fs, io, net::Ipv4Addr, os::unix::fs::PermissionsExt as _, path::Path};

use nix::sys::resource::{Resource, getrlimit};
use sandgate_policy::Range6;
use serde::Deserialize;

use super::{
    Machine,
    bundle::{self, Plan},
    cgroup::{Cgroups, Limits},
    disk,
    layout::Layout,
    network, record,
};
use crate::backend::{BackendError, LocalConfig};

/// Name of the probe's container and layer. No sandbox id is called so.
const PROBE: &str = "probe";
/// What the probe gets.
const LIMITS: Limits = Limits {
    memory_bytes: 64 * 1024 * 1024,
    cpu_millis: 1000,
    pids: 32,
};
/// First id of the probe's range, below those of sandboxes.
const FIRST_ID: u32 = 900_000;
/// Longest and shortest prefix of the sandboxes' addresses.
const PREFIXES: std::ops::RangeInclusive<u8> = 16..=28;

/// `image.json` as far as it concerns running.
#[derive(Debug, Deserialize)]
struct ImageDescription {
    #[serde(default)]
    env: BTreeMap<String, String>,
}

fn unusable(message: impl Into<String>) -> BackendError {
    BackendError::Unusable(message.into())
}

/// Checks what the configuration names before anything is made.
pub(super) async fn check(config: &LocalConfig) -> Result<(), BackendError> {
    if !nix::unistd::geteuid().is_root() {
        return Err(unusable(
            "not root: namespaces, mounts and control groups need it",
        ));
    }
    for (what, path) in [
        ("run directory", &config.run_dir),
        ("data directory", &config.data_dir),
        ("image directory", &config.image_dir),
    ] {
        if !path.is_absolute() {
            return Err(unusable(format!(
                "the {what} {} is not an absolute path",
                path.display()
            )));
        }
    }
    let range = config.sandbox_cidr;
    if !PREFIXES.contains(&range.prefix_len()) || range.trunc() != range {
        return Err(unusable(format!(
            "the sandbox addresses {range} are not a network between /{} and /{}",
            PREFIXES.start(),
            PREFIXES.end()
        )));
    }
    let clash = network::overlapping_route(range.into())
        .await
        .map_err(|error| unusable(format!("host routes: {error}")))?;
    if let Some(route) = clash {
        return Err(unusable(format!(
            "the sandbox addresses {range} overlap the host's route {route}; choose others with SANDGATE_SANDBOX_CIDR"
        )));
    }
    let agent = fs::metadata(&config.sandboxd);
    if !agent.is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0) {
        let path = config.sandboxd.display();
        return Err(unusable(format!(
            "{path} is not an executable file; run `make build`"
        )));
    }
    Ok(())
}

/// Whether new sandboxes get an IPv6 address, for as long as this process runs.
pub(super) async fn gives_ipv6(config: &LocalConfig) -> Result<bool, BackendError> {
    let failed = |error| unusable(format!("host routes: {error}"));
    let range = match config.sandbox_cidr6 {
        Range6::Off => return Ok(false),
        Range6::Usual(range) => {
            if !network::has_default_route6().await.map_err(failed)? {
                tracing::info!("the node has no IPv6 default route, so sandboxes have no IPv6");
                return Ok(false);
            }
            range
        }
        Range6::Chosen(range) => {
            if !network::has_ipv6() {
                return Err(unusable(format!(
                    "SANDGATE_SANDBOX_CIDR6 is {range}, and this kernel has no IPv6; leave it empty or set it to `off`"
                )));
            }
            range
        }
    };
    let clash = network::overlapping_route(range.into()).await.map_err(failed)?;
    match clash {
        Some(route) => Err(unusable(format!(
            "the sandbox addresses {range} overlap the host's route {route}; choose others with SANDGATE_SANDBOX_CIDR6"
        ))),
        None => {
            tracing::info!(%range, "sandboxes have IPv6 addresses");
            Ok(true)
        }
    }
}

/// Finds out what must be known about the machine and the image.
pub(super) fn machine(config: &LocalConfig) -> Result<Machine, BackendError> {
    let image = config.image_dir.join(&config.image);
    let described = fs::read(image.join("image.json"))
        .and_then(|bytes| Ok(serde_json::from_slice::<ImageDescription>(&bytes)?))
        .and_then(|description| fs::canonicalize(image.join("rootfs")).map(|root| (description, root)));
    let (description, root) = described.map_err(|error| {
        unusable(format!(
            "the image {} is not usable ({error}); run `make setup`",
            image.display()
        ))
    })?;
    // A process in a user namespace is nobody here: it must be allowed through every folder on the way.
    for folder in root.ancestors() {
        let mode = fs::metadata(folder)
            .map(|folder| folder.permissions().mode())
            .unwrap_or(0);
        if mode & 0o001 == 0 {
            return Err(unusable(format!(
                "{} must be passable for others (chmod o+x)",
                folder.display()
            )));
        }
    }
    let cgroups = Cgroups::detect().map_err(|error| unusable(format!("control groups: {error}")))?;
    let (_, open_files) = getrlimit(Resource::RLIMIT_NOFILE).map_err(|error| unusable(error.desc()))?;
    let badness = fs::read_to_string("/proc/self/oom_score_adj").ok();
    let badness = badness.and_then(|text| text.trim().parse().ok()).unwrap_or(0);
    Ok(Machine {
        root,
        environment: description.env,
        cgroups,
        open_files,
        badness,
    })
}

/// Makes a writable layer and runs `true` the way sandboxes run, and takes both away.
pub(super) async fn run(
    layout: &Layout,
    config: &LocalConfig,
    machine: &Machine,
) -> Result<(), BackendError> {
    clear(layout, machine, config)
        .await
        .map_err(|error| unusable(format!("leftovers of a probe: {error}")))?;
    let disk = disk::create(layout, PROBE, disk::SMALLEST, FIRST_ID + bundle::USER).await;
    let ran = match disk {
        Ok(()) => run_true(layout, config, machine).await,
        Err(error) => Err(io::Error::other(format!(
            "a writable layer cannot be made: {error}"
        ))),
    };
    let cleared = clear(layout, machine, config).await;
    ran.and(cleared)
        .map_err(|error| unusable(format!("this machine cannot run sandboxes: {error}")))
}

async fn run_true(layout: &Layout, config: &LocalConfig, machine: &Machine) -> io::Result<()> {
    let folder = layout.record(PROBE);
    bundle::write(&Plan {
        name: PROBE,
        root: &machine.root,
        bundle: &folder,
        layer: Some(&layout.mount(PROBE)),
        namespace: None,
        agent: &config.sandboxd,
        command: vec!["/bin/true".to_owned()],
        environment: &machine.environment,
        trust: None,
        first_id: FIRST_ID,
        address: Ipv4Addr::LOCALHOST,
        address6: None,
        cgroup: &layout.cgroup(PROBE),
        limits: LIMITS,
        limits_swap: machine.cgroups.limits_swap(),
        open_files: machine.open_files,
        badness: machine.badness,
    })?;
    super::runtime(layout, config).run_to_end(PROBE, &folder).await
}

async fn clear(layout: &Layout, machine: &Machine, config: &LocalConfig) -> io::Result<()> {
    super::runtime(layout, config).delete(PROBE).await?;
    machine.cgroups.destroy(&layout.cgroup(PROBE))?;
    disk::destroy(layout, PROBE)?;
    disk::remove(fs::remove_dir_all(layout.record(PROBE)))
}

/// Makes the directories of the instance, passable where the runtime's processes must pass.
pub(super) fn make_folders(layout: &Layout) -> io::Result<()> {
    let folders = [
        (layout.namespaces(), 0o755),
        (layout.mounts(), 0o711),
        (layout.records(), 0o711),
        (layout.runtime_state(), 0o711),
        (layout.layers(), 0o700),
    ];
    for (folder, mode) in folders {
        fs::create_dir_all(&folder)?;
        fs::set_permissions(&folder, fs::Permissions::from_mode(mode))?;
    }
    Ok(())
}

/// Keeps the position in the ring of addresses over a restart.
pub(super) fn save_cursor(path: &Path, cursor: u32) -> io::Result<()> {
    record::replace(path, cursor.to_string().as_bytes())
}
