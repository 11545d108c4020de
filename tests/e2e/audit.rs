//! The audit under what could make it lose something, or say something else than what was recorded: a netd that is
//! killed, a controller that is away, no room, somebody who edits the database.

use std::{collections::BTreeSet, fs, sync::Arc, time::Duration};

use anyhow::Result;
use harness::{
    node::Node,
    pressure::Tight,
    probe::{self, Outcome, Probe},
    sandbox::{Organization, Sandbox},
    snapshot,
    suite::Fixture,
    wait,
    world::{OK, World},
};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::{machine::fixture_policy, siege::Held};

/// How long what must happen may take.
const SOON: Duration = Duration::from_secs(120);

/// The smallest spool there is, so that it is soon full.
const SETTINGS: [(&str, &str); 1] = [("SANDGATE_AUDIT_SPOOL", "1Mi")];

/// More flows than one sandbox has room for in that spool.
const MANY: usize = 320;

/// A node whose audit has little room.
pub(crate) struct Audited {
    organization: Organization,
    // Stopped before its world goes.
    node: Node,
    world: Arc<World>,
}

impl Fixture for Audited {
    fn start() -> Result<Self> {
        let world = World::fixture().build()?;
        let node = Node::start_with(&world, &SETTINGS)?;
        Ok(Self::on(world, node))
    }

    fn report(&self) -> String {
        self.node.report()
    }
}

impl Audited {
    fn on(world: Arc<World>, node: Node) -> Self {
        // Where programs that run as root in a sandbox's network look for it.
        fs::write(world.directory().join("ca.pem"), world.ca.pem())
            .expect("the world's directory is writable");
        let organization = node.register("audited");
        Self {
            organization,
            node,
            world,
        }
    }

    /// A sandbox that has asked for the name, and whose record of that flow is stored.
    #[track_caller]
    fn sandbox(&self, failure_mode: &str) -> Sandbox {
        self.sandbox_of(&self.organization, failure_mode)
    }

    #[track_caller]
    fn sandbox_of(&self, organization: &Organization, failure_mode: &str) -> Sandbox {
        let mut policy = fixture_policy();
        policy["failure_mode"] = json!(failure_mode);
        let sandbox = organization.sandbox(&json!({ "network": policy }));
        Probe::install(&sandbox, &self.world)
            .try_one(&probe::https("ok.test", "ok.test"))
            .assert_answered("hello from ok.test");
        sandbox.audited(&json!({ "host": "ok.test", "verdict": "allow" }));
        wait::until("the spool is empty", SOON, || {
            (self.spooled(&sandbox) == 0).then_some(())
        });
        sandbox
    }

    /// Opens so many connections, one after the other, without the controller's help. Returns how many were answered.
    #[track_caller]
    fn flows(&self, sandbox: &Sandbox, count: usize) -> usize {
        let attempts = vec![probe::https(OK, "ok.test"); count];
        let outcomes = probe::as_root(&self.node, sandbox, &attempts);
        let answered = |outcome: &&Outcome| outcome.outcome == "answered";
        outcomes.iter().filter(answered).count()
    }

    /// Records of a sandbox that the spool holds.
    fn spooled(&self, sandbox: &Sandbox) -> usize {
        let mut count = 0;
        for entry in fs::read_dir(self.node.data_dir().join("spool")).expect("a spool") {
            let lines = fs::read_to_string(entry.expect("an entry").path()).unwrap_or_default();
            let lines = lines
                .lines()
                .filter_map(|line| serde_json::from_str::<Value>(line).ok());
            count += lines
                .filter(|line| line["record"]["event"]["sandbox_id"] == sandbox.id.as_str())
                .count();
        }
        count
    }

    #[track_caller]
    fn wait_until_told(&self, sandbox: &Sandbox, allowed: usize) -> Vec<Value> {
        let events = wait::within(SOON, || {
            let events = records(sandbox);
            (attempts(&events, |event| event["verdict"] == "allow") >= allowed).then_some(events)
        });
        events.unwrap_or_else(|| {
            let told = attempts(&records(sandbox), |event| event["verdict"] == "allow");
            panic!("{told} flows of {allowed} are in the audit")
        })
    }
}

