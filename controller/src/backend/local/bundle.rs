//! The OCI bundle of a sandbox: what it is given, and everything it is not.
//!
//! Building the document is pure; only [`write`] touches the disk.

use std::{
    collections::BTreeMap,
    fs, io,
    net::{Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
};

use oci_spec::{
    OciSpecError,
    runtime::{
        LinuxBuilder, LinuxCapabilitiesBuilder, LinuxCpuBuilder, LinuxDeviceCgroupBuilder, LinuxDeviceType,
        LinuxIdMapping, LinuxIdMappingBuilder, LinuxMemoryBuilder, LinuxNamespace, LinuxNamespaceBuilder,
        LinuxNamespaceType, LinuxPidsBuilder, LinuxResources, LinuxResourcesBuilder, Mount, MountBuilder,
        PosixRlimit, PosixRlimitBuilder, PosixRlimitType, ProcessBuilder, RootBuilder, Spec, SpecBuilder,
        UserBuilder, get_default_maskedpaths, get_default_readonly_paths,
    },
};

use super::{
    cgroup::{Limits, PERIOD},
    network::GATEWAY,
    record::IDS,
    seccomp, trust,
};

/// User and group of everything that runs in a sandbox.
pub(super) const USER: u32 = 1001;
/// Where the agent's binary appears.
const AGENT: &str = "/usr/lib/sandgate/sandboxd";
/// Where commands run.
const HOME: &str = "/workspace";
/// Most open files of a process. Software that closes every possible descriptor grows slow beyond.
const OPEN_FILES: u64 = 65_536;
/// Masked beside the runtime specification's defaults: the timing of other sandboxes' devices.
const MASKED: [&str; 1] = ["/proc/interrupts"];
const CONFIGURATION: &str = "config.json";

/// What goes into the document.
#[derive(Debug)]
pub(super) struct Plan<'a> {
    /// The container's name, and its host name.
    pub(super) name: &'a str,
    /// The image's root file system.
    pub(super) root: &'a Path,
    /// Host names, resolver and so on, made by [`write`].
    pub(super) bundle: &'a Path,
    /// The mounted writable layer; none for a probe.
    pub(super) layer: Option<&'a Path>,
    /// The network namespace; a new, empty one for a probe.
    pub(super) namespace: Option<&'a Path>,
    /// The agent's binary on the node.
    pub(super) agent: &'a Path,
    /// What PID 1 executes; the agent when empty.
    pub(super) command: Vec<String>,
    pub(super) environment: &'a BTreeMap<String, String>,
    /// The sandbox's certificate authority, PEM, and the files inside that are to hold it; none for a probe.
    pub(super) trust: Option<(&'a str, Vec<&'static str>)>,
    pub(super) first_id: u32,
    pub(super) address: Ipv4Addr,
    pub(super) address6: Option<Ipv6Addr>,
    /// Below a hierarchy's root, without a leading slash.
    pub(super) cgroup: &'a Path,
    pub(super) limits: Limits,
    /// The kernel can limit memory and swap together.
    pub(super) limits_swap: bool,
    /// What this process may give at most (RLIMIT_NOFILE).
    pub(super) open_files: u64,
    /// What this process has; it cannot give less (oom_score_adj).
    pub(super) badness: i32,
}

/// Writes the bundle's files into its folder.
pub(super) fn write(plan: &Plan<'_>) -> io::Result<()> {
    fs::create_dir_all(plan.bundle)?;
    let Plan { name, address, .. } = plan;
    let mut hosts = format!("127.0.0.1 localhost\n::1 localhost\n{address} {name}\n");
    if let Some(address) = plan.address6 {
        hosts.push_str(&format!("{address} {name}\n"));
    }
    fs::write(plan.bundle.join("hosts"), hosts)?;
    fs::write(plan.bundle.join("hostname"), format!("{name}\n"))?;
    let resolver = format!("nameserver {GATEWAY}\noptions ndots:1 timeout:2 attempts:2\n");
    fs::write(plan.bundle.join("resolv.conf"), resolver)?;
    if let Some((certificate, bundles)) = &plan.trust {
        let merged = trust::merged(plan.root, bundles, certificate)?;
        fs::write(plan.bundle.join(trust::FILE), merged)?;
    }
    let document = document(plan).map_err(io::Error::other)?;
    fs::write(plan.bundle.join(CONFIGURATION), serde_json::to_vec(&document)?)
}

