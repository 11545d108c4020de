//! A system that leaves nothing behind: a hundred sandboxes are made, used in every way there is and taken away, and
//! afterwards the node is as it was before.

use std::{
    collections::BTreeMap,
    net::TcpStream,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;
use harness::{
    node::Node,
    sandbox::{Organization, Sandbox},
    snapshot::{self, Memory, Snapshot},
    suite::Fixture,
    tunnel::Tunnel,
    world::{EVIL, OK, World},
};
use serde_json::{Value, json};

use crate::ipv6::BY_DEFAULT;

/// Sandboxes of a round.
const ROUND: usize = 100;
/// Of the first, which opens what is opened once: database connections, caches, the audit's queue.
const WARM_UP: usize = 24;
/// At the same time.
const AT_ONCE: usize = 8;
/// What ends takes its time: loop devices, network namespaces, the sweep of connections into sandboxes.
const SETTLED: Duration = Duration::from_secs(60);
/// Longer than the pause of any sweep (netd's is 5 s).
const QUIET: Duration = Duration::from_secs(7);
/// Readings of memory within a round.
const READINGS: usize = 4;

/// Audit records that the database has from before, and that every one of its readers has read: SQLite keeps up to
/// 2 MiB of pages for each connection (`PRAGMA cache_size`), and until that is full, what is read makes it grow.
const PAST: usize = 8000;
/// What a program may have more after the second hundred than after the first, in KiB for each sandbox. The noise of
/// the allocators was seen to be half of it; a sandbox's state in either program is several times as large.
const GROWTH: u64 = 5;
/// The program whose writer keeps the pages that it has just written, and one of whose readers reads them again: both
/// keep up to 2 MiB. With rounds of 300 sandboxes they were seen to fill: 92 KiB more in the last 225.
const KEEPS_PAGES: &str = "controller serve";

/// Tables whose rows are meant to stay when a sandbox is gone, each with the rows that one sandbox leaves at most:
/// records of what was, which the retention ends, and tombstones on the feeds for a netd or tunnel-proxy
/// that was away.
const RECORDS: [(&str, u64); 9] = [
    ("tunnel_removals", 1),
    ("sandboxes", 1),
    ("sandbox_policies", 1),
    ("sandbox_secrets", 1),
    ("feed_removals", 1),
    ("egress_audit", 20),
    ("actions", 12),
    ("events", 20),
    // An hour may end meanwhile.
    ("usage", 2),
];

/// A node of its own: other cases' sandboxes would be seen.
pub(crate) struct Quiet {
    organization: Organization,
    /// The clients' ends of tunnels' connections, which clients have not closed.
    open: Mutex<Vec<TcpStream>>,
    node: Node,
    world: Arc<World>,
}

impl Fixture for Quiet {
    fn start() -> Result<Self> {
        let world = World::fixture().build()?;
        // Also what the second family leaves.
        let node = Node::start_with(&world, &[BY_DEFAULT])?;
        let organization = node.register("quiet");
        let secret = json!({
            "name": "API_TOKEN", "value": "s3cret-0123456789",
            "egress": { "hosts": ["httpbin.org"], "ports": [443], "inject": [{ "kind": "bearer" }] },
        });
        organization.client.post("/secrets").json(&secret).send().ok();
        Ok(Self {
            organization,
            open: Mutex::default(),
            node,
            world,
        })
    }

    fn report(&self) -> String {
        self.node.report()
    }
}

fn policy() -> Value {
    json!({ "mode": "allowlist", "allowed_domains": ["ok.test", "httpbin.org"], "allowed_ports": [80, 443] })
}

/// Makes sandboxes, uses each, takes each away. Gives their ids.
fn round(quiet: &Quiet, count: usize) -> Vec<String> {
    let next = AtomicUsize::new(0);
    let ids = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= count {
                        return;
                    }
                    let id = one(quiet, number);
                    ids.lock().unwrap_or_else(PoisonError::into_inner).push(id);
                }
            });
        }
    });
    ids.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// One sandbox's life. What it does last depends on its number: some end in the middle of something.
