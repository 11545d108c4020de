//! The warm pool: what is made before anybody asks for it is faster, and otherwise no different; and nobody has any
//! part of it before it is theirs.

use std::{collections::BTreeSet, net::IpAddr, sync::Arc, thread, time::Duration};

use anyhow::Result;
use harness::{
    capture::Mark,
    node::Node,
    probe::{self, Probe},
    sandbox::{Organization, Sandbox},
    suite::Fixture,
    wait,
    world::{EVIL, OK, RESOLVER, World},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

use crate::machine::fixture_policy;

/// Members of the pool.
const SIZE: u64 = 3;
/// Sandbox addresses of the node's range.
const ADDRESSES: usize = 14;
/// How long a pool takes to fill, on a busy machine and after somebody needed its room.
const FILLED: Duration = Duration::from_secs(180);

/// A node with a warm pool.
pub(crate) struct Pool {
    organization: Organization,
    // Stopped before its world goes.
    node: Node,
    world: Arc<World>,
}

impl Fixture for Pool {
    fn start() -> Result<Self> {
        let world = World::fixture().build()?;
        let size = SIZE.to_string();
        let settings = [
            ("WARM_POOL_ENABLED", "true"),
            ("WARM_POOL_SIZE", size.as_str()),
            // So few that they can all be used.
            ("SANDGATE_SANDBOX_CIDR", "10.213.7.0/28"),
        ];
        let node = Node::start_with(&world, &settings)?;
        let organization = node.register("acme");
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

impl Pool {
    #[track_caller]
    fn stats(&self) -> Value {
        let stats = self.organization.client.get("/pool/stats").send().ok();
        let (total, ready) = (stats["total"].as_u64(), stats["ready"].as_u64());
        assert_eq!(
            total,
            Some(ready.unwrap_or(0) + stats["creating"].as_u64().unwrap_or(0))
        );
        assert!(total <= Some(SIZE), "{stats}");
        stats
    }

    #[track_caller]
    fn wait_full(&self) {
        wait::until("the pool is full", FILLED, || {
            (self.stats()["ready"] == SIZE).then_some(())
        });
    }

    /// Every sandbox that has a first process, whoever has it.
    fn alive(&self) -> BTreeSet<String> {
        let processes = self.node.processes();
        let first = processes
            .iter()
            .filter(|process| process.numbers.last() == Some(&1));
        let ids = first.filter_map(|process| {
            let (_, rest) = process.cgroups.split_once("/sandbox-")?;
            let id: String = rest.chars().take_while(char::is_ascii_alphanumeric).collect();
            Some(format!("sandbox-{id}"))
        });
        ids.collect()
    }

    /// The members of a full pool.
    #[track_caller]
    fn members(&self) -> Vec<String> {
        self.wait_full();
        let owned: BTreeSet<String> = self.organization.running().into_iter().collect();
        let others = || -> Vec<String> { self.alive().difference(&owned).cloned().collect() };
        // Those that were stopped a moment ago are about to end.
        let members = wait::within(FILLED, || Some(others()).filter(|all| all.len() as u64 == SIZE));
        members.unwrap_or_else(|| panic!("not {SIZE}: {:?}", others()))
    }

    /// A sandbox out of a full pool.
    #[track_caller]
    fn claim(&self, body: &Value) -> Sandbox {
        self.wait_full();
        let sandbox = self.organization.sandbox(body);
        assert!(is_warm(&sandbox), "not from the pool: {}", sandbox.created);
        sandbox
    }

    #[track_caller]
    fn first_process(&self, id: &str) -> harness::node::Process {
        let processes = self.node.processes_of(id);
        let first = processes
            .into_iter()
            .find(|process| process.numbers.last() == Some(&1));
        first.unwrap_or_else(|| panic!("{id} has no first process"))
    }

    /// A member as if it were a sandbox of the organisation.
    fn as_sandbox(&self, id: &str) -> Sandbox {
        Sandbox {
            organization: self.organization.clone(),
            id: id.to_owned(),
            created: Value::Null,
        }
    }

    #[track_caller]
    fn assert_nothing_sent(&self, mark: Mark) {
        let sent = self.world.capture().begun_since(mark);
        assert!(sent.is_empty(), "this left the node: {sent:#?}");
    }
}

fn is_warm(sandbox: &Sandbox) -> bool {
    sandbox.created["startup_metrics"]["warm"] == true
}

pub(crate) fn a_claim_is_counted_and_replaced(pool: &Pool) {
    let before = pool.members();
    let counted = pool.stats();
    let sandbox = pool.organization.sandbox(&json!({}));
    let metrics = &sandbox.created["startup_metrics"];
    assert!(is_warm(&sandbox), "{metrics}");
    assert!(
        before.contains(&sandbox.id),
        "{} is none of {before:?}",
        sandbox.id
    );
    for made_before in ["prepare_ms", "launch_ms"] {
        assert_eq!(metrics["breakdown"][made_before], 0, "{metrics}");
    }
    let took = |name: &str| metrics[name].as_u64().expect("a number");
    assert!(took("total_ms") >= took("pod_creation_ms"), "{metrics}");
    assert_eq!(sandbox.sh_ok("hostname"), sandbox.id);
    // Its life begins with the claim.
    let status = sandbox.client().get(&sandbox.path("/status")).send().ok();
    assert!(status["lifetime_used_seconds"].as_u64() < Some(30), "{status}");
    let other = pool.organization.sandbox(&json!({ "cpus": "1" }));
    assert!(!is_warm(&other), "{}", other.created);
    let stats = pool.stats();
    assert_eq!(
        stats["hits"].as_u64(),
        counted["hits"].as_u64().map(|hits| hits + 1)
    );
    assert_eq!(
        stats["misses"].as_u64(),
        counted["misses"].as_u64().map(|misses| misses + 1)
    );
    let rate = stats["hit_rate"].as_f64().expect("a rate");
    assert!(rate > 0.0 && rate < 1.0, "{stats}");
    // What others do is not theirs to see.
    let stranger = pool.node.register("pool-stranger");
    let theirs = stranger.client.get("/pool/stats").send().ok();
    assert_eq!((&theirs["hits"], &theirs["misses"]), (&json!(0), &json!(0)));
    let after = pool.members();
    assert!(!after.contains(&sandbox.id));
    // The same in other words is the same, and a used one never comes back.
    let words = json!({ "cpus": "2000m", "memory": "2048Mi", "timeout_seconds": 60 });
    let again = pool.claim(&words);
    assert!(after.contains(&again.id));
    assert_eq!(again.created["cpus"], "2000m");
    for sandbox in [sandbox, other, again] {
        sandbox.stop();
        assert_gone(pool, &sandbox.id);
    }
}

#[track_caller]
fn assert_gone(pool: &Pool, id: &str) {
    let gone = wait::within(FILLED, || pool.node.traces_of(id).is_empty().then_some(()));
    assert!(gone.is_some(), "{id} left behind: {:#?}", pool.node.traces_of(id));
}

pub(crate) fn nobody_has_any_part_of_a_member(pool: &Pool) {
    let members = pool.members();
    let client = &pool.organization.client;
    for id in &members {
        let command = json!({ "command": "true" });
        let file = json!({ "files": [{ "path": "/workspace/a", "content": "" }] });
        let policy = json!({ "mode": "allow_all" });
        for (method, rest, body) in [
            ("GET", "", None),
            ("GET", "/status", None),
            ("POST", "/stop", None),
            ("DELETE", "", None),
            ("POST", "/execute", Some(&command)),
            ("POST", "/files", Some(&file)),
            ("GET", "/files?path=/etc/hostname", None),
            ("GET", "/files/list?path=/", None),
            ("GET", "/network", None),
            ("PUT", "/network", Some(&policy)),
            ("POST", "/secrets/inject", Some(&json!({ "all": true }))),
        ] {
            let call = client.call(method.parse().expect("a method"), &format!("/sandbox/{id}{rest}"));
            let call = match body {
                Some(body) => call.json(body),
                None => call,
            };
            call.send().refused(404, "SANDBOX_NOT_FOUND");
        }
        assert!(pool.organization.audit(&format!("sandbox_id={id}")).is_empty());
    }
    let listed = client.get("/sandboxes?status=all").send().text();
    assert!(members.iter().all(|id| !listed.contains(id)), "{listed}");
    assert_eq!(pool.members(), members, "all of this was nothing to them");
}

pub(crate) fn before_it_is_somebodys_nothing_gets_out(pool: &Pool) {
    let members = pool.members();
    let member = pool.as_sandbox(&members[0]);
    let mark = pool.world.capture().mark();
    // No process is there to try: one from outside is put into its network.
    let attempts = [
        probe::tcp(OK, 443, "x"),
        probe::tcp(OK, 80, "x"),
        probe::tcp(EVIL, 8080, "x"),
        probe::https(OK, "ok.test"),
        probe::dns(RESOLVER, "ok.test"),
        probe::with(probe::udp(EVIL, 8080), json!({ "timeout": 0.2 })),
        probe::tcp("169.254.169.254", 80, "x"),
    ];
    for outcome in probe::as_root(&pool.node, &member, &attempts) {
        // The resolver answers that it will not.
        let refused_by_name = outcome.rcode == Some(5);
        assert!(outcome.outcome != "answered" || refused_by_name, "{outcome:?}");
        assert!(outcome.addresses.is_empty(), "{outcome:?}");
        outcome.assert_at_once();
    }
    pool.assert_nothing_sent(mark);
    assert!(
        pool.world.dns.queries_for("ok.test").is_empty(),
        "a name was asked"
    );
    // What was tried in it then is nobody's to read later.
    let claimed = loop {
        let claimed = pool.claim(&json!({ "network": fixture_policy() }));
        if claimed.id == member.id {
            break claimed;
        }
        claimed.stop();
    };
    Probe::install(&claimed, &pool.world)
        .try_one(&probe::https("ok.test", "ok.test"))
        .assert_answered("hello from ok.test");
    claimed.audited(&json!({ "decision": "allow", "host": "ok.test" }));
    let denied = claimed.audit("decision=deny");
    assert!(denied.is_empty(), "{denied:#?}");
    claimed.stop();
}

pub(crate) fn many_at_once_never_get_the_same(pool: &Pool) {
    pool.wait_full();
    let others = pool.node.register("pool-others");
    let (start, threads) = (std::sync::Barrier::new(8), 8);
    let sandboxes: Vec<Sandbox> = thread::scope(|scope| {
        let threads: Vec<_> = (0..threads)
            .map(|index| {
                let owner = if index % 2 == 0 {
                    &pool.organization
                } else {
                    &others
                };
                let start = &start;
                scope.spawn(move || {
                    start.wait();
                    owner.sandbox(&json!({ "env": { "NUMBER": index.to_string() } }))
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("a sandbox"))
            .collect()
    });
    let ids: BTreeSet<&str> = sandboxes.iter().map(|sandbox| sandbox.id.as_str()).collect();
    assert_eq!(ids.len(), sandboxes.len(), "one was given to two");
    let warm = sandboxes.iter().filter(|sandbox| is_warm(sandbox)).count() as u64;
    assert!((1..=SIZE).contains(&warm), "{warm} of the pool");
    for (index, sandbox) in sandboxes.iter().enumerate() {
        let seen = sandbox.sh_ok("ls -A /workspace; echo $NUMBER; hostname; touch /workspace/mine");
        assert_eq!(seen, format!("{index}\n{}", sandbox.id));
        let wrong = if index % 2 == 0 {
            &others
        } else {
            &pool.organization
        };
        let foreign = wrong.client.get(&sandbox.path("")).send();
        foreign.refused(404, "SANDBOX_NOT_FOUND");
    }
    sandboxes.iter().for_each(Sandbox::stop);
}

/// Everything that a program can see of where it is. Numbers that are the sandbox's own are replaced.
const LOOK: &str = r#"
echo "== variables"; env | LC_ALL=C sort
echo "== files"; head -50 /etc/resolv.conf /etc/hosts /etc/hostname; hostname
echo "== limits"; ulimit -a; nproc; df -P /workspace /tmp /dev/shm / | awk '{print $1, $2, $6}'
echo "== process"; grep -E '^(Uid|Gid|Groups|Cap|NoNew|Seccomp|Threads|Sig)' /proc/self/status
awk '/^NStgid/ { print "process namespaces seen:", NF - 1 }' /proc/self/status
cat /proc/self/oom_score_adj; readlink /proc/self/cwd /proc/self/root; umask
echo "== mounts"; awk '{ $1 = $2 = $3 = ""; print }' /proc/self/mountinfo | sed -E 's/(peer_group|master):[0-9]+//g; s/(uid|gid)=[0-9]{7,}/\1=<its own>/g'
echo "== network"; cat /proc/net/dev | awk '{print $1}'; cat /proc/net/route; cat /proc/net/arp
echo "== trust"; printenv SSL_CERT_FILE; grep -c BEGIN "$SSL_CERT_FILE"
awk '/BEGIN/ { text = "" } { text = text $0 "\n" } END { printf "%s", text }' "$SSL_CERT_FILE" | openssl x509 -noout -subject
echo "== first process"; cat /proc/1/environ 2>&1; cat /proc/1/cmdline | tr '\0' ' '; ls -l /proc/1/fd 2>&1 | head -2
echo "== own files"; find /workspace /tmp -printf '%M %u %g %p\n' | LC_ALL=C sort; touch /workspace/x /tmp/x && rm /workspace/x /tmp/x
"#;

/// What a sandbox sees, without what names it.
#[track_caller]
fn look(sandbox: &Sandbox) -> String {
    let output = sandbox.sh(LOOK);
    let hosts = sandbox.sh_ok("cat /etc/hosts");
    let address = hosts
        .lines()
        .find_map(|line| line.strip_suffix(&sandbox.id))
        .expect("its own line")
        .trim()
        .to_owned();
    let mut text = format!("{}\n{}", output.stdout, output.stderr);
    text = text.replace(&sandbox.id, "<id>").replace(&address, "<address>");
    let placeholder = sandbox.sh_ok("printenv BOUND_TOKEN");
    assert!(placeholder.len() > 16, "{placeholder}");
    text = text.replace(&placeholder, "<placeholder>");
    // Loop devices are numbered, and the disks' names are in their mounts.
    let plain: Vec<String> = text
        .split('\n')
        .map(|line| {
            let mut words: Vec<&str> = line.split(' ').collect();
            for word in &mut words {
                if word.starts_with("/dev/loop") {
                    *word = "/dev/loop<n>";
                }
            }
            words.join(" ")
        })
        .collect();
    plain.join("\n")
}

pub(crate) fn from_inside_a_claimed_one_is_like_any_other(pool: &Pool) {
    let client = &pool.organization.client;
    let bound = json!({
        "name": "BOUND_TOKEN", "value": "tok_0123456789abcdef",
        "egress": { "hosts": ["ok.test"], "ports": [443], "inject": [{ "kind": "bearer" }] },
    });
    client.post("/secrets").json(&bound).send().ok();
    let plain = json!({ "name": "PLAIN_SETTING", "value": "a plain value", "egress": null });
    client.post("/secrets").json(&plain).send().ok();
    let body = json!({
        "env": { "OWN": "one two\nthree", "PATH": "/usr/local/bin:/usr/bin:/bin:/workspace/bin", "EMPTY": "",
                 "PLAIN_SETTING": "the creator's wins" },
        "network": fixture_policy(), "secrets": "all",
    });
    pool.wait_full();
    let start = std::sync::Barrier::new(6);
    let sandboxes: Vec<Sandbox> = thread::scope(|scope| {
        let threads: Vec<_> = (0..6)
            .map(|_| {
                scope.spawn(|| {
                    start.wait();
                    pool.organization.sandbox(&body)
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("a sandbox"))
            .collect()
    });
    let (warm, cold): (Vec<_>, Vec<_>) = sandboxes.iter().partition(|sandbox| is_warm(sandbox));
    let (warm, cold) = (
        warm.first().expect("one of the pool"),
        cold.first().expect("one made for it"),
    );
    let (seen_warm, seen_cold) = (look(warm), look(cold));
    assert!(
        seen_cold.contains("OWN=one two") && seen_cold.contains("BOUND_TOKEN=<placeholder>"),
        "{seen_cold}"
    );
    assert!(
        seen_cold.contains("PLAIN_SETTING=the creator's wins"),
        "{seen_cold}"
    );
    assert!(!seen_cold.contains("0123456789abcdef"));
    for (warm, cold) in seen_warm.lines().zip(seen_cold.lines()) {
        assert_eq!(warm, cold, "the sandboxes differ\n{seen_warm}\n---\n{seen_cold}");
    }
    assert_eq!(seen_warm, seen_cold);
    // A command's own variables win in both; its program is found by the sandbox's PATH in both.
    for sandbox in [warm, cold] {
        sandbox.write("/workspace/bin/own-tool", "#!/bin/sh\necho tool $OWN\n");
        sandbox.sh_ok("chmod +x /workspace/bin/own-tool");
        let output = sandbox.execute(&json!({ "command": ["own-tool"], "env": { "OWN": "changed" } }));
        assert_eq!(
            (output.exit_code, output.stdout.as_str()),
            (0, "tool changed\n"),
            "{output:?}"
        );
    }
    // And from outside.
    let limits = |sandbox: &Sandbox| {
        let cgroups = pool.first_process(&sandbox.id).cgroups;
        let read = |hierarchy: &str, file: &str| {
            let line = cgroups
                .lines()
                .find(|line| line.contains(&format!(":{hierarchy}:")))?;
            let path = line.rsplit(':').next()?;
            std::fs::read_to_string(format!("/sys/fs/cgroup/{hierarchy}{path}/{file}")).ok()
        };
        [
            read("memory", "memory.limit_in_bytes"),
            read("pids", "pids.max"),
            read("", "memory.max"),
            read("", "pids.max"),
        ]
    };
    assert!(limits(cold).iter().any(Option::is_some), "no limit was found");
    assert_eq!(limits(warm), limits(cold));
    sandboxes.iter().for_each(Sandbox::stop);
    for name in ["BOUND_TOKEN", "PLAIN_SETTING"] {
        client.delete(&format!("/secrets/{name}")).send().ok();
    }
}

pub(crate) fn its_owners_rules_hold_from_the_first_packet(pool: &Pool) {
    let mark = pool.world.capture().mark();
    for round in 0..4 {
        let strict = round % 2 == 0;
        let policy = if strict {
            json!({ "mode": "deny_all" })
        } else {
            fixture_policy()
        };
        let sandbox = pool.claim(&json!({ "network": policy }));
        // The first command there is: no time for rules that come late.
        let line = format!(
            "for i in 1 2 3 4 5; do curl -s -m 30 http://{EVIL}:8080/ https://{EVIL}/ http://{OK}/ ; done; echo over"
        );
        assert_eq!(sandbox.sh_ok(&line), "over");
        let outcome = Probe::install(&sandbox, &pool.world).try_one(&probe::https("ok.test", "ok.test"));
        if strict {
            outcome.assert_refused();
        } else {
            outcome.assert_answered("hello from ok.test");
        }
        sandbox.stop();
    }
    for packet in pool.world.capture().sent_since(mark) {
        let allowed = packet.destination == IpAddr::from(OK) && packet.destination_port == 443
            || packet.destination == IpAddr::from(RESOLVER) && packet.destination_port == 53;
        assert!(allowed, "this left the node: {packet:#?}");
    }
    // The organisation's tier, too, though it was there before the sandbox was anybody's.
    let closed = pool.node.register("pool-closed");
    closed.set_egress(&json!({ "mode": "deny_all" }));
    pool.wait_full();
    let mark = pool.world.capture().mark();
    let sandbox = closed.sandbox(&json!({ "network": fixture_policy() }));
    assert!(is_warm(&sandbox));
    sandbox.sh(&format!("curl -s -m 30 https://ok.test/ http://{OK}/"));
    pool.assert_nothing_sent(mark);
    sandbox.audited(&json!({ "decision": "deny", "host": "ok.test" }));
    sandbox.stop();
}

pub(crate) fn a_member_that_dies_is_replaced(pool: &Pool) {
    let members = pool.members();
    pool.node.kill(&pool.first_process(&members[1])).expect("it runs");
    assert_gone(pool, &members[1]);
    let after = pool.members();
    assert!(!after.contains(&members[1]));
    assert!(after.contains(&members[0]) && after.contains(&members[2]));
}

pub(crate) fn a_member_that_does_not_answer_is_no_reason_to_fail(pool: &Pool) {
    let members = pool.members();
    let mut stopped = Vec::new();
    for id in &members {
        let process = pool.first_process(id);
        kill(
            Pid::from_raw(i32::try_from(process.pid).expect("a pid")),
            Signal::SIGSTOP,
        )
        .expect("it runs");
        stopped.push(id.clone());
    }
    // The client waits a minute.
    let sandbox = pool.organization.sandbox(&json!({}));
    assert!(!is_warm(&sandbox), "{}", sandbox.created);
    assert_eq!(sandbox.sh_ok("echo fine"), "fine");
    // One of them was tried; nobody ever hears of it, and it is not tried again.
    let listed = pool
        .organization
        .client
        .get("/sandboxes?status=all")
        .send()
        .text();
    assert!(stopped.iter().all(|id| !listed.contains(id)), "{listed}");
    let left = wait::until("the one that was tried is gone", FILLED, || {
        let mut left = stopped.clone();
        left.retain(|id| !pool.node.traces_of(id).is_empty());
        ((left.len() as u64) < SIZE).then_some(left)
    });
    assert_eq!(left.len() as u64, SIZE - 1, "{left:?}");
    for id in left {
        pool.node.kill(&pool.first_process(&id)).expect("it runs");
        assert_gone(pool, &id);
    }
    sandbox.stop();
}

pub(crate) fn a_killed_controller_goes_on_with_its_pool(pool: &Pool) {
    let members = pool.members();
    pool.node.replace(Node::controller);
    pool.node.wait_ready();
    assert_eq!(pool.members(), members, "what is ready is adopted");
    let claimed = pool.claim(&json!({ "network": fixture_policy() }));
    assert!(members.contains(&claimed.id));
    Probe::install(&claimed, &pool.world)
        .try_one(&probe::https("ok.test", "ok.test"))
        .assert_answered("hello from ok.test");
    claimed.stop();
    // In the middle of claims and of filling up.
    for pause in [3, 8, 15, 40, 120] {
        pool.wait_full();
        thread::scope(|scope| {
            scope.spawn(|| {
                // Whether it is answered depends on who is faster.
                let create = pool.organization.client.post("/sandbox/create");
                create.json(&json!({ "env": { "A": "b" } })).try_send().ok();
            });
            thread::sleep(Duration::from_millis(pause));
            pool.node.replace(Node::controller);
        });
        pool.node.wait_ready();
    }
    for id in pool.organization.running() {
        let sandbox = pool.as_sandbox(&id);
        assert_eq!(
            sandbox.sh_ok("echo $A"),
            "b",
            "whatever is called running is whole"
        );
        sandbox.stop();
    }
    // netd, both, and an orderly end.
    pool.node.replace(Node::netd);
    pool.node.wait_ready();
    let members = pool.members();
    pool.node.stop().expect("it ends when asked");
    pool.node.start_again().expect("it starts again");
    assert_eq!(pool.members(), members);
    let settled = wait::within(FILLED, || (pool.alive().len() as u64 == SIZE).then_some(()));
    assert!(settled.is_some(), "{:?}", pool.alive());
    for id in pool.alive() {
        assert!(members.contains(&id), "{id} belongs to nobody");
    }
    let strangers = || {
        let mut strangers = pool.node.traces();
        strangers.retain(|trace| trace.contains("sandbox-") && !members.iter().any(|id| trace.contains(id)));
        strangers
    };
    if wait::within(FILLED, || strangers().is_empty().then_some(())).is_none() {
        panic!("{:#?}", strangers());
    }
}

pub(crate) fn the_pool_makes_room_for_whoever_asks(pool: &Pool) {
    pool.wait_full();
    // Other resources: none of them comes from the pool.
    let body = json!({ "memory": "256Mi", "disk": "64Mi" });
    let mut made = Vec::new();
    let refused = loop {
        let answer = pool
            .organization
            .client
            .post("/sandbox/create")
            .json(&body)
            .send();
        if !answer.status.is_success() {
            break answer;
        }
        let id = answer.ok()["sandbox_id"].as_str().expect("an id").to_owned();
        made.push(pool.as_sandbox(&id));
        assert!(made.len() <= ADDRESSES);
    };
    refused.refused(409, "CONFLICT");
    assert_eq!(made.len(), ADDRESSES, "the pool kept room for itself");
    assert_eq!(pool.stats()["total"], 0);
    wait::until("the pool's own are gone", FILLED, || {
        (pool.alive().len() == ADDRESSES).then_some(())
    });
    made.iter().for_each(Sandbox::stop);
    // The room is left to others for a while, and then it fills again.
    pool.wait_full();
}
