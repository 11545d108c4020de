//! Programs that are ended and upgraded under load: enforcement has no gap, nothing committed is lost, no sandbox
//! notices, and whoever tries again succeeds.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::MetadataExt as _,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;
use harness::{
    bpf::{self, Objects},
    client::Call,
    node::{Node, Process},
    probe::{self, Probe},
    sandbox::{Organization, Sandbox},
    suite::Fixture,
    tunnel::Tunnel,
    wait,
    world::{EVIL, OK, World},
};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::{
    machine::fixture_policy,
    outages::{RECOVERY, assert_only_allowed_traffic, wait_until_served},
};

/// The programs of `netd-ebpf`.
const PROGRAMS: usize = 3;
/// How a program comes to its end: by which signal, and whether another file takes its place before.
const ENDS: [(Signal, bool); 4] = [
    (Signal::SIGTERM, false),
    (Signal::SIGKILL, false),
    (Signal::SIGTERM, true),
    (Signal::SIGKILL, true),
];
/// `CAP_NET_ADMIN`, `CAP_SYS_ADMIN`, `CAP_BPF` (linux/capability.h).
const NETD_MAY: u64 = 1 << 12 | 1 << 21 | 1 << 39;
/// Sandboxes that hammer.
const ATTACKERS: usize = 3;

/// A node with program files of its own.
pub(crate) struct Replaceable {
    organization: Organization,
    node: Node,
    world: Arc<World>,
}

impl Fixture for Replaceable {
    fn start() -> Result<Self> {
        let world = World::fixture().build()?;
        let node = Node::start_upgradable(&world, &[])?;
        let organization = node.register("restart");
        Ok(Self {
            organization,
            node,
            world,
        })
    }

    fn report(&self) -> String {
        self.node.report()
    }
}

impl Replaceable {
    /// Ends a program, after putting a new file in its place where asked, and waits for the next one.
    #[track_caller]
    fn replace(&self, program: &str, find: fn(&Node) -> Option<Process>, (signal, upgrade): (Signal, bool)) {
        if upgrade {
            self.node.upgrade(program).expect("the new file is written");
        }
        self.node.replace_by(find, signal);
        self.assert_runs_its_file(find);
    }

    /// The program that runs is the file that lies there now.
    #[track_caller]
    fn assert_runs_its_file(&self, find: fn(&Node) -> Option<Process>) {
        wait::until("it has become the program", RECOVERY, || {
            let process = find(&self.node)?;
            let runs = fs::metadata(format!("/proc/{}/exe", process.pid)).ok()?;
            let file = fs::metadata(&process.command[0]).ok()?;
            (runs.ino() == file.ino() && runs.dev() == file.dev()).then_some(())
        });
    }

    fn kernel_objects(&self) -> Objects {
        let root = self.world.node().task().join("root");
        let run_dir = self.node.run_dir();
        let bpffs = root
            .join(run_dir.strip_prefix("/").expect("absolute"))
            .join("bpf");
        bpf::objects(&bpffs).expect("the kernel tells")
    }

    /// The same once it is as it must become.
    #[track_caller]
    fn objects_when(&self, what: &str, is_so: impl Fn(&Objects) -> bool) -> Objects {
        let found = wait::within(RECOVERY, || Some(self.kernel_objects()).filter(&is_so));
        found.unwrap_or_else(|| panic!("not {what}: {:#?}", self.kernel_objects()))
    }

    #[track_caller]
    fn count(&self, sandbox: &Sandbox, file: &str) -> u64 {
        let lines = self.retried(|| {
            let line = format!("wc -l < {file}");
            sandbox
                .client()
                .post(&sandbox.path("/execute"))
                .json(&json!({ "command": line }))
        });
        let text = lines["stdout"].as_str().unwrap_or_default().trim().to_owned();
        text.parse().unwrap_or_else(|_| panic!("no number in {lines}"))
    }

    /// A client that tries again until it has an answer.
    #[track_caller]
    fn retried<'a>(&self, call: impl Fn() -> Call<'a>) -> Value {
        let mut last = String::new();
        let answer = wait::within(RECOVERY, || match call().try_send() {
            Ok(answer) if answer.status.is_success() => Some(answer.ok()),
            Ok(answer) => {
                last = format!("{} {}", answer.status, answer.text());
                None
            }
            Err(error) => {
                last = format!("{error:#}");
                None
            }
        });
        answer.unwrap_or_else(|| panic!("no success within {RECOVERY:?}, last {last}"))
    }
}