fn records(sandbox: &Sandbox) -> Vec<Value> {
    sandbox
        .audit("host=ok.test")
        .into_iter()
        .chain(gaps(sandbox))
        .collect()
}

/// Records that tell of others.
fn gaps(sandbox: &Sandbox) -> Vec<Value> {
    let mut events = sandbox.audit("decision=deny");
    events.retain(|event| {
        let detail = event["detail"].as_str();
        event["reason"] == "quota" && detail.is_some_and(|detail| detail.contains("have no record"))
    });
    events
}

/// Refusals for want of room.
fn refusals(sandbox: &Sandbox) -> usize {
    attempts(&sandbox.audit("decision=deny"), |event| {
        let detail = event["detail"].as_str();
        event["reason"] == "quota" && detail.is_some_and(|detail| detail.contains("no room for more records"))
    })
}

fn attempts(events: &[Value], fits: impl Fn(&Value) -> bool) -> usize {
    let repeated = events.iter().filter(|event| fits(event));
    let sum: u64 = repeated.filter_map(|event| event["repeated"].as_u64()).sum();
    usize::try_from(sum).expect("few")
}

#[track_caller]
fn assert_each_once(events: &[Value]) {
    let ids: BTreeSet<_> = events.iter().filter_map(|event| event["id"].as_str()).collect();
    assert_eq!(ids.len(), events.len(), "a record is stored twice");
}

pub(crate) fn a_killed_netd_loses_no_record(audited: &Audited) {
    const FLOWS: usize = 30;
    audited.node.wait_ready();
    let sandbox = audited.sandbox("fail_closed");
    let held = Held::new(&audited.node, audited.node.controller());
    assert_eq!(audited.flows(&sandbox, FLOWS), FLOWS);
    wait::until("the records are in the spool", SOON, || {
        (audited.spooled(&sandbox) == FLOWS).then_some(())
    });
    // Killed at once, twice, and nobody has taken anything yet.
    audited.node.replace(Node::netd);
    audited.node.replace(Node::netd);
    assert_eq!(audited.spooled(&sandbox), FLOWS);
    drop(held);
    audited.node.wait_ready();
    audited.wait_until_told(&sandbox, FLOWS + 1);
    wait::until("the spool is empty", SOON, || {
        (audited.spooled(&sandbox) == 0).then_some(())
    });
    // Another one finds nothing to tell again.
    audited.node.replace(Node::netd);
    audited.node.wait_ready();
    assert_eq!(audited.flows(&sandbox, 1), 1);
    let events = audited.wait_until_told(&sandbox, FLOWS + 2);
    assert_each_once(&events);
    assert_eq!(events.len(), FLOWS + 2);
    sandbox.stop();
}

pub(crate) fn what_finds_no_room_is_refused_or_told_by_a_gap(audited: &Audited) {
    audited.node.wait_ready();
    let (open, closed) = (audited.sandbox("fail_open"), audited.sandbox("fail_closed"));
    let held = Held::new(&audited.node, audited.node.controller());
    assert_eq!(audited.flows(&open, MANY), MANY, "fail_open goes on");
    // The other one's records have not taken its room.
    let answered = audited.flows(&closed, MANY);
    assert!((100..MANY).contains(&answered), "{answered} of {MANY}");
    // Not even a netd that is killed forgets what was lost, or that there is no room, also while it tries to deliver.
    audited.node.replace(Node::netd);
    assert_eq!(audited.flows(&closed, 3), 0);
    drop(held);
    audited.node.wait_ready();

    let events = audited.wait_until_told(&closed, answered + 1);
    assert_each_once(&events);
    assert_eq!(
        attempts(&events, |_any| true),
        answered + 1,
        "nothing of it is lost"
    );
    assert_eq!(gaps(&closed), [] as [Value; 0]);
    let told = || {
        let events = records(&open);
        (attempts(&events, |_any| true) > MANY).then_some(events)
    };
    let events = wait::within(SOON, told).unwrap_or_else(|| panic!("{:?}", gaps(&open)));
    assert_each_once(&events);
    assert_eq!(
        attempts(&events, |_any| true),
        MANY + 1,
        "every flow has a record or is counted"
    );
    assert!(!gaps(&open).is_empty());
    // There is room again.
    assert_eq!(audited.flows(&closed, 3), 3);
    open.stop();
    closed.stop();
}