fn one(quiet: &Quiet, number: usize) -> String {
    let has_secret = number.is_multiple_of(4);
    let secrets = if has_secret { "all" } else { "none" };
    let sandbox = quiet
        .organization
        .sandbox(&json!({ "network": policy(), "secrets": secrets, "disk": "64Mi" }));
    sandbox.write("/workspace/in", format!("number {number}"));
    let flows = sandbox.sh_ok(&format!(
        "cp in out; curl -sk https://ok.test/ | grep -c hello; curl -s http://{EVIL}/ || echo refused"
    ));
    assert_eq!(flows, "1\nrefused");
    assert_eq!(
        sandbox.read("/workspace/out"),
        format!("number {number}").as_bytes()
    );
    if has_secret {
        let answer = sandbox
            .sh_ok("curl -sS https://httpbin.org/bearer -H \"Authorization: Bearer $API_TOKEN\" -o /dev/null -w '%{http_code}'");
        assert_eq!(answer, "200");
    }
    match number % 5 {
        // A program of its own, a full pipe and a connection that nobody has closed.
        0 => {
            sandbox.sh_ok(
                "setsid sh -c 'yes > /workspace/pipe' >/dev/null 2>&1 </dev/null & mkfifo pipe; sleep 0.05",
            );
        }
        1 => {
            let hold = format!(
                "import socket, time\ns = socket.create_connection(('{OK}', 80))\ns.send(b'GET / HTTP/1.1\\r\\nHost: ok.test\\r\\n')\ntime.sleep(60)\n"
            );
            sandbox.write("/workspace/hold.py", hold);
            sandbox.sh_ok("setsid python3 hold.py >/dev/null 2>&1 </dev/null & sleep 0.3");
        }
        // A stream that is read no further.
        2 => {
            let mut stream = sandbox
                .client()
                .post(&sandbox.path("/execute"))
                .json(&json!({ "command": "while :; do echo again; sleep 0.01; done", "stream": true }))
                .events()
                .expect("a stream");
            stream.next(SETTLED).expect("an event");
        }
        // Other rules in its life.
        3 => drop(sandbox.set_network(&json!({ "mode": "deny_all" }))),
        // A tunnel, one of its connections still open.
        4 => tunnelled(quiet, &sandbox),
        _ => {}
    }
    if number.is_multiple_of(2) {
        sandbox.stop();
    } else {
        let deleted = sandbox.client().delete(&sandbox.path("")).send().ok();
        assert_eq!(deleted["success"], true);
    }
    sandbox.id
}

fn tunnelled(quiet: &Quiet, sandbox: &Sandbox) {
    sandbox.sh_ok("setsid python3 -m http.server 8000 >/dev/null 2>&1 </dev/null & echo started");
    let tunnel = Tunnel::open(&quiet.node, sandbox, 8000);
    let answer = harness::wait::within(SETTLED, || {
        tunnel
            .get("/in")
            .ok()
            .filter(|answer| answer.starts_with("HTTP/1.1 200"))
    });
    assert!(
        answer.is_some_and(|answer| answer.contains("number ")),
        "no answer by the tunnel"
    );
    let open = tunnel.connect().expect("the tunnel's port");
    quiet
        .open
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push(open);
}

pub(crate) fn two_hundred_sandboxes_leave_nothing(quiet: &Quiet) {
    let node = &quiet.node;
    let database = node.data_dir().join("sandgate.db");
    round(quiet, WARM_UP);
    fill_caches(quiet, &database);
    let before = settled(node);
    assert!(
        before.lines("BPF map entry ENDPOINTS").is_empty(),
        "the warm-up's sandboxes are not gone"
    );
    assert!(
        !before.lines("BPF map entry PLATFORM").is_empty(),
        "the judge sees map entries"
    );
    assert!(!before.lines("BPF program").is_empty(), "the judge sees programs");
    let rows_before = snapshot::rows(&database).expect("the database");
    let mut growth: BTreeMap<String, Vec<Memory>> = BTreeMap::new();
    let read = |place: &mut BTreeMap<String, Vec<Memory>>| {
        for program in node.programs() {
            let memory = Memory::of(&program).expect("it runs");
            place.entry(program.name()).or_default().push(memory);
        }
    };
    let (mut ids, mut sizes) = (Vec::new(), Vec::new());
    for number in 1..=2 {
        let began = Instant::now();
        for _ in 0..READINGS {
            ids.extend(round(quiet, ROUND / READINGS));
            read(&mut growth);
        }
        sizes.push(snapshot::size(&database).expect("the database"));
        let took = began.elapsed();
        before.assert_returns(node, SETTLED);
        note(&format!(
            "round {number}: {ROUND} sandboxes in {took:.1?}, as before after {:.1?}",
            began.elapsed()
        ));
    }
    forgotten(quiet, &ids);
    only_records_stay(&rows_before, &snapshot::rows(&database).expect("the database"));
    let written = sizes[1].saturating_sub(sizes[0]);
    note(&format!(
        "the database grew by {written} KiB in the second hundred"
    ));
    for (program, readings) in growth {
        let pages = if program == KEEPS_PAGES { 2 * written } else { 0 };
        grows_no_further(&program, &readings, pages);
    }
    assert!(quiet.world.tcp_collector((EVIL, 8080)).arrivals().is_empty());
}