pub(crate) fn netd_keeps_only_the_rights_it_needs(machine: &Replaceable) {
    machine.node.wait_ready();
    for _ in 0..2 {
        let netd = machine.node.netd().expect("it runs");
        let mut threads = 0;
        for entry in fs::read_dir(format!("/proc/{}/task", netd.pid)).expect("it runs") {
            let Ok(status) = fs::read_to_string(entry.expect("a thread").path().join("status")) else {
                continue;
            };
            let field = |name: &str| {
                let line = status.lines().find_map(|line| line.strip_prefix(name));
                let value = line.unwrap_or_else(|| panic!("no {name} in {status}")).trim();
                u64::from_str_radix(value, 16).expect("hexadecimal")
            };
            for set in ["CapEff:", "CapPrm:", "CapBnd:"] {
                assert_eq!(field(set), NETD_MAY, "{set} of {status}");
            }
            for set in ["CapInh:", "CapAmb:"] {
                assert_eq!(field(set), 0, "{set} of {status}");
            }
            assert_eq!(field("NoNewPrivs:"), 1, "{status}");
            threads += 1;
        }
        assert!(threads > 1, "the threads were looked at");
        // The next one, which finds everything in place, has no more.
        machine.replace("netd", Node::netd, (Signal::SIGKILL, false));
        machine.node.wait_ready();
    }
}

pub(crate) fn netd_is_replaced_under_load_without_a_gap(machine: &Replaceable) {
    machine.node.wait_ready();
    // Two at each sandbox's interface, and one at the uplink's; those of a netd that was killed go in the kernel's own time.
    let before = machine.objects_when("one of each program", |objects| {
        objects.programs.len() == PROGRAMS
    });
    let sandboxes: Vec<Sandbox> = (0..ATTACKERS)
        .map(|_| {
            machine
                .organization
                .sandbox(&json!({ "network": fixture_policy() }))
        })
        .collect();
    let probe = Probe::install(&sandboxes[0], &machine.world);
    wait_until_served(&probe);
    let mark = machine.world.capture().mark();
    let attempts = [
        probe::https(OK, "ok.test"),
        probe::with(probe::https(OK, "evil.test"), json!({ "unverified": true })),
        probe::with(probe::https(EVIL, "ok.test"), json!({ "unverified": true })),
        probe::tcp(EVIL, 8080, "canary"),
        probe::tcp(OK, 22, "canary"),
        probe::tcp("169.254.169.254", 80, "canary"),
        probe::with(probe::udp(EVIL, 8080), json!({ "timeout": 0.05 })),
        probe::with(probe::dns(EVIL, "leak.evil.test"), json!({ "timeout": 0.2 })),
    ];
    for sandbox in &sandboxes {
        let probe = Probe::install(sandbox, &machine.world);
        wait_until_served(&probe);
        sandbox.background(&Probe::loop_line(&attempts, 0), |sandbox| {
            sandbox.sh("grep -q answered /workspace/background.log").exit_code == 0
        });
    }
    let present = machine.objects_when("the links of the sandboxes and the uplink", |objects| {
        objects.links.len() == 2 * ATTACKERS + 1
    });
    for end in ENDS {
        hold_a_flow(&sandboxes[0]);
        let counted: Vec<u64> = sandboxes.iter().map(attempts_of).collect();
        machine.replace("netd", Node::netd, end);
        wait::until("the spliced flow has ended", RECOVERY, || {
            (sandboxes[0].sh("cat /workspace/held").stdout == "ended").then_some(())
        });
        wait_until_served(&probe);
        machine.node.wait_ready();
        for (sandbox, before) in sandboxes.iter().zip(counted) {
            wait::until("the attacker is awake", RECOVERY, || {
                (attempts_of(sandbox) > before).then_some(())
            });
        }
        // Adopted, not made anew: the same pins, maps and links, and one of each program.
        let after = machine.objects_when("one of each program", |objects| {
            objects.programs.len() == PROGRAMS
        });
        assert_eq!(after.pins, present.pins, "{end:?}");
        assert_eq!(after.maps, present.maps, "{end:?}");
        assert_eq!(links(&after), links(&present), "{end:?}");
        assert_ne!(
            after.programs, present.programs,
            "the old programs are still there"
        );
        assert_only_allowed_traffic(&machine.world, mark);
    }
    for sandbox in &sandboxes {
        sandbox.stop();
    }
    assert_only_allowed_traffic(&machine.world, mark);
    wait::until("the kernel holds no more than before", RECOVERY, || {
        let after = machine.kernel_objects();
        let same = after.pins == before.pins && after.maps == before.maps && links(&after) == links(&before);
        same.then_some(())
    });
}