pub(crate) fn a_full_disk_loses_no_record(_shared: &Audited) {
    const FLOWS: usize = 150;
    let world = World::fixture().build().expect("a world");
    let node = Node::new(&world, world.place(), "", &SETTINGS).expect("settings");
    let tight = Tight::mount(&world, &node.data_dir().join("spool"), 512).expect("a small file system");
    node.start_again().expect("it starts");
    let audited = Audited::on(world, node);
    let sandbox = audited.sandbox("fail_closed");
    let held = Held::new(&audited.node, audited.node.controller());
    tight.fill().expect("filled");
    // The room that was taken in advance.
    let mut answered = audited.flows(&sandbox, FLOWS);
    assert!((10..FLOWS).contains(&answered), "{answered} of {FLOWS}");
    let mut refused = FLOWS - answered;
    tight.free().expect("freed");
    wait::until("flows are admitted again", SOON, || {
        let admitted = audited.flows(&sandbox, 1);
        answered += admitted;
        refused += 1 - admitted;
        (admitted == 1).then_some(())
    });
    drop(held);
    audited.node.wait_ready();
    let events = audited.wait_until_told(&sandbox, answered + 1);
    assert_each_once(&events);
    assert_eq!(attempts(&events, |_any| true), answered + 1);
    assert_eq!(gaps(&sandbox), [] as [Value; 0]);
    wait::until("the refusals are told", SOON, || {
        (refusals(&sandbox) >= refused).then_some(())
    });
    assert_eq!(refusals(&sandbox), refused);
    sandbox.stop();
    audited.node.stop().expect("it ends when asked");
    drop(tight);
}

/// What `GET /egress/audit/verify` answers.
#[track_caller]
fn verify(organization: &Organization) -> Value {
    organization.client.get("/egress/audit/verify").send().ok()
}

/// What is wrong first: what happened, and to which record.
#[track_caller]
fn problem(organization: &Organization) -> (String, Option<String>) {
    let found = verify(organization);
    assert_eq!(found["verified"], false, "{found}");
    let text = |field: &str| found["problem"][field].as_str().map(str::to_owned);
    (
        text("kind").unwrap_or_else(|| panic!("{found}")),
        text("event_id"),
    )
}

