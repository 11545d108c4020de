//! Who may use whom: the layers of ARCHITECTURE.md, kept by looking at what cargo resolves.

use std::{
    collections::{BTreeMap, BTreeSet},
    process::Command,
};

use cargo_metadata::{CargoOpt, DependencyKind, Metadata, MetadataCommand, PackageId};

/// Every package of the workspace and its line. A package may use only packages on lower lines.
const LINES: [(&str, u8); 13] = [
    ("sandgate-tests", 5),
    ("sandgate-fuzz", 5),
    ("netd", 4),
    ("tunnel-proxy", 4),
    ("controller", 4),
    ("sandboxd", 4),
    ("redteam", 4),
    ("sandgate-relay", 3),
    ("sandgate-api", 2),
    ("sandgate-daemon", 2),
    ("sandgate-policy", 1),
    ("netd-common", 1),
    ("netd-ebpf", 1),
];

/// The kernel programs and the bytes they share with user space are one thing on two sides.
const SAME_LINE: [(&str, &str); 1] = [("netd-ebpf", "netd-common")];

/// What only some packages may use, directly or through others.
const ONLY: [(&str, &[&str]); 6] = [
    ("aya", &["netd", "netd-common"]),
    ("sqlx", &["controller"]),
    ("kube", &["controller"]),
    ("object_store", &["controller"]),
    ("axum", &["controller"]),
    ("oci-spec", &["controller"]),
];

/// What a package must never use, however deep.
const NEVER: [(&str, &[&str]); 6] = [
    (
        "sandgate-policy",
        &["tokio", "hyper", "aya", "nix", "rustix", "libc", "socket2"],
    ),
    ("sandgate-api", &["tokio", "hyper", "axum", "aya"]),
    ("sandboxd", &["hyper", "axum", "aya", "sqlx", "rustls"]),
    ("netd-common", &["tokio", "serde"]),
    // It is carried into any sandbox, also into those of others.
    (
        "redteam",
        &["tokio", "rustls", "hyper", "sandgate-api", "sandgate-policy"],
    ),
    // It faces strangers: nothing of the kernel's, the store's or the keys' is in it.
    (
        "tunnel-proxy",
        &["aya", "axum", "sqlx", "rtnetlink", "netd-common"],
    ),
];

fn metadata() -> Metadata {
    let mut command = MetadataCommand::new();
    command
        .manifest_path(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"))
        .features(CargoOpt::SomeFeatures(vec![]));
    command.other_options(vec![
        "--offline".to_owned(),
        "--filter-platform".to_owned(),
        host(),
    ]);
    command.exec().expect("cargo metadata")
}

fn host() -> String {
    format!("{}-unknown-linux-gnu", std::env::consts::ARCH)
}

/// Direct dependencies of each package by name; those for its tests apart.
struct Graph {
    normal: BTreeMap<String, BTreeSet<String>>,
    tests: BTreeMap<String, BTreeSet<String>>,
    members: BTreeSet<String>,
}

impl Graph {
    fn read(metadata: &Metadata) -> Self {
        let names: BTreeMap<&PackageId, String> = metadata
            .packages
            .iter()
            .map(|package| (&package.id, package.name.to_string()))
            .collect();
        let mut graph = Self {
            normal: BTreeMap::new(),
            tests: BTreeMap::new(),
            members: BTreeSet::new(),
        };
        graph
            .members
            .extend(metadata.workspace_members.iter().map(|id| names[id].clone()));
        for node in &metadata.resolve.as_ref().expect("a resolved graph").nodes {
            for dependency in &node.deps {
                let (from, to) = (names[&node.id].clone(), names[&dependency.pkg].clone());
                let runs = dependency
                    .dep_kinds
                    .iter()
                    .any(|kind| kind.kind != DependencyKind::Development);
                let graph = if runs { &mut graph.normal } else { &mut graph.tests };
                graph.entry(from).or_default().insert(to);
            }
        }
        graph
    }
}

/// Everything that ends up in `package` when it is built alone, itself excepted. The metadata would not tell:
/// it has the union of the features that all packages ask for.
fn all(package: &str) -> BTreeSet<String> {
    let output = Command::new(env!("CARGO"))
        .args([
            "tree",
            "--offline",
            "--edges",
            "no-dev",
            "--prefix",
            "none",
            "--format",
            "{p}",
        ])
        .args(["--package", package, "--target", &host()])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo tree");
    let text = String::from_utf8_lossy(&output.stdout);
    let problem = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "cargo tree: {problem}");
    let mut found: BTreeSet<String> = text
        .lines()
        .filter_map(|line| line.split_whitespace().next().map(str::to_owned))
        .collect();
    assert!(found.remove(package), "cargo tree shows {package}: {text}");
    found
}

fn line(package: &str) -> Option<u8> {
    LINES
        .iter()
        .find(|(name, _)| *name == package)
        .map(|(_, line)| *line)
}

#[test]
fn every_package_has_its_line() {
    let graph = Graph::read(&metadata());
    let listed: BTreeSet<String> = LINES.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(
        graph.members, listed,
        "ARCHITECTURE.md and this test name every package"
    );
}

#[test]
fn a_package_uses_only_packages_on_lower_lines() {
    let graph = Graph::read(&metadata());
    for (package, own) in LINES {
        let direct = graph
            .normal
            .get(package)
            .into_iter()
            .flatten()
            .chain(graph.tests.get(package).into_iter().flatten());
        for used in direct {
            let Some(other) = line(used) else { continue };
            let allowed = other < own || SAME_LINE.contains(&(package, used.as_str()));
            assert!(allowed, "{package} (line {own}) uses {used} (line {other})");
        }
    }
}

#[test]
fn what_belongs_to_one_program_stays_there() {
    let graph = Graph::read(&metadata());
    for (library, users) in ONLY {
        for package in graph
            .members
            .iter()
            .filter(|package| *package != "sandgate-tests")
        {
            let direct = graph
                .normal
                .get(package)
                .is_some_and(|used| used.contains(library));
            assert!(
                !direct || users.contains(&package.as_str()),
                "{package} uses {library}, which only {users:?} may"
            );
        }
    }
    assert!(
        graph.normal["netd"].contains("aya"),
        "the test looks at the right graph"
    );
    for (package, forbidden) in NEVER {
        let all = all(package);
        for library in forbidden {
            assert!(!all.contains(*library), "{package} must never use {library}");
        }
    }
}

#[test]
fn every_package_takes_the_workspaces_lints_and_compiler() {
    let metadata = metadata();
    for package in metadata.workspace_packages() {
        if package.name == "netd-ebpf" {
            // Built for another target by another compiler; the workspace's lints deny what it is made of.
            continue;
        }
        let manifest = std::fs::read_to_string(&package.manifest_path).expect("a manifest");
        for line in [
            "[lints]\nworkspace = true",
            "edition.workspace = true",
            "rust-version.workspace = true",
        ] {
            assert!(
                manifest.contains(line),
                "{} lacks `{line}`",
                package.manifest_path
            );
        }
    }
}