pub(crate) fn connections_that_a_killed_netd_opened_go_on_and_are_forgotten_when_they_end(
    machine: &Replaceable,
) {
    machine.node.wait_ready();
    let sandbox = machine.organization.sandbox(&json!({}));
    let mut stream = sandbox
        .client()
        .post(&sandbox.path("/execute"))
        .json(&json!({ "command": "while [ ! -e enough ]; do echo more; sleep 0.1; done; echo last", "stream": true }))
        .events()
        .expect("a stream");
    stream.next(RECOVERY).expect("output");
    for _ in 0..3 {
        sandbox.sh_ok("true");
    }
    // Too early for it to have noticed that these have ended.
    machine.replace("netd", Node::netd, (Signal::SIGKILL, false));
    assert!(
        machine.kernel_objects().keys_of("INBOUND") > 0,
        "nothing to forget"
    );
    wait::until("commands run again", RECOVERY, || {
        let touch = json!({ "command": "touch enough" });
        let call = sandbox.client().post(&sandbox.path("/execute")).json(&touch);
        call.try_send().ok().filter(|answer| answer.status.is_success())
    });
    let rest = stream.rest(RECOVERY);
    assert!(
        rest.iter().any(|event| event["data"] == "last\n")
            && rest.last().is_some_and(|last| last["type"] == "done"),
        "the stream did not go on: {rest:?}"
    );
    drop(stream);
    wait::until("the admissions end while the sandbox lives", RECOVERY, || {
        (machine.kernel_objects().keys_of("INBOUND") == 0).then_some(())
    });
    assert_eq!(sandbox.sh_ok("echo fine"), "fine");
    sandbox.stop();
}

/// Links without the programs, which a new netd replaces in them.
fn links(objects: &Objects) -> BTreeSet<String> {
    let without = |line: &String| {
        let (head, tail) = line.split_once(" program ").expect("a link's line");
        format!("{head} {}", tail.split_once(' ').expect("an interface").1)
    };
    objects.links.iter().map(without).collect()
}

#[track_caller]
fn attempts_of(sandbox: &Sandbox) -> u64 {
    let lines = sandbox.sh_ok("wc -l < /workspace/background.log");
    lines.parse().expect("a number")
}

/// A spliced connection; `/workspace/held` tells what became of it.
#[track_caller]
fn hold_a_flow(sandbox: &Sandbox) {
    let program = format!(
        "import socket, ssl
context = ssl.create_default_context(cafile='{}')
stream = context.wrap_socket(socket.create_connection(('ok.test', 443)), server_hostname='ok.test')
open('/workspace/held', 'w').write('open')
try:
    stream.recv(1)
except OSError:
    pass
open('/workspace/held', 'w').write('ended')
",
        probe::CA
    );
    sandbox.write("/workspace/hold.py", program);
    sandbox.sh_ok("rm -f held; setsid python3 hold.py >/workspace/hold.log 2>&1 </dev/null & echo started");
    wait::until("a flow is open", RECOVERY, || {
        (sandbox.sh("cat /workspace/held").stdout == "open").then_some(())
    });
}

/// A request by a tunnel that was not answered.
struct Lost {
    connected: Instant,
    over: Instant,
    why: String,
}