pub(crate) fn whoever_edits_the_database_is_found_out(audited: &Audited) {
    const FLOWS: usize = 6;
    audited.node.wait_ready();
    let organization = audited.node.register("edited");
    let sandbox = audited.sandbox_of(&organization, "fail_closed");
    assert_eq!(audited.flows(&sandbox, FLOWS), FLOWS);
    let mut events = audited.wait_until_told(&sandbox, FLOWS + 1);
    // Stored later is listed first.
    events.reverse();
    let id = |index: usize| events[index]["id"].as_str().expect("an id").to_owned();
    let database = audited.node.data_dir().join("sandgate.db");
    let tamper = |statement: &str| {
        let rows = snapshot::tamper(&database, statement).expect("the database");
        assert_eq!(rows, 1, "{statement}");
    };
    let command = || {
        let (status, said) = audited
            .node
            .run("controller", &["verify-audit"])
            .expect("it runs");
        let own = said
            .lines()
            .find(|line| line.starts_with(&organization.id))
            .map(str::to_owned);
        (status.code(), own.unwrap_or_else(|| panic!("{said}")))
    };
    let verified = || {
        let found = verify(&organization);
        assert_eq!(found["verified"], true, "{found}");
        found
    };
    let records = verified()["records"].as_u64();
    assert!(
        records.is_some_and(|records| records > FLOWS as u64),
        "{records:?}"
    );
    assert!(command().1.contains("verified"), "{:?}", command());

    // An edit, and back.
    let replaced = |from: &str, to: &str| {
        let edited = id(2);
        tamper(&format!(
            "UPDATE egress_audit SET document = replace(document, '{from}', '{to}') WHERE id = '{edited}'"
        ));
    };
    replaced("203.0.113.10", "203.0.113.11");
    assert_eq!(problem(&organization), ("edited".to_owned(), Some(id(2))));
    let (status, line) = command();
    assert_eq!(status, Some(1), "{line}");
    assert!(line.contains("CHANGED") && line.contains(&id(2)), "{line}");
    replaced("203.0.113.11", "203.0.113.10");
    verified();

    // Two records in each other's place, and back.
    let swap = || {
        let (one, other) = (id(1), id(4));
        for (from, to) in [
            (&one, "a"),
            (&other, one.as_str()),
            (&"a".to_owned(), other.as_str()),
        ] {
            tamper(&format!(
                "UPDATE egress_audit SET id = '{to}' WHERE id = '{from}'"
            ));
        }
    };
    swap();
    assert_eq!(problem(&organization).0, "edited");
    swap();
    verified();

    // The end is signed when the controller ends, and what is cut from then on contradicts it, with everything in the
    // database made to fit.
    audited.node.replace_by(Node::controller, Signal::SIGTERM);
    audited.node.wait_ready();
    assert!(verified()["signed_at"].is_string());
    let newest = organization.audit("");
    let (last, before) = (&newest[0]["id"], &newest[1]["id"]);
    let (last, before) = (last.as_str().expect("an id"), before.as_str().expect("an id"));
    tamper(&format!("DELETE FROM egress_audit WHERE id = '{last}'"));
    assert_eq!(problem(&organization).0, "cut");
    tamper(&format!(
        "UPDATE egress_audit_chains SET position = position - 1, \
         mac = (SELECT mac FROM egress_audit WHERE id = '{before}') WHERE org_id = '{}'",
        organization.id
    ));
    assert_eq!(problem(&organization).0, "cut");
    // A hole is named by what comes after it, and new records do not hide it.
    tamper(&format!("DELETE FROM egress_audit WHERE id = '{}'", id(3)));
    assert_eq!(audited.flows(&sandbox, 3), 3);
    audited.wait_until_told(&sandbox, FLOWS + 2);
    let (kind, event) = problem(&organization);
    assert_eq!((kind.as_str(), event), ("removed", Some(id(4))));
    sandbox.stop();
}

pub(crate) fn a_stream_goes_on_where_it_was_left(audited: &Audited) {
    audited.node.wait_ready();
    let organization = audited.node.register("streamed");
    let sandbox = audited.sandbox_of(&organization, "fail_closed");
    let of = format!("/egress/audit/stream?sandbox_id={}&host=ok.test", sandbox.id);
    let mut live = sandbox.client().get(&of).events().expect("a stream");
    assert_eq!(audited.flows(&sandbox, 1), 1);
    let event = live.next(SOON).expect("an event");
    assert_eq!(
        (&event["host"], &event["decision"]),
        (&json!("ok.test"), &json!("allow"))
    );
    let newest = organization.client.get("/egress/audit?limit=1").send().ok();
    let cursor = newest["next_cursor"].as_str().expect("a cursor").to_owned();
    // The stream ends with the controller that sent it; what happens meanwhile is not missed.
    audited.node.replace(Node::controller);
    assert_eq!(audited.flows(&sandbox, 4), 4);
    audited.node.wait_ready();
    let resumed = sandbox
        .client()
        .get(&of)
        .header("last-event-id", &cursor)
        .events();
    let mut resumed = resumed.expect("a stream");
    let mut ids = BTreeSet::new();
    for _ in 0..4 {
        let event = resumed.next(SOON).expect("an event");
        assert_eq!(event["sandbox_id"], sandbox.id.as_str());
        ids.insert(event["id"].as_str().expect("an id").to_owned());
    }
    assert_eq!(ids.len(), 4);
    assert!(!ids.contains(event["id"].as_str().expect("an id")));
    sandbox.stop();
}