/// The runtime's document.
fn document(plan: &Plan<'_>) -> Result<Spec, OciSpecError> {
    let command = if plan.command.is_empty() {
        vec![AGENT.to_owned()]
    } else {
        plan.command.clone()
    };
    let environment: Vec<String> = plan
        .environment
        .iter()
        .map(|(name, value)| format!("{name}={value}"))
        .collect();
    let process = ProcessBuilder::default()
        .terminal(false)
        .user(UserBuilder::default().uid(USER).gid(USER).build()?)
        .args(command)
        .env(environment)
        .cwd(if plan.layer.is_some() { HOME } else { "/" })
        .capabilities(
            LinuxCapabilitiesBuilder::default()
                .bounding([])
                .effective([])
                .inheritable([])
                .permitted([])
                .ambient([])
                .build()?,
        )
        .rlimits(limits(plan.open_files)?)
        .no_new_privileges(true)
        .oom_score_adj(plan.badness.max(0))
        .build()?;
    let masked = get_default_maskedpaths()
        .into_iter()
        .chain(MASKED.map(str::to_owned));
    let linux = LinuxBuilder::default()
        .uid_mappings(vec![ids(plan.first_id)?])
        .gid_mappings(vec![ids(plan.first_id)?])
        .namespaces(namespaces(plan.namespace)?)
        .resources(resources(plan)?)
        .cgroups_path(Path::new("/").join(plan.cgroup))
        .seccomp(seccomp::profile()?)
        .masked_paths(masked.collect::<Vec<_>>())
        .readonly_paths(get_default_readonly_paths())
        .build()?;
    let mut document = SpecBuilder::default()
        .version("1.0.2")
        .root(RootBuilder::default().path(plan.root).readonly(true).build()?)
        .hostname(plan.name)
        .process(process)
        .mounts(mounts(plan)?)
        .build()?;
    document.set_linux(Some(linux));
    Ok(document)
}

fn limits(open_files: u64) -> Result<Vec<PosixRlimit>, OciSpecError> {
    let limit = |kind, most| {
        PosixRlimitBuilder::default()
            .typ(kind)
            .hard(most)
            .soft(most)
            .build()
    };
    Ok(vec![
        limit(PosixRlimitType::RlimitNofile, open_files.min(OPEN_FILES))?,
        limit(PosixRlimitType::RlimitCore, 0)?,
    ])
}

fn ids(first: u32) -> Result<LinuxIdMapping, OciSpecError> {
    LinuxIdMappingBuilder::default()
        .container_id(0_u32)
        .host_id(first)
        .size(IDS)
        .build()
}

fn namespaces(network: Option<&Path>) -> Result<Vec<LinuxNamespace>, OciSpecError> {
    let new = [
        LinuxNamespaceType::User,
        LinuxNamespaceType::Pid,
        LinuxNamespaceType::Ipc,
        LinuxNamespaceType::Uts,
        LinuxNamespaceType::Mount,
        LinuxNamespaceType::Cgroup,
    ];
    let mut namespaces = Vec::new();
    for kind in new {
        namespaces.push(LinuxNamespaceBuilder::default().typ(kind).build()?);
    }
    let network_namespace = LinuxNamespaceBuilder::default().typ(LinuxNamespaceType::Network);
    namespaces.push(match network {
        Some(path) => network_namespace.path(path).build()?,
        None => network_namespace.build()?,
    });
    Ok(namespaces)
}

fn resources(plan: &Plan<'_>) -> Result<LinuxResources, OciSpecError> {
    let signed = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    let memory_bytes = signed(plan.limits.memory_bytes);
    let mut memory = LinuxMemoryBuilder::default().limit(memory_bytes);
    if plan.limits_swap {
        memory = memory.swap(memory_bytes);
    }
    let cpu = LinuxCpuBuilder::default()
        .quota(signed(plan.limits.quota()))
        .period(PERIOD);
    let no_device = LinuxDeviceCgroupBuilder::default()
        .allow(false)
        .typ(LinuxDeviceType::A)
        .access("rwm");
    LinuxResourcesBuilder::default()
        // The runtime adds null, zero, full, random, urandom, tty and the terminals.
        .devices(vec![no_device.build()?])
        .memory(memory.build()?)
        .cpu(cpu.build()?)
        .pids(LinuxPidsBuilder::default().limit(signed(plan.limits.pids)).build()?)
        .build()
}

/// One line of the mount table.
fn mount_of(
    target: &str,
    kind: &str,
    source: impl Into<PathBuf>,
    options: &[&str],
) -> Result<Mount, OciSpecError> {
    let options: Vec<String> = options.iter().map(|&option| option.to_owned()).collect();
    MountBuilder::default()
        .destination(target)
        .typ(kind)
        .source(source)
        .options(options)
        .build()
}