pub(crate) fn tunnel_proxy_is_replaced_under_load_and_loses_no_queued_connection(machine: &Replaceable) {
    machine.node.wait_ready();
    let sandbox = machine.organization.sandbox(&json!({}));
    sandbox.write("/workspace/page", "the page");
    sandbox.background("python3 -m http.server 8000", |sandbox| {
        sandbox.sh("curl -sf http://127.0.0.1:8000/page").exit_code == 0
    });
    let tunnel = Tunnel::open(&machine.node, &sandbox, 8000);
    let answered = |answer: &Result<String>| answer.as_ref().is_ok_and(|text| text.ends_with("the page"));
    wait::until("the tunnel works", RECOVERY, || {
        answered(&tunnel.get("/page")).then_some(())
    });
    let (stop, served) = (AtomicBool::new(false), AtomicU64::new(0));
    let lost: Mutex<Vec<Lost>> = Mutex::default();
    let mut ends: Vec<(Instant, Instant)> = Vec::new();
    thread::scope(|scope| {
        let ended = Ends(&stop);
        for _ in 0..4 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    // Its port is listened on all the time.
                    let stream = tunnel.connect().expect("the tunnel's port is open");
                    let connected = Instant::now();
                    let answer = tunnel.ask(stream, "/page");
                    if answered(&answer) {
                        served.fetch_add(1, Ordering::Relaxed);
                        continue;
                    }
                    let (over, why) = (Instant::now(), format!("{answer:?}"));
                    let mut lost = lost.lock().unwrap_or_else(PoisonError::into_inner);
                    lost.push(Lost { connected, over, why });
                }
            });
        }
        for (signal, upgrade) in ENDS {
            let before = served.load(Ordering::Relaxed);
            wait::until("the load runs", RECOVERY, || {
                (served.load(Ordering::Relaxed) > before + 20).then_some(())
            });
            if upgrade {
                machine
                    .node
                    .upgrade("tunnel-proxy")
                    .expect("the new file is written");
            }
            let old = machine.node.tunnel_proxy().expect("it runs");
            let signalled = Instant::now();
            machine.node.signal(&old, signal).expect("it runs");
            wait::until("it has ended", RECOVERY, || {
                let now = machine.node.tunnel_proxy();
                now.is_none_or(|now| now.pid != old.pid).then_some(())
            });
            ends.push((signalled, Instant::now()));
            // Nobody serves these yet, or the next one does already: all are answered.
            let queued: Vec<_> = (0..20)
                .map(|_| tunnel.connect().expect("the tunnel's port is open"))
                .collect();
            for stream in queued {
                let answer = tunnel.ask(stream, "/page");
                assert!(answered(&answer), "a queued connection was lost: {answer:?}");
            }
            machine.assert_runs_its_file(Node::tunnel_proxy);
        }
        drop(ended);
    });
    // What was cut had been taken by the one that ended.
    for lost in unwrapped_ref(&lost).iter() {
        let explained = ends
            .iter()
            .any(|(signalled, gone)| lost.connected <= *gone && lost.over >= *signalled);
        assert!(
            explained,
            "lost without a reason, {:?} after the connect: {}",
            lost.over - lost.connected,
            lost.why
        );
    }
    sandbox.stop();
}

