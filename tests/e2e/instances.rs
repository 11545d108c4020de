//! Several instances on one machine: each works, none sees or disturbs another, and one can go while the others stay.

use std::{fs, path::Path, sync::Arc, time::Duration};

use anyhow::Result;
use harness::{
    namespace::Namespace,
    node::Node,
    probe::{self, Probe},
    sandbox::{Organization, Sandbox},
    snapshot::Snapshot,
    suite::Fixture,
    wait,
    world::{EVIL, OK, World},
};
use serde_json::json;

use crate::{machine::fixture_policy, outages::wait_until_served};

/// What ends takes its time.
const SETTLED: Duration = Duration::from_secs(60);
/// Of an instance that shares the first one's network namespace.
const ELSEWHERE: [(&str, &str); 6] = [
    ("SANDGATE_API_ADDR", "127.0.0.1:18080"),
    ("SANDGATE_TUNNEL_ADDR", "127.0.0.1:18081"),
    ("SANDGATE_METRICS_ADDR", "127.0.0.1:19464"),
    ("SANDGATE_NETD_METRICS_ADDR", "127.0.0.1:19465"),
    ("SANDGATE_TUNNEL_METRICS_ADDR", "127.0.0.1:19466"),
    ("SANDGATE_SANDBOX_CIDR", "10.214.0.0/16"),
];

/// The other one's own programs and mounts are seen from the first one's node, and the first one's probe comes and goes.
const OWN: [&str; 4] = ["process ", "namespace ", "descriptor ", "BPF map entry "];

/// A node with one instance, to which others come.
pub(crate) struct First {
    organization: Organization,
    sandbox: Sandbox,
    node: Node,
    world: Arc<World>,
}

impl Fixture for First {
    fn start() -> Result<Self> {
        let world = World::fixture().build()?;
        let node = Node::start(&world)?;
        // The world's own link is at rest when its address is no longer tentative.
        let link = || {
            let text = world.node().ip("-6 -o address show dev uplink scope link").ok()?;
            (text.contains("fe80") && !text.contains("tentative")).then_some(())
        };
        anyhow::ensure!(
            wait::within(SETTLED, link).is_some(),
            "the uplink has no link-local address"
        );
        let organization = node.register("first");
        let sandbox = organization.sandbox(&json!({ "network": fixture_policy() }));
        let probe = Probe::install(&sandbox, &world);
        wait_until_served(&probe);
        // It is at work while others come and go.
        let attempts = [probe::https(OK, "ok.test"), probe::tcp(EVIL, 8080, "canary")];
        sandbox.background(&Probe::loop_line(&attempts, 20), |sandbox| {
            sandbox.sh("grep -q answered /workspace/background.log").exit_code == 0
        });
        Ok(Self {
            organization,
            sandbox,
            node,
            world,
        })
    }

    fn report(&self) -> String {
        self.node.report()
    }
}

impl First {
    /// What an instance that comes and goes must not change, once nothing of earlier ones is on its way out.
    fn rest(&self) -> Snapshot {
        Snapshot::at_rest(&self.node, &OWN, SETTLED)
    }

    fn snapshot(&self) -> Snapshot {
        Snapshot::take(&self.node).expect("a look at the node")
    }

    /// The first instance as it was, while the other one works beside it.
    #[track_caller]
    fn assert_undisturbed(&self, before: &Snapshot, other: &Node) {
        let shown = |path: &Path| format!("mount {}", path.display());
        let (run, data) = (shown(other.run_dir()), shown(other.data_dir()));
        let but = [&OWN[..], &[&run, &data]].concat();
        let changed = || {
            let its = self.uplink_of(other);
            self.snapshot().since(before).without(&but).without_any(&its)
        };
        let rest = wait::within(SETTLED, || changed().is_empty().then_some(()));
        if rest.is_none() {
            panic!("disturbed:\n{}", changed());
        }
    }

    /// What the other instance's uplink is called, if it has one here: interface and table.
    fn uplink_of(&self, other: &Node) -> Vec<String> {
        let links = self.world.node().ip("-o link").expect("the links");
        let whose = format!("alias sandgate {}", other.run_dir().display());
        let its = links.lines().find(|line| line.contains(&whose));
        let name = its.and_then(|line| line.split([':', '@']).nth(1)).map(str::trim);
        name.map_or_else(Vec::new, |name| {
            vec![name.to_owned(), name.replacen("sgup", "sandgate_", 1)]
        })
    }

    /// Its sandbox works, and what is forbidden to it is refused, since this many attempts.
    #[track_caller]
    fn goes_on(&self, since: u64) -> u64 {
        let attempts = || -> u64 {
            let lines = self.sandbox.sh_ok("wc -l < /workspace/background.log");
            lines.parse().expect("a number")
        };
        wait::until("the first instance's sandbox goes on", SETTLED, || {
            (attempts() > since + 2).then_some(())
        });
        let tail = self.sandbox.sh_ok("tail -n 2 /workspace/background.log");
        assert!(tail.contains("answered") && tail.contains("refused"), "{tail}");
        assert!(self.world.tcp_collector((EVIL, 8080)).arrivals().is_empty());
        attempts()
    }

