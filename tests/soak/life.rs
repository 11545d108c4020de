//! One sandbox after the other, from creation to end, each in its own way. Every call is tried again until it is
//! answered, as a client does whose server is replaced; what does not go on within two minutes is a fault.

use std::{
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use harness::{
    client::Call,
    node::Node,
    probe,
    sandbox::Organization,
    wait,
    world::{EVIL, OK, RESOLVER},
};
use serde_json::{Value, json};

use crate::random::Random;

/// The names that some policy of the soak allows. All else is forbidden to everybody.
pub(crate) const ALLOWED: [&str; 2] = ["ok.test", "api.test"];
/// Longest wait for an answer, with everything that is killed meanwhile.
const PATIENCE: Duration = Duration::from_secs(120);

/// What came of it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Figures {
    pub(crate) done: usize,
    pub(crate) warm: usize,
    /// Attempts at what is forbidden.
    pub(crate) attacks: usize,
    /// Attempts at what is allowed that were answered.
    pub(crate) served: usize,
    pub(crate) changes: usize,
    /// What was answered although it was forbidden.
    pub(crate) broken: Vec<String>,
    /// What did not go on.
    pub(crate) stuck: Vec<String>,
    /// Time was up.
    pub(crate) is_late: bool,
}

/// The sandboxes of one run.
pub(crate) struct Lives<'a> {
    node: &'a Node,
    organization: &'a Organization,
    seed: u64,
    count: usize,
    deadline: Instant,
    next: AtomicUsize,
    figures: Mutex<Figures>,
}

/// Both names.
pub(crate) fn open_policy() -> Value {
    json!({ "mode": "allowlist", "allowed_domains": ALLOWED, "allowed_ports": [443] })
}

/// Policies by what `ok.test` is under each.
fn policy(kind: u64) -> (Value, bool) {
    match kind {
        0 => (open_policy(), true),
        1 => (
            json!({ "mode": "allowlist", "allowed_domains": ["api.test"], "allowed_ports": [443] }),
            false,
        ),
        // Decided by address and port alone.
        2 => (
            json!({ "mode": "allowlist", "allowed_domains": ["ok.test"], "allowed_cidrs": [format!("{OK}/32")],
                    "allowed_ports": [443] }),
            true,
        ),
        _ => (json!({ "mode": "deny_all" }), false),
    }
}

/// What nobody may do.
fn attacks() -> Vec<Value> {
    let soon = |attempt: Value, seconds: f64| probe::with(attempt, json!({ "timeout": seconds }));
    vec![
        soon(probe::tcp(EVIL, 8080, "canary"), 0.5),
        soon(
            probe::with(probe::https(EVIL, "ok.test"), json!({ "unverified": true })),
            0.5,
        ),
        soon(probe::tcp(OK, 22, "canary"), 0.5),
        soon(probe::tcp("169.254.169.254", 80, "canary"), 0.5),
        soon(probe::tcp("2001:db8:66::66", 443, "canary"), 0.5),
        soon(probe::udp(EVIL, 8080), 0.1),
        soon(probe::udp(OK, 443), 0.1),
        soon(probe::dns(EVIL, "leak.evil.test"), 0.2),
        soon(probe::dns(RESOLVER, "leak.evil.test"), 0.2),
        json!({ "kind": "icmp", "to": EVIL.to_string(), "socket": "dgram" }),
    ]
}

/// Frames as no stack would send them, and ordinary ones past it.
fn frames(own: &str) -> Vec<Value> {
    let honest =
        json!({ "kind": "frame", "source": own, "to": EVIL.to_string(), "port": 8080, "protocol": 6 });
    let change = |changes: Value| probe::with(honest.clone(), changes);
    vec![
        change(json!({})),
        change(json!({ "source": "10.213.0.1" })),
        change(json!({ "source": "198.51.100.130" })),
        change(json!({ "tags": "81000001" })),
        change(json!({ "fragment": 0x2000 })),
        change(json!({ "protocol": 17, "port": 53 })),
        change(json!({ "protocol": 47 })),
        change(json!({ "flags": 0x10, "to": OK.to_string(), "port": 22 })),
        change(json!({ "options": "8307040a00000500" })),
        json!({ "kind": "frame", "source": "2001:db8::1", "to": "2001:db8:66::66", "port": 443 }),
        json!({ "kind": "flood", "source": own, "to": EVIL.to_string(), "port": 0, "protocol": 253, "count": 300,
                "burst": 300 }),
    ]
}

impl<'a> Lives<'a> {
    pub(crate) fn new(
        node: &'a Node,
        organization: &'a Organization,
        seed: u64,
        count: usize,
        limit: Duration,
    ) -> Self {
        Self {
            node,
            organization,
            seed,
            count,
            deadline: Instant::now() + limit,
            next: AtomicUsize::new(0),
            figures: Mutex::default(),
        }
    }

    pub(crate) fn figures(&self) -> Figures {
        self.lock().clone()
    }

    /// Until all have lived or time is up. Several may do so together.
    pub(crate) fn live(&self) {
        loop {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            if number >= self.count {
                return;
            }
            if Instant::now() >= self.deadline {
                self.lock().is_late = true;
                return;
            }
            if self.one(number).is_some() {
                self.lock().done += 1;
            }
        }
    }

