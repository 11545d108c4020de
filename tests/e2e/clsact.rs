//! A whole node whose programs hang by clsact filters, as on kernels before 6.6: the same wall, also while netd is
//! killed, and when somebody takes the filters away.

use std::time::Duration;

use anyhow::{Result, ensure};
use harness::{
    namespace::Namespace,
    node::Node,
    probe,
    sandbox::Sandbox,
    suite::Fixture,
    wait,
    world::{EVIL, NODE, OK},
};
use serde_json::json;

use crate::{
    machine::{Machine, fixture_policy},
    outages::{self, assert_only_allowed_traffic, wait_until_served},
    passes::{chatter, goes_on, open, passes},
    siege::Held,
};

/// Longest wait for what happens at once, or within seconds.
const SOON: Duration = Duration::from_secs(60);
/// A port on which the internet's collectors echo what they get.
const ECHO: u16 = 8443;

/// A node with filters.
pub(crate) struct Filtered(Machine);

impl Fixture for Filtered {
    fn start() -> Result<Self> {
        let machine = Machine::with(&[("SANDGATE_ATTACH", "clsact")])?;
        ensure!(
            passes(&machine.node) == Ok(()),
            "no kernel pass: {:?}",
            passes(&machine.node)
        );
        // Where programs that run as root in a sandbox's network look for it.
        std::fs::write(machine.world.directory().join("ca.pem"), machine.world.ca.pem())?;
        Ok(Self(machine))
    }

    fn report(&self) -> String {
        self.0.report()
    }
}

impl Filtered {
    /// The node, whatever the case before did to it.
    fn ready(&self) -> &Machine {
        self.0.node.wait_ready();
        wait::until("it passes", SOON, || passes(&self.0.node).ok());
        &self.0
    }

    /// The router namespace.
    fn router(&self) -> Namespace {
        let path = self.0.node.run_dir().join("netns/router");
        let inside = path.strip_prefix("/").expect("absolute");
        let file = self.0.world.node().task().join("root").join(inside);
        Namespace::join("router", &file).expect("the router namespace")
    }

    /// The router's end of a sandbox's veth.
    fn interface(&self, sandbox: &Sandbox) -> String {
        let links = self.router().ip("-o link").expect("the links");
        let line = links.lines().find(|line| line.contains(&sandbox.id));
        let name = line.and_then(|line| line.split([':', '@']).nth(1)).map(str::trim);
        name.unwrap_or_else(|| panic!("{} is not among\n{links}", sandbox.id))
            .to_owned()
    }

    /// The filters of one side of an interface, a line each.
    fn filters(&self, interface: &str, side: &str) -> Vec<String> {
        let shown = self
            .router()
            .command("tc", &["filter", "show", "dev", interface, side]);
        // Without the discipline there is nothing to be shown, and older programs say so.
        let text = shown.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
        let text = text.unwrap_or_default();
        let own = text.lines().filter(|line| line.contains(" handle "));
        own.map(str::to_owned).collect()
    }

    /// Exactly our programs hang there, by filters that nothing can come before.
    #[track_caller]
    fn assert_filtered(&self, interface: &str) {
        for (side, program) in [("ingress", "from_sandbox"), ("egress", "to_sandbox")] {
            let filters = self.filters(interface, side);
            let [filter] = &filters[..] else {
                panic!("{interface} {side}: {filters:?}");
            };
            assert!(
                filter.contains(program) && filter.contains("pref 1 "),
                "{interface} {side}: {filter}"
            );
        }
    }
}

pub(crate) fn nothing_but_what_is_allowed_gets_out(filtered: &Filtered) {
    let machine = filtered.ready();
    let sandbox = machine.fenced();
    filtered.assert_filtered(&filtered.interface(&sandbox));
    let probe = machine.probe(&sandbox);
    let mark = machine.world.capture().mark();
    probe
        .try_one(&probe::https("ok.test", "ok.test"))
        .assert_answered("hello from ok.test");
    let refused = probe.try_all(&[
        probe::tcp(EVIL, 8080, "canary"),
        probe::tcp(OK, 22, "canary"),
        probe::tcp("10.0.0.5", 80, "canary"),
        probe::tcp("169.254.169.254", 80, "canary"),
        probe::tcp(NODE, 8080, "canary"),
        probe::https(EVIL, "ok.test"),
    ]);
    for outcome in refused {
        outcome.assert_refused_at_connect();
    }
    probe.try_one(&probe::udp(EVIL, 8080)).assert_refused();
    probe.try_one(&probe::dns(EVIL, "leak.evil.test"));
    assert_only_allowed_traffic(&machine.world, mark);
    sandbox.audited(&json!({ "decision": "deny", "ip": EVIL.to_string(), "port": 8080 }));
    // From the first packet on, and to the last.
    sandbox.set_network(&json!({ "mode": "deny_all" }));
    probe
        .try_one(&probe::https(OK, "ok.test"))
        .assert_refused_at_connect();
    sandbox.stop();
}

pub(crate) fn a_killed_netd_lets_nothing_out_and_recovers(filtered: &Filtered) {
    outages::a_killed_netd_lets_nothing_out_and_recovers(&filtered.0);
}