    /// Starts another instance, has it work, ends it and takes it down.
    fn visit(&self, place: &Arc<Namespace>, name: &str, settings: &[(&str, &str)]) {
        let before = self.rest();
        let mut attempts = self.goes_on(0);
        let other = Node::start_in(&self.world, place, name, settings).expect("it starts beside the first");
        let organization = other.register("second");
        let sandbox = organization.sandbox(&json!({ "network": fixture_policy() }));
        // It works.
        assert_eq!(sandbox.sh_ok("echo fine"), "fine");
        let probe = Probe::install(&sandbox, &self.world);
        wait_until_served(&probe);
        probe
            .try_one(&probe::tcp(EVIL, 8080, "canary"))
            .assert_refused_at_connect();
        // Neither knows the other's keys, sandboxes or processes.
        let foreign = self.organization.client.with_key(&organization.key);
        foreign.get("/sandboxes").send().refused(401, "UNAUTHORIZED");
        assert_eq!(organization.running(), std::slice::from_ref(&sandbox.id));
        assert_eq!(
            self.organization.running(),
            std::slice::from_ref(&self.sandbox.id)
        );
        assert!(other.traces_of(&sandbox.id).len() > 3, "the judge sees it");
        assert!(
            !self.node.traces().iter().any(|trace| trace.contains(&sandbox.id)),
            "it is made with the first one's things"
        );
        let address = |sandbox: &Sandbox| {
            sandbox.sh_ok(
                "python3 -c 'import socket; s = socket.socket(type=socket.SOCK_DGRAM); \
                 s.connect((\"203.0.113.9\", 9)); print(s.getsockname()[0])'",
            )
        };
        probe
            .try_one(&probe::tcp(address(&self.sandbox), 22, "x"))
            .assert_refused();
        self.assert_undisturbed(&before, &other);
        attempts = self.goes_on(attempts);
        // Its end, with its sandbox still running, is nobody else's.
        other.stop().expect("it ends when asked");
        attempts = self.goes_on(attempts);
        other.down().expect("it is taken down");
        let left = other.left_behind();
        assert!(left.is_empty(), "`controller down` left behind: {left:#?}");
        self.goes_on(attempts);
        drop(other);
        self.assert_undisturbed(&before, &self.node);
        let fresh = self.organization.sandbox(&json!({}));
        assert_eq!(fresh.sh_ok("echo fine"), "fine");
        fresh.stop();
        wait::until("nothing of it is left", SETTLED, || {
            self.node.traces_of(&fresh.id).is_empty().then_some(())
        });
    }
}

pub(crate) fn one_in_a_network_namespace_of_its_own_has_the_same_addresses(first: &First) {
    let annex = first.world.annex().expect("a network namespace");
    // Everything by default: the same ports, the same range of sandboxes.
    first.visit(&annex, "annex", &[]);
}

pub(crate) fn one_beside_it_has_addresses_of_its_own(first: &First) {
    first.visit(first.world.place(), "beside", &ELSEWHERE);
}

pub(crate) fn what_is_in_use_is_refused_by_name(first: &First) {
    let holder = first.node.supervisor().expect("it runs");
    let refused = |settings: &[(&str, &str)], named: &[&str]| {
        let other = Node::new(&first.world, first.world.place(), "refused", settings).expect("settings");
        let (status, text) = other.run("controller", &["up"]).expect("it is started");
        assert!(!status.success(), "{text}");
        for word in named {
            assert!(text.contains(word), "`{word}` is not in: {text}");
        }
        // Not one word of success, and nothing left of the attempt.
        assert!(!text.contains("sandboxes can be created"), "{text}");
    };
    let (run, data) = (
        first.node.run_dir().display().to_string(),
        first.node.data_dir().display().to_string(),
    );
    let by = format!("process {holder}");
    refused(
        &[&ELSEWHERE[..], &[("SANDGATE_RUN_DIR", run.as_str())]].concat(),
        &["SANDGATE_RUN_DIR", &run, "in use by another instance", &by],
    );
    refused(
        &[&ELSEWHERE[..], &[("SANDGATE_DATA_DIR", data.as_str())]].concat(),
        &["SANDGATE_DATA_DIR", &data, "in use by another instance", &by],
    );
    refused(&ELSEWHERE[1..], &["SANDGATE_API_ADDR", "127.0.0.1:8080"]);
    // Taking down what runs is refused as well.
    let (status, text) = first.node.run("controller", &["down"]).expect("it is started");
    assert!(
        !status.success() && text.contains("in use by another instance"),
        "{text}"
    );
    first.goes_on(0);
}

pub(crate) fn the_last_one_takes_the_shared_control_group_away(first: &First) {
    first.node.stop().expect("it ends when asked");
    first.node.down().expect("it is taken down");
    // Other tests on this machine may have instances of their own in it.
    let empty = || {
        let hierarchies = fs::read_dir("/sys/fs/cgroup").expect("control groups");
        let parents = hierarchies
            .filter_map(Result::ok)
            .map(|entry| entry.path().join("sandgate"));
        let empty = parents.filter(|parent| {
            let mut children = fs::read_dir(parent).into_iter().flatten().filter_map(Result::ok);
            parent.is_dir() && !children.any(|child| child.path().is_dir())
        });
        empty.collect::<Vec<_>>()
    };
    if wait::within(SETTLED, || empty().is_empty().then_some(())).is_none() {
        panic!("empty control groups stay: {:?}", empty());
    }
}