fn mounts(plan: &Plan<'_>) -> Result<Vec<Mount>, OciSpecError> {
    // Charged to the sandbox's memory like everything else; bounded by itself so that it fails with ENOSPC.
    let shared = format!("size={}", plan.limits.memory_bytes / 2);
    // No sysfs: it would show the node's devices, and a user namespace cannot mount its own.
    let mut mounts = vec![
        mount_of("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"])?,
        mount_of(
            "/dev",
            "tmpfs",
            "tmpfs",
            &["nosuid", "noexec", "strictatime", "mode=755", "size=64k"],
        )?,
        mount_of(
            "/dev/pts",
            "devpts",
            "devpts",
            &[
                "nosuid",
                "noexec",
                "newinstance",
                "ptmxmode=0666",
                "mode=0620",
                "gid=5",
            ],
        )?,
        mount_of(
            "/dev/shm",
            "tmpfs",
            "shm",
            &["nosuid", "noexec", "nodev", "mode=1777", &shared],
        )?,
    ];
    for name in ["resolv.conf", "hosts", "hostname"] {
        let options = ["bind", "ro", "nosuid", "nodev", "noexec"];
        mounts.push(mount_of(
            &format!("/etc/{name}"),
            "bind",
            plan.bundle.join(name),
            &options,
        )?);
    }
    for target in plan.trust.iter().flat_map(|(_, bundles)| bundles) {
        let options = ["bind", "ro", "nosuid", "nodev", "noexec"];
        mounts.push(mount_of(target, "bind", plan.bundle.join(trust::FILE), &options)?);
    }
    if let Some(layer) = plan.layer {
        for folder in ["workspace", "tmp"] {
            let options = ["bind", "rw", "nosuid", "nodev"];
            mounts.push(mount_of(
                &format!("/{folder}"),
                "bind",
                layer.join(folder),
                &options,
            )?);
        }
    }
    mounts.push(mount_of(
        AGENT,
        "bind",
        plan.agent,
        &["bind", "ro", "nosuid", "nodev"],
    )?);
    Ok(mounts)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn document_as_json() -> Value {
        let environment = BTreeMap::from([("HOME".to_owned(), "/workspace".to_owned())]);
        let plan = Plan {
            name: "sandbox-1",
            root: Path::new("/images/default/rootfs"),
            bundle: Path::new("/run/x/sandboxes/sandbox-1"),
            layer: Some(Path::new("/run/x/mnt/sandbox-1")),
            namespace: Some(Path::new("/run/x/netns/sandbox-1")),
            agent: Path::new("/usr/bin/sandboxd"),
            command: Vec::new(),
            environment: &environment,
            trust: Some(("PEM", vec!["/etc/ssl/certs/ca-certificates.crt"])),
            first_id: 1_065_536,
            address: Ipv4Addr::new(203, 0, 113, 7),
            address6: None,
            cgroup: Path::new("sandgate/x/sandbox-1"),
            limits: Limits {
                memory_bytes: 256 << 20,
                cpu_millis: 500,
                pids: 128,
            },
            limits_swap: true,
            open_files: 20_000,
            badness: -100,
        };
        serde_json::to_value(document(&plan).unwrap()).unwrap()
    }

    #[test]
    fn a_sandbox_is_given_nothing_it_could_escape_with() {
        let document = document_as_json();
        let process = &document["process"];
        assert_eq!(process["user"], json!({"uid": 1001, "gid": 1001}));
        assert_eq!(process["noNewPrivileges"], true);
        for set in ["bounding", "effective", "inheritable", "permitted", "ambient"] {
            assert_eq!(process["capabilities"][set], json!([]), "{set}");
        }
        assert_eq!(document["root"]["readonly"], true);
        let linux = &document["linux"];
        assert_eq!(
            linux["uidMappings"],
            json!([{"containerID": 0, "hostID": 1_065_536, "size": 65_536}])
        );
        assert_eq!(linux["uidMappings"], linux["gidMappings"]);
        assert_eq!(linux["seccomp"]["defaultAction"], "SCMP_ACT_ERRNO");
        assert_eq!(linux["resources"]["devices"][0]["allow"], false);
        let kinds: Vec<&str> = linux["namespaces"]
            .as_array()
            .unwrap()
            .iter()
            .map(|one| one["type"].as_str().unwrap())
            .collect();
        for kind in ["user", "pid", "ipc", "uts", "mount", "cgroup", "network"] {
            assert!(kinds.contains(&kind), "no {kind} namespace");
        }
    }

    #[test]
    fn limits_reach_the_document() {
        let document = document_as_json();
        let resources = &document["linux"]["resources"];
        assert_eq!(
            resources["memory"],
            json!({"limit": 256 << 20, "swap": 256 << 20})
        );
        assert_eq!(resources["cpu"], json!({"quota": 50_000, "period": 100_000}));
        assert_eq!(resources["pids"]["limit"], 128);
    }

    #[test]
    fn what_it_trusts_is_mounted_over_what_the_image_trusts() {
        let document = document_as_json();
        let mounts = document["mounts"].as_array().unwrap();
        let trusted = mounts
            .iter()
            .find(|mount| mount["destination"] == "/etc/ssl/certs/ca-certificates.crt")
            .unwrap();
        assert_eq!(
            trusted["source"],
            "/run/x/sandboxes/sandbox-1/ca-certificates.crt"
        );
    }

    #[test]
    fn only_the_layer_is_writable_and_no_host_directory_is_there() {
        let document = document_as_json();
        for mount in document["mounts"].as_array().unwrap() {
            let options: Vec<&str> = mount["options"]
                .as_array()
                .unwrap()
                .iter()
                .map(|one| one.as_str().unwrap())
                .collect();
            let target = mount["destination"].as_str().unwrap();
            assert!(options.contains(&"nosuid"), "{target}");
            if mount["type"] == "bind" && !["/workspace", "/tmp"].contains(&target) {
                assert!(options.contains(&"ro"), "{target} is writable");
            }
            assert_ne!(mount["type"], "sysfs");
        }
    }
}
