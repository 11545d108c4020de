//! The published Python clients, unchanged, against a node of the test world: every method of the areas that exist,
//! in each version; see `clients/`.
//!
//! `deploy/setup.sh --tests` installs the clients from their registry.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use anyhow::Result;
use harness::{
    cases,
    node::Node,
    suite::{Fixture, Suite},
    world::World,
};

fn main() -> ExitCode {
    Suite::from_arguments()
        .group(
            "clients",
            cases![
                version_2_1_0,
                version_1_1_0,
                version_1_0_4,
                nothing_breaks_the_api_and_it_answers_as_it_says
            ],
        )
        .finish()
}

/// What has no end by itself.
const ENDLESS: &str = "/(stream|watch|events|ws|terminal|output)$";

/// A node with nothing but its defaults, as a new user has it.
struct Served {
    // Stopped before its world goes.
    node: Node,
    world: Arc<World>,
}

impl Fixture for Served {
    fn start() -> Result<Self> {
        let world = World::fixture().build()?;
        let node = Node::start(&world)?;
        Ok(Self { node, world })
    }

    fn report(&self) -> String {
        self.node.report()
    }
}

fn version_2_1_0(served: &Served) {
    run(served, "2.1.0");
}

fn version_1_1_0(served: &Served) {
    run(served, "1.1.0");
}

fn version_1_0_4(served: &Served) {
    run(served, "1.0.4");
}

/// Runs the cases with one version of the client.
#[track_caller]
fn run(served: &Served, version: &str) {
    let client = clients_dir().join(version);
    let cases = here().join("clients/run.py");
    python(served, &client, &cases.display().to_string(), version);
}

/// schemathesis against the API's own description: requests that fit it and requests that do not, of every endpoint, with
/// ids that are nobody's and then with a sandbox's.
fn nothing_breaks_the_api_and_it_answers_as_it_says(served: &Served) {
    let tool = clients_dir().join("schemathesis");
    let organization = served.node.register("schema");
    let sandbox = organization.sandbox(&serde_json::json!({}));
    let command = |config: &Path, but: &str, more: &str| {
        format!(
            "-m schemathesis.cli --config-file {config} run http://{api}/openapi.json --url http://{api} \
             -H 'Authorization: Bearer {key}' --seed 1 --phases examples,coverage,fuzzing --request-timeout 40 \
             --generation-database none --no-color --exclude-path-regex '{ENDLESS}{but}' {more}",
            config = config.display(),
            api = served.node.api(),
            key = organization.key,
        )
    };
    let config = here().join("schemathesis.toml");
    // The key must go on working.
    let nobodys = command(&config, "|/api-keys/|/users/", "--max-examples 4");
    python(served, &tool, &nobodys, "with nobody's ids");
    let own = served.world.directory().join("own.toml");
    let text = std::fs::read_to_string(&config).expect("its settings");
    let text = format!("{text}\n[parameters]\n\"path.id\" = \"{}\"\n", sandbox.id);
    std::fs::write(&own, text).expect("its settings");
    // So must the sandbox.
    let only = "--include-path-regex '/sandbox/\\{id\\}' --exclude-method DELETE --max-examples 6";
    let own = command(&own, "|/(stop|pause)$", only);
    python(served, &tool, &own, "with a sandbox's id");
    assert_eq!(sandbox.status(), "running", "or nothing was tried on it");
}

/// Runs Python in the node's namespace. Its own words are the panic's.
#[track_caller]
fn python(served: &Served, packages: &Path, arguments: &str, what: &str) {
    assert!(
        packages.join(".stamp").is_file(),
        "{} is missing; `deploy/setup.sh --tests` installs it",
        packages.display()
    );
    let script = format!(
        "cd {} && export PYTHONPATH={} PYTHONDONTWRITEBYTECODE=1 STATESET_BASE_URL=http://{}\n\
         exec timeout 900 python3 {arguments} 2>&1",
        served.world.directory().display(),
        packages.display(),
        served.node.api(),
    );
    let output = served
        .world
        .node()
        .run(move || std::process::Command::new("bash").args(["-c", &script]).output())
        .expect("bash starts");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{what}:\n{said}");
}

fn here() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("conformance")
}

/// Where the clients are, a directory each.
fn clients_dir() -> PathBuf {
    let tools = std::env::var_os("SANDGATE_TOOLCHAIN_DIR").unwrap_or_else(|| "/opt/sandgate".into());
    Path::new(&tools).join("clients")
}
