//! The wall under attack from below: what holds it up is frozen, starved, cut off and replaced while a sandbox
//! does its worst. Whatever happens, the capture at the world's edge sees only what policy allows; and once it is
//! over, what is allowed works again.

use std::{net::IpAddr, sync::Arc, time::Duration};

use anyhow::Result;
use harness::{
    capture::{Mark, Packet},
    node::{Node, Process},
    probe::{self, Outcome, Probe},
    sandbox::{Organization, Sandbox},
    suite::Fixture,
    wait,
    world::{EVIL, OK, RESOLVER, World},
};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::{
    machine::fixture_policy,
    outages::{RECOVERY, assert_only_allowed_traffic},
};

pub(crate) mod fresh;
pub(crate) mod frozen;
pub(crate) mod starved;

/// A node that is attacked.
pub(crate) struct Besieged {
    organization: Organization,
    // Stopped before its world goes.
    node: Node,
    world: Arc<World>,
}

impl Fixture for Besieged {
    fn start() -> Result<Self> {
        let world = World::fixture().build()?;
        let node = Node::start(&world)?;
        Ok(Self::on(world, node))
    }

    fn report(&self) -> String {
        self.node.report()
    }
}

impl Besieged {
    fn on(world: Arc<World>, node: Node) -> Self {
        // Where programs that run as root in a sandbox's network look for it.
        std::fs::write(world.directory().join("ca.pem"), world.ca.pem())
            .expect("the world's directory is writable");
        let organization = node.register("siege");
        Self {
            organization,
            node,
            world,
        }
    }

    #[track_caller]
    fn fenced(&self) -> Sandbox {
        self.organization.sandbox(&json!({ "network": fixture_policy() }))
    }

    #[track_caller]
    fn probe<'a>(&self, sandbox: &'a Sandbox) -> Probe<'a> {
        Probe::install(sandbox, &self.world)
    }

    /// Attempts that need neither netd nor the controller to be made.
    #[track_caller]
    fn as_root(&self, sandbox: &Sandbox, attempts: &[Value]) -> Vec<Outcome> {
        probe::as_root(&self.node, sandbox, attempts)
    }

    /// Starts an attacker inside that goes on by itself.
    #[track_caller]
    fn unleash(&self, sandbox: &Sandbox) {
        self.probe(sandbox);
        sandbox.background(&Probe::loop_line(&attack(), 0), |sandbox| {
            sandbox.sh("grep -q answered /workspace/background.log").exit_code == 0
        });
    }

    /// The attacker goes on.
    #[track_caller]
    fn assert_awake(&self, sandbox: &Sandbox) {
        let attempts = || -> u64 {
            let lines = sandbox.sh_ok("wc -l < /workspace/background.log");
            lines.parse().expect("a number")
        };
        let before = attempts();
        wait::until("the attacker is awake", RECOVERY, || {
            (attempts() > before).then_some(())
        });
    }

    #[track_caller]
    fn assert_only_allowed(&self, mark: Mark) {
        assert_only_allowed_traffic(&self.world, mark);
    }

    /// What began at the node since `mark`: connections and questions, not what belongs to earlier ones.
    fn begun(&self, mark: Mark) -> Vec<Packet> {
        let mut packets = self.world.capture().sent_since(mark);
        packets.retain(|packet| packet.opens || packet.protocol == harness::capture::protocol::UDP);
        packets
    }
}

impl Drop for Besieged {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // The runner shows the log of the group's own node, and some cases have others.
            #[expect(clippy::print_stderr, reason = "what helps to understand a failed case")]
            {
                eprintln!("{}", self.node.report());
            }
        }
    }
}

/// One allowed connection among all that is forbidden.
fn attack() -> Vec<Value> {
    let soon = |attempt: Value, seconds: f64| probe::with(attempt, json!({ "timeout": seconds }));
    vec![
        soon(probe::https("ok.test", "ok.test"), 1.0),
        soon(
            probe::with(probe::https(OK, "evil.test"), json!({ "unverified": true })),
            1.0,
        ),
        soon(
            probe::with(probe::https(EVIL, "ok.test"), json!({ "unverified": true })),
            1.0,
        ),
        soon(probe::tcp(EVIL, 8080, "canary"), 1.0),
        soon(probe::tcp(OK, 22, "canary"), 1.0),
        soon(probe::tcp("169.254.169.254", 80, "canary"), 1.0),
        soon(probe::udp(EVIL, 8080), 0.05),
        soon(probe::udp(EVIL, 443), 0.05),
        soon(probe::dns(EVIL, "leak.evil.test"), 0.2),
        soon(probe::dns(RESOLVER, "leak.evil.test"), 0.2),
    ]
}

/// A process that does nothing until this is dropped.
pub(crate) struct Held<'a> {
    node: &'a Node,
    process: Process,
}

impl<'a> Held<'a> {
    #[track_caller]
    pub(crate) fn new(node: &'a Node, process: Option<Process>) -> Self {
        let process = process.expect("it runs");
        node.signal(&process, Signal::SIGSTOP).expect("it runs");
        let held = Self { node, process };
        wait::until("it stands still", RECOVERY, || held.is_still().then_some(()));
        held
    }

    /// Every thread of it.
    fn is_still(&self) -> bool {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.process.pid));
        let mut tasks = tasks.into_iter().flatten().filter_map(Result::ok);
        tasks.all(|task| {
            let status = std::fs::read_to_string(task.path().join("status")).unwrap_or_default();
            status.contains("\nState:\tT") || status.contains("\nState:\tZ") || status.is_empty()
        })
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        // Somebody may have killed it.
        self.node.signal(&self.process, Signal::SIGCONT).ok();
    }
}

/// The address that a sandbox has.
#[track_caller]
fn address(sandbox: &Sandbox) -> IpAddr {
    let own = sandbox.sh_ok("hostname -I");
    let first = own.split(' ').next().unwrap_or_default();
    first.parse().unwrap_or_else(|_| panic!("no address in {own:?}"))
}

/// How many attempts the audit tells of, each record with its repetitions.
#[track_caller]
fn told(sandbox: &Sandbox, fits: impl Fn(&Value) -> bool) -> u64 {
    let events = sandbox.audit("decision=deny");
    let ours = events.iter().filter(|event| fits(event));
    ours.map(|event| event["repeated"].as_u64().unwrap_or(0)).sum()
}

/// Waits until the audit tells of `count` attempts, and makes sure that it never tells of more.
#[track_caller]
fn assert_told(sandbox: &Sandbox, count: u64, fits: impl Fn(&Value) -> bool) {
    wait::within(Duration::from_secs(60), || {
        (told(sandbox, &fits) >= count).then_some(())
    });
    assert_eq!(told(sandbox, &fits), count, "attempts in the audit");
}