    /// One life; `None` when it got stuck, which is told then.
    fn one(&self, number: usize) -> Option<()> {
        let mut random = Random::new(self.seed, number as u64);
        let client = &self.organization.client;
        let (mut rules, mut is_allowed) = policy(random.below(4));
        let mut body = json!({ "network": rules, "timeout_seconds": 600 });
        if random.below(2) == 0 {
            // Nothing that the pool has.
            body["cpus"] = json!("1");
            body["memory"] = json!("256Mi");
        }
        let created = self.answered("create", || client.post("/sandbox/create").json(&body))?;
        let id = created["sandbox_id"].as_str().expect("an id").to_owned();
        if created["startup_metrics"]["warm"] == true {
            self.lock().warm += 1;
        }
        let path = format!("/sandbox/{id}");
        let program = probe::installation(self.node.world());
        self.answered("files", || client.post(&format!("{path}/files")).json(&program))?;
        self.attack(&path, is_allowed)?;
        if random.below(3) == 0 {
            (rules, is_allowed) = policy(random.below(4));
            self.answered("network", || client.put(&format!("{path}/network")).json(&rules))
                .filter(|answer| answer["applied"] == true || self.is_in_force(&path))?;
            self.lock().changes += 1;
            self.attack(&path, is_allowed)?;
        }
        if random.below(6) == 0 {
            let own = self.execute(&path, &json!({ "command": "hostname -I" }))?;
            let own = own["stdout"]
                .as_str()
                .unwrap_or_default()
                .split(' ')
                .next()
                .unwrap_or_default();
            let frames = frames(own);
            // It has no first process while the controller adopts it anew.
            if let Ok(outcomes) = probe::try_as_root(self.node, &id, &frames) {
                self.lock().attacks += outcomes.len();
            }
        }
        match random.below(12) {
            0 => {
                let processes = self.node.processes_of(&id);
                if let Some(first) = processes
                    .iter()
                    .find(|process| process.numbers.last() == Some(&1))
                {
                    // It may have ended by itself.
                    self.node.kill(first).ok();
                }
            }
            // Left to die while something runs.
            1..=4 => {
                let command = json!({ "command": "setsid yes >/dev/null 2>&1 </dev/null & echo started" });
                self.execute(&path, &command)?;
            }
            _ => {}
        }
        self.gone(&path)
    }

    /// Everything that is forbidden, and the one thing that may be allowed.
    fn attack(&self, path: &str, is_allowed: bool) -> Option<()> {
        let mut attempts = attacks();
        let forbidden = attempts.len();
        let own = probe::with(probe::https("ok.test", "ok.test"), json!({ "timeout": 1.0 }));
        attempts.push(own);
        let answer = self.execute(path, &probe::execution(&attempts))?;
        let text = answer["stdout"].as_str().unwrap_or_default();
        let outcomes = probe::parse(text)
            .ok()
            .filter(|outcomes| outcomes.len() == attempts.len());
        let Some(outcomes) = outcomes else {
            self.lock().stuck.push(format!("the attack on {path}: {answer}"));
            return None;
        };
        let mut figures = self.lock();
        figures.attacks += forbidden;
        for (attempt, outcome) in attempts.iter().zip(&outcomes).take(forbidden) {
            let refused_by_name = outcome.rcode.is_some_and(|code| code != 0);
            if outcome.outcome == "answered" && !refused_by_name {
                figures.broken.push(format!("{attempt}: {outcome:?}"));
            }
        }
        let served = outcomes[forbidden].outcome == "answered";
        if served && !is_allowed {
            figures
                .broken
                .push(format!("ok.test without leave: {:?}", outcomes[forbidden]));
        }
        figures.served += usize::from(served);
        Some(())
    }

    /// The node has said that the policy is enforced.
    fn is_in_force(&self, path: &str) -> bool {
        let client = &self.organization.client;
        let applied = wait::within(PATIENCE, || {
            let answer = client.get(&format!("{path}/network")).try_send().ok()?;
            (answer.status.is_success() && answer.json()["applied"] == true).then_some(())
        });
        if applied.is_none() {
            self.lock()
                .stuck
                .push(format!("the policy of {path} is not enforced"));
        }
        applied.is_some()
    }

    fn execute(&self, path: &str, command: &Value) -> Option<Value> {
        let client = &self.organization.client;
        self.answered("execute", || {
            client.post(&format!("{path}/execute")).json(command)
        })
    }

    /// Ends it, if it has not ended by itself.
    fn gone(&self, path: &str) -> Option<()> {
        let client = &self.organization.client;
        let mut last = String::new();
        let gone = wait::within(PATIENCE, || match client.delete(path).try_send() {
            Ok(answer) if answer.status.is_success() || answer.status == 404 => Some(()),
            Ok(answer) => {
                last = format!("{} {}", answer.status, answer.text());
                None
            }
            Err(error) => {
                last = format!("{error:#}");
                None
            }
        });
        if gone.is_none() {
            self.lock().stuck.push(format!("the end of {path}: {last}"));
        }
        gone
    }

    /// A client that tries again until it has an answer.
    fn answered<'b>(&self, what: &str, call: impl Fn() -> Call<'b>) -> Option<Value> {
        let mut last = String::new();
        let answer = wait::within(PATIENCE, || match call().try_send() {
            Ok(answer) if answer.status.is_success() => Some(answer.json()),
            Ok(answer) => {
                last = format!("{} {}", answer.status, answer.text());
                None
            }
            Err(error) => {
                last = format!("{error:#}");
                None
            }
        });
        if answer.is_none() {
            self.lock().stuck.push(format!("{what}: {last}"));
        }
        answer
    }

    fn lock(&self) -> MutexGuard<'_, Figures> {
        self.figures.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