pub(crate) fn what_the_kernel_forwards_outlives_netd_and_is_adopted(filtered: &Filtered) {
    let machine = filtered.ready();
    let sandbox = machine.organization.sandbox(&json!({ "network": open(&[ECHO]) }));
    let interface = filtered.interface(&sandbox);
    chatter(&sandbox, OK, ECHO);
    let arrivals = machine.world.tcp_collector((OK, ECHO)).arrivals();
    assert_eq!(arrivals.last().expect("it arrived").from.ip(), NODE);
    for _ in 0..2 {
        machine.node.replace(Node::netd);
        goes_on(&sandbox);
        machine.node.wait_ready();
        wait::until("it passes again", SOON, || passes(&machine.node).ok());
        // The same filters with the programs of the new one, and not others beside them.
        filtered.assert_filtered(&interface);
    }
    goes_on(&sandbox);
    sandbox.set_network(&json!({ "mode": "deny_all" }));
    let mark = machine.world.capture().mark();
    wait::until("the connection is cut", SOON, || {
        let log = sandbox.sh("tail -n 1 /workspace/background.log").stdout;
        log.contains("ended").then_some(())
    });
    machine.world.capture().assert_nothing_to(OK, mark);
    sandbox.stop();
}

pub(crate) fn filters_that_are_taken_away_let_nothing_out_and_come_back(filtered: &Filtered) {
    let machine = filtered.ready();
    let fenced = machine.fenced();
    let probe = machine.probe(&fenced);
    wait_until_served(&probe);
    let talking = machine.organization.sandbox(&json!({ "network": open(&[ECHO]) }));
    chatter(&talking, OK, ECHO);
    let interfaces = [filtered.interface(&fenced), filtered.interface(&talking)];
    // Nobody looks after them for as long as it takes to see that nothing depends on it.
    let held = Held::new(&machine.node, machine.node.netd());
    for interface in &interfaces {
        filtered
            .router()
            .command("tc", &["qdisc", "del", "dev", interface, "clsact"])
            .expect("taken away");
        assert!(filtered.filters(interface, "ingress").is_empty());
    }
    let mark = machine.world.capture().mark();
    let attempts = [
        probe::https(OK, "ok.test"),
        probe::tcp(OK, ECHO, "canary"),
        probe::tcp(EVIL, 8080, "canary"),
        probe::tcp("10.0.0.5", 80, "canary"),
        probe::udp(EVIL, 8080),
        probe::dns(EVIL, "leak.evil.test"),
    ];
    for sandbox in [&fenced, &talking] {
        for (attempt, outcome) in attempts
            .iter()
            .zip(probe::as_root(&machine.node, sandbox, &attempts))
        {
            assert_ne!(outcome.outcome, "answered", "{attempt}: {outcome:?}");
        }
    }
    for (address, what) in [(OK, "allowed"), (EVIL, "denied")] {
        let left = machine.world.capture().sent_to(address, mark);
        assert!(left.is_empty(), "{what}, and nobody judged it: {left:#?}");
    }
    drop(held);
    wait::until("the filters are back", SOON, || {
        let both = |interface: &String| {
            !filtered.filters(interface, "ingress").is_empty()
                && !filtered.filters(interface, "egress").is_empty()
        };
        interfaces.iter().all(both).then_some(())
    });
    interfaces
        .iter()
        .for_each(|interface| filtered.assert_filtered(interface));
    machine.node.wait_ready();
    // What it had open may go on: it is judged again.
    talking.stop();
    let mark = machine.world.capture().mark();
    wait_until_served(&probe);
    probe
        .try_one(&probe::tcp(EVIL, 8080, "canary"))
        .assert_refused_at_connect();
    assert_only_allowed_traffic(&machine.world, mark);
    fenced.stop();
}

pub(crate) fn a_means_that_is_none_is_refused_by_name(filtered: &Filtered) {
    let world = &filtered.0.world;
    let settings = [("SANDGATE_ATTACH", "sometimes")];
    let other = Node::new(world, world.place(), "refused", &settings).expect("settings");
    let (status, text) = other.run("controller", &["up"]).expect("it is started");
    assert_eq!(status.code(), Some(64), "{text}");
    assert!(
        text.contains("SANDGATE_ATTACH") && text.contains("sometimes"),
        "{text}"
    );
    assert!(!other.data_dir().exists(), "nothing is made before");
}

pub(crate) fn taken_down_it_leaves_nothing(filtered: &Filtered) {
    let machine = filtered.ready();
    let sandbox = machine
        .organization
        .sandbox(&json!({ "network": fixture_policy() }));
    assert_eq!(sandbox.sh_ok("echo fine"), "fine");
    machine.node.stop().expect("it ends when asked");
    machine.node.down().expect("it is taken down");
    let left = machine.node.traces();
    assert!(left.is_empty(), "`controller down` left behind: {left:#?}");
    for name in ["bpf", "netns", "netd"] {
        assert!(!machine.node.run_dir().join(name).exists(), "{name} is left");
    }
    let links = machine.world.node().ip("-o link").expect("the links");
    assert!(!links.contains("sgup"), "{links}");
    machine.node.start_again().expect("and starts again");
}
