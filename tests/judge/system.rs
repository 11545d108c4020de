//! What can be attacked: a sandbox of ours, one that an adapter starts, and none at all.

use std::{
    ffi::OsString,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use anyhow::{Context as _, Result, ensure};
use harness::{
    namespace::Namespace,
    node::{Node, binaries},
    sandbox::Sandbox,
    world::World,
};
use serde_json::json;

use crate::around::{Around, SECRET, VARIABLE};

/// Where the program lies in a sandbox of ours.
const PATH: &str = "/workspace/redteam";
/// Where another sandbox listens.
const NEIGHBOUR_PORT: u16 = 8000;
/// An address of the node that stands for another sandbox where there is none.
const BESIDE: &str = "10.213.77.7";

/// Longest wait for an answer, in milliseconds.
pub(crate) const PATIENCE: u64 = 8000;
/// The same where nobody refuses anything, and only what arrives is judged.
const SHORT: u64 = 20;
/// The same of another system, which may leave attackers waiting each time.
const OTHERS: u64 = 3000;

/// Something with a sandbox in it.
pub(crate) trait System {
    /// What the scorecard calls it.
    fn name(&self) -> String;

    /// Runs the program in the sandbox; what it wrote.
    fn run(&self, arguments: &[&str]) -> Result<String>;

    /// Whether the program can be run as root in the sandbox's network.
    fn has_root(&self) -> bool {
        true
    }

    /// Runs it so.
    fn run_as_root(&self, arguments: &[&str]) -> Result<String>;

    /// How long attacks wait for answers on which nothing depends, in milliseconds.
    fn patience(&self) -> u64 {
        PATIENCE
    }

    /// A listener in another sandbox.
    fn neighbour(&self) -> Option<SocketAddr> {
        None
    }

    /// Connections that it has had.
    fn visits_of_neighbour(&self) -> usize {
        0
    }

    /// What helps to understand a failure.
    fn report(&self) -> String {
        String::new()
    }
}

/// The program that attacks.
fn program() -> PathBuf {
    let program = binaries().join("redteam");
    assert!(
        program.is_file(),
        "{} is not there: run `make build`",
        program.display()
    );
    program
}

/// Sandgate.
pub(crate) struct Ours {
    sandbox: Sandbox,
    neighbour: Sandbox,
    beside: SocketAddr,
    network: Namespace,
    node: Node,
}

impl Ours {
    pub(crate) fn start(around: &Around) -> Result<Self> {
        // The world has IPv6, and so have its sandboxes.
        let node = Node::start_with(&around.world, &[("SANDGATE_SANDBOX_CIDR6", "")])?;
        let organization = node.register("redteam");
        let key = json!({
            "name": VARIABLE, "value": SECRET,
            "egress": { "hosts": ["key.test"], "ports": [443], "inject": [{ "kind": "bearer" }] },
        });
        organization.client.post("/secrets").json(&key).send().ok();
        let body = json!({ "network": Around::policy(), "timeout_seconds": 3600 });
        let (sandbox, neighbour) = (organization.sandbox(&body), organization.sandbox(&body));
        let program = fs::read(program())?;
        for sandbox in [&sandbox, &neighbour] {
            sandbox.write(PATH, &program);
            sandbox.sh_ok(&format!("chmod 755 {PATH}"));
        }
        neighbour.background(
            &format!("exec {PATH} listen 0.0.0.0:{NEIGHBOUR_PORT}"),
            |sandbox| {
                sandbox
                    .sh("cat /workspace/background.log")
                    .stdout
                    .contains("listening")
            },
        );
        let address = neighbour.sh_ok("hostname -I");
        let address = address.split_whitespace().next().context("an address")?.parse()?;
        let first = node.processes_of(&sandbox.id);
        let first = first.iter().find(|process| process.numbers.last() == Some(&1));
        let first = first.context("the sandbox's first process")?;
        let network = Namespace::join("attacker", format!("/proc/{}/ns/net", first.pid).as_ref())?;
        Ok(Self {
            beside: SocketAddr::new(address, NEIGHBOUR_PORT),
            sandbox,
            neighbour,
            network,
            node,
        })
    }
}

impl System for Ours {
    fn name(&self) -> String {
        "Sandgate".to_owned()
    }

    fn run(&self, arguments: &[&str]) -> Result<String> {
        let command: Vec<&str> = [PATH].iter().chain(arguments).copied().collect();
        let output = self
            .sandbox
            .execute(&json!({ "command": command, "timeout": 120_000 }));
        ensure!(output.exit_code == 0, "{output:?}");
        Ok(output.stdout)
    }

    fn run_as_root(&self, arguments: &[&str]) -> Result<String> {
        let output = self
            .network
            .command(&program().display().to_string(), arguments)?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn neighbour(&self) -> Option<SocketAddr> {
        Some(self.beside)
    }

    fn visits_of_neighbour(&self) -> usize {
        self.neighbour
            .sh_ok("cat /workspace/background.log")
            .matches("from ")
            .count()
    }

    fn report(&self) -> String {
        self.node.report()
    }
}

/// Another system, by a program that knows how to use it: see tests/redteam/README.md.
pub(crate) struct Adapter {
    adapter: PathBuf,
    world: Arc<World>,
    environment: Vec<(String, OsString)>,
    has_root: bool,
    neighbour: Option<SocketAddr>,
}

impl Adapter {
    pub(crate) fn start(around: &Around, adapter: PathBuf) -> Result<Self> {
        let directory = around.world.directory();
        let files = [
            ("REDTEAM_WORLD", "world.json", around.told(None).to_string()),
            ("REDTEAM_POLICY", "policy.json", Around::policy().to_string()),
            ("REDTEAM_CA", "authority.pem", around.world.ca.pem().to_owned()),
        ];
        let mut environment = vec![
            ("REDTEAM_PROGRAM".to_owned(), program().into()),
            ("REDTEAM_SECRET".to_owned(), format!("{VARIABLE}={SECRET}").into()),
        ];
        for (variable, name, content) in files {
            let path = directory.join(name);
            fs::write(&path, content)?;
            environment.push((variable.to_owned(), path.into()));
        }
        let mut adapter = Self {
            adapter: fs::canonicalize(&adapter).with_context(|| adapter.display().to_string())?,
            world: Arc::clone(&around.world),
            environment,
            has_root: false,
            neighbour: None,
        };
        adapter.call("start", &[])?;
        adapter.has_root = adapter.call("has-root", &[]).is_ok();
        let neighbour = adapter.call("neighbour", &[]).unwrap_or_default();
        if !neighbour.trim().is_empty() {
            let address = neighbour.trim().parse();
            adapter.neighbour = Some(address.with_context(|| format!("neighbour: {neighbour}"))?);
        }
        Ok(adapter)
    }

    fn call(&self, verb: &str, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(&self.adapter);
        command
            .arg(verb)
            .args(arguments)
            .envs(self.environment.iter().map(|(name, value)| (name, value)));
        let output = self.world.node().run(move || command.output())?;
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "{} {verb}: {} {error}",
            self.adapter.display(),
            output.status
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

impl System for Adapter {
    fn name(&self) -> String {
        let name = self.adapter.file_stem().map(Path::new);
        name.map_or_else(String::new, |name| name.display().to_string())
    }

    fn run(&self, arguments: &[&str]) -> Result<String> {
        self.call("exec", arguments)
    }

    fn patience(&self) -> u64 {
        OTHERS
    }

    fn has_root(&self) -> bool {
        self.has_root
    }

    fn run_as_root(&self, arguments: &[&str]) -> Result<String> {
        self.call("exec-root", arguments)
    }

    fn neighbour(&self) -> Option<SocketAddr> {
        self.neighbour
    }

    fn visits_of_neighbour(&self) -> usize {
        if self.neighbour.is_none() {
            return 0;
        }
        let visits = self.call("visits", &[]).expect("the adapter counts visits");
        visits.trim().parse().expect("a number of visits")
    }
}

impl Drop for Adapter {
    fn drop(&mut self) {
        // What it leaves behind ends with the world's node.
        self.call("stop", &[]).ok();
    }
}

/// No system: the program runs on the node itself.
pub(crate) struct Unfenced {
    world: Arc<World>,
    beside: harness::collector::Collector,
}

impl Unfenced {
    pub(crate) fn start(around: &Around) -> Result<Self> {
        let world = Arc::clone(&around.world);
        world.node().ip(&format!("addr add {BESIDE}/32 dev lo"))?;
        let beside = SocketAddr::new(BESIDE.parse()?, NEIGHBOUR_PORT);
        let beside = harness::collector::Collector::tcp(world.node(), beside, "another sandbox\r\n")?;
        Ok(Self { world, beside })
    }

    /// A place from which nothing can be reached.
    pub(crate) fn without_network(&self) -> Result<Alone> {
        Ok(Alone(Namespace::network("alone")?))
    }
}

/// Runs the program in a namespace, with the key in its environment as every system without a wall has it.
fn attack(place: &Namespace, arguments: &[&str]) -> Result<String> {
    let mut command = Command::new(program());
    command.args(arguments).env(VARIABLE, SECRET);
    let output = place.run(move || command.output())?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{} {error}", output.status);
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

impl System for Unfenced {
    fn name(&self) -> String {
        "no wall".to_owned()
    }

    fn run(&self, arguments: &[&str]) -> Result<String> {
        attack(self.world.node(), arguments)
    }

    fn run_as_root(&self, arguments: &[&str]) -> Result<String> {
        self.run(arguments)
    }

    fn patience(&self) -> u64 {
        SHORT
    }

    fn neighbour(&self) -> Option<SocketAddr> {
        Some(self.beside.address)
    }

    fn visits_of_neighbour(&self) -> usize {
        self.beside.arrivals().len()
    }
}

/// A namespace with nothing but its loopback interface.
pub(crate) struct Alone(Namespace);

impl System for Alone {
    fn name(&self) -> String {
        "no network".to_owned()
    }

    fn run(&self, arguments: &[&str]) -> Result<String> {
        attack(&self.0, arguments)
    }

    fn run_as_root(&self, arguments: &[&str]) -> Result<String> {
        self.run(arguments)
    }
}