fn unwrapped_ref<T>(value: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    value.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What clients did while the controller was replaced, and what they were told.
#[derive(Default)]
struct Load {
    stop: AtomicBool,
    /// Sandboxes that were answered as running.
    created: Mutex<BTreeMap<String, String>>,
    ended: Mutex<BTreeSet<String>>,
    /// Files that were answered as written.
    written: AtomicU64,
    commands: AtomicU64,
}

pub(crate) fn the_controller_is_replaced_under_load_and_loses_nothing(machine: &Replaceable) {
    machine.node.wait_ready();
    let before = machine.node.traces();
    let steady = machine.organization.sandbox(&json!({}));
    // A command inside, which nobody's connection carries.
    steady.background(
        "while :; do echo tick >> /workspace/ticks; sleep 0.02; done",
        |sandbox| sandbox.sh("test -s /workspace/ticks").exit_code == 0,
    );
    let processes = inside(&machine.node, &steady);
    let load = Load::default();
    thread::scope(|scope| {
        let ended = Ends(&load.stop);
        scope.spawn(|| create_and_stop(machine, &load));
        scope.spawn(|| create_and_stop(machine, &load));
        scope.spawn(|| write_files(machine, &steady, &load));
        scope.spawn(|| run_commands(machine, &steady, &load));
        for end in ENDS {
            // Everybody is busy.
            let busy = (load.written.load(Ordering::Relaxed), created(&load));
            wait::until("the load runs", RECOVERY, || {
                (load.written.load(Ordering::Relaxed) > busy.0 + 5 && created(&load) > busy.1).then_some(())
            });
            let ticks = machine.count(&steady, "/workspace/ticks");
            machine.replace("controller", Node::controller, end);
            let began = Instant::now();
            wait::until("the command inside goes on", RECOVERY, || {
                (machine.count(&steady, "/workspace/ticks") > ticks).then_some(())
            });
            assert_eq!(
                inside(&machine.node, &steady),
                processes,
                "{end:?} interrupted what runs inside, {:?} after it",
                began.elapsed()
            );
        }
        drop(ended);
    });
    machine.node.wait_ready();
    // Committed is what was answered.
    for number in 0..load.written.load(Ordering::Relaxed) {
        let content = steady.read(&format!("/workspace/files/{number}"));
        assert_eq!(content, format!("content of {number}").as_bytes());
    }
    assert!(load.commands.load(Ordering::Relaxed) > 0);
    let (answered, ended) = (unwrapped(&load.created), unwrapped(&load.ended));
    let running: BTreeSet<String> = machine.organization.running().into_iter().collect();
    for id in answered.keys() {
        assert_eq!(
            running.contains(id),
            !ended.contains(id),
            "{id} was forgotten, or came back: {running:?}"
        );
    }
    // Creates that were cut off may have been committed or not: what is listed runs.
    for id in &running {
        let path = format!("/sandbox/{id}");
        let client = &machine.organization.client;
        let run = || {
            client
                .post(&format!("{path}/execute"))
                .json(&json!({ "command": "echo fine" }))
        };
        assert_eq!(machine.retried(run)["stdout"], "fine\n");
        machine.retried(|| client.post(&format!("{path}/stop")));
    }
    // And what is not listed does not.
    let left = || {
        let mut left = machine.node.traces();
        left.retain(|trace| !before.contains(trace));
        left
    };
    if wait::within(RECOVERY, || left().is_empty().then_some(())).is_none() {
        panic!("orphans: {:#?}", left());
    }
}

/// Ends the load also when the test fails in the middle: its threads would be waited for.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn unwrapped<T: Clone>(value: &Mutex<T>) -> T {
    value.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

fn created(load: &Load) -> usize {
    unwrapped(&load.created).len()
}

/// Numbers of the processes in a sandbox that do not end: its first one and the loop's shell.
fn inside(node: &Node, sandbox: &Sandbox) -> BTreeSet<u32> {
    let processes = node.processes_of(&sandbox.id).into_iter();
    let found: BTreeSet<u32> = processes
        .filter(|process| {
            process.numbers.last() == Some(&1) || process.command.iter().any(|word| word.contains("while :"))
        })
        .map(|process| process.pid)
        .collect();
    assert!(found.len() >= 2, "the loop does not run");
    found
}

fn create_and_stop(machine: &Replaceable, load: &Load) {
    let client = &machine.organization.client;
    let mut number = 0;
    while !load.stop.load(Ordering::Relaxed) {
        number += 1;
        let answer = machine.retried(|| {
            client
                .post("/sandbox/create")
                .json(&json!({ "disk": "64Mi", "timeout_seconds": 600 }))
        });
        let id = answer["sandbox_id"].as_str().expect("an id").to_owned();
        let mut created = load.created.lock().unwrap_or_else(PoisonError::into_inner);
        created.insert(id.clone(), answer["status"].to_string());
        drop(created);
        machine.retried(|| {
            client
                .post(&format!("/sandbox/{id}/execute"))
                .json(&json!({ "command": "true" }))
        });
        // A few stay.
        if number % 4 == 1 && created_and_running(load) < 6 {
            continue;
        }
        // Once asked to end it does, whether the answer arrives or not.
        let mut ended = load.ended.lock().unwrap_or_else(PoisonError::into_inner);
        ended.insert(id.clone());
        drop(ended);
        machine.retried(|| client.delete(&format!("/sandbox/{id}")));
    }
}

fn created_and_running(load: &Load) -> usize {
    created(load) - unwrapped(&load.ended).len()
}

fn write_files(machine: &Replaceable, sandbox: &Sandbox, load: &Load) {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    while !load.stop.load(Ordering::Relaxed) {
        let number = load.written.load(Ordering::Relaxed);
        let body = json!({ "files": [{
            "path": format!("/workspace/files/{number}"), "content": STANDARD.encode(format!("content of {number}")),
        }] });
        machine.retried(|| sandbox.client().post(&sandbox.path("/files")).json(&body));
        load.written.fetch_add(1, Ordering::Relaxed);
        thread::sleep(Duration::from_millis(20));
    }
}

fn run_commands(machine: &Replaceable, sandbox: &Sandbox, load: &Load) {
    while !load.stop.load(Ordering::Relaxed) {
        let body = json!({ "command": "sleep 0.05; echo done" });
        let answer = machine.retried(|| sandbox.client().post(&sandbox.path("/execute")).json(&body));
        assert_eq!(answer["stdout"], "done\n", "{answer}");
        load.commands.fetch_add(1, Ordering::Relaxed);
    }
}