/// So that what grows later is not the database's caches.
fn fill_caches(quiet: &Quiet, database: &Path) {
    snapshot::give_past(database, PAST).expect("the database takes a past");
    thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                for offset in (0..PAST).step_by(1000) {
                    let listed = quiet.organization.audit(&format!("offset={offset}"));
                    assert_eq!(listed.len(), 1000);
                }
            });
        }
    });
}

/// The moment when nothing ends any more: the same for longer than any sweep pauses.
fn settled(node: &Node) -> Snapshot {
    let (mut last, mut since) = (Snapshot::take(node).expect("a look at the node"), Instant::now());
    let mut changed = None;
    let found = harness::wait::within(2 * SETTLED, || {
        thread::sleep(Duration::from_millis(500));
        let now = Snapshot::take(node).expect("a look at the node");
        if now != last {
            changed = Some(now.since(&last));
            (last, since) = (now, Instant::now());
        }
        (since.elapsed() >= QUIET).then(|| last.clone())
    });
    found.unwrap_or_else(|| match changed {
        Some(changed) => panic!("the node does not come to rest; what changed last:\n{changed}"),
        None => panic!("the node could not be looked at in time"),
    })
}

/// No file of the instance but its database knows any of them.
fn forgotten(quiet: &Quiet, ids: &[String]) {
    let data = quiet.node.data_dir();
    let records = ["sandgate.db", "sandgate.db-wal", "sandgate.db-shm"].map(|name| data.join(name));
    let records: Vec<_> = records.iter().map(|path| path.as_path()).collect();
    let held = || {
        let mut held = snapshot::files_that_hold(data, ids, &records);
        held.extend(snapshot::files_that_hold(quiet.node.run_dir(), ids, &[]));
        held
    };
    // The last records leave the audit's spool a moment after they are stored.
    if harness::wait::within(SETTLED, || held().is_empty().then_some(())).is_none() {
        panic!("files remember sandboxes that are gone: {:#?}", held());
    }
}

fn only_records_stay(before: &BTreeMap<String, u64>, after: &BTreeMap<String, u64>) {
    let sandboxes = 2 * u64::try_from(ROUND).expect("a number");
    for (table, rows) in after {
        let grown = rows.saturating_sub(before.get(table).copied().unwrap_or(0));
        let record = RECORDS.iter().find(|(name, _)| name == table);
        let most = record.map_or(0, |(_, each)| each * sandboxes);
        note(&format!("table {table}: {grown} rows more"));
        assert!(
            grown <= most,
            "{table} grew by {grown} rows, and {most} are meant to stay"
        );
    }
    assert_eq!(
        after["sandboxes"] - before["sandboxes"],
        sandboxes,
        "every sandbox has a record"
    );
}

/// Sandboxes that are gone cost nothing beyond `pages` KiB of the database's.
fn grows_no_further(program: &str, readings: &[Memory], pages: u64) {
    let shown: Vec<String> = readings
        .iter()
        .map(|memory| format!("{}/{}", memory.anonymous, memory.proportional))
        .collect();
    note(&format!(
        "{program}: RssAnon/Pss in KiB, every {} sandboxes: {}",
        ROUND / READINGS,
        shown.join(" ")
    ));
    let (first, second) = readings.split_at(READINGS);
    let highest = |readings: &[Memory]| readings.iter().map(|memory| memory.anonymous).max().unwrap_or(0);
    let grown = highest(second).saturating_sub(highest(first));
    let most = pages + GROWTH * u64::try_from(ROUND).expect("a number");
    assert!(
        grown <= most,
        "{program} has {grown} KiB more after the second hundred than after the first; {most} would be noise"
    );
}

#[expect(clippy::print_stdout, reason = "figures of a run that is looked at")]
fn note(line: &str) {
    println!("    {line}");
}
