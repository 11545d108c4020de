//! Policies that several clients change: whoever read an old one is told so, and of changes at once none is lost.

use std::{collections::BTreeSet, thread};

use harness::{
    client::{Answer, Client},
    probe::{self, Probe},
    sandbox::Sandbox,
    wait,
    world::{OK, WILD},
};
use serde_json::{Value, json};

use super::CUT;
use crate::machine::Machine;

/// Clients that read a list, add to it and write it, and how many names each adds.
const EDITORS: usize = 2;
const NAMES: usize = 10;
/// A client gives up after so many changes by others that came before its own.
const TRIES: usize = 200;

/// Where a policy is read and written, and which part of an answer it is.
struct Place<'a> {
    client: &'a Client,
    path: String,
    is_nested: bool,
}

impl<'a> Place<'a> {
    fn both(sandbox: &'a Sandbox) -> [Self; 2] {
        let place = |path, is_nested| Self {
            client: sandbox.client(),
            path,
            is_nested,
        };
        [
            place("/settings/egress".to_owned(), false),
            place(sandbox.path("/network"), true),
        ]
    }

    #[track_caller]
    fn read(&self) -> (String, Value) {
        let answer = self.client.get(&self.path).send();
        let policy = answer.ok();
        (tag(&answer), policy)
    }

    fn put(&self, tag: &str, document: &Value) -> Answer {
        let call = self.client.put(&self.path).header("if-match", tag);
        call.json(document).send()
    }

    fn patch(&self, tag: &str, document: &Value) -> Answer {
        let call = self.client.patch(&self.path).header("if-match", tag);
        call.json(document).send()
    }

    fn policy<'b>(&self, shown: &'b mut Value) -> &'b mut Value {
        if self.is_nested {
            &mut shown["policy"]
        } else {
            shown
        }
    }

    /// The policy once it is in force, which may be later than the answer to the change.
    #[track_caller]
    fn wait_applied(&self) -> Value {
        wait::until("the last change is in force", CUT, || {
            let (_, shown) = self.read();
            (shown["applied"] == true).then_some(shown)
        })
    }

    #[track_caller]
    fn names(&self) -> Value {
        let (_, mut shown) = self.read();
        self.policy(&mut shown)["allowed_domains"].take()
    }
}

/// The ETag of a policy, which is its revision.
#[track_caller]
fn tag(answer: &Answer) -> String {
    let shown = answer.ok();
    let tag = answer.headers.get("etag").and_then(|tag| tag.to_str().ok());
    let tag = tag.unwrap_or_else(|| panic!("{} answered without ETag", answer.asked));
    assert_eq!(tag, format!("\"{}\"", shown["revision"]), "{}", answer.asked);
    tag.to_owned()
}

fn allowing(names: &[&str]) -> Value {
    json!({ "mode": "allowlist", "allowed_domains": names })
}

#[track_caller]
fn assert_resolves(probe: &Probe<'_>, name: &str, expected: bool) {
    let outcome = probe.try_one(&probe::lookup(name));
    assert_eq!(!outcome.addresses.is_empty(), expected, "{name}: {outcome:?}");
}

pub(crate) fn whoever_read_an_old_policy_is_told_so(machine: &Machine) {
    let organization = machine.node.register("readers");
    let sandbox = organization.sandbox(&json!({}));
    let probe = machine.probe(&sandbox);
    for place in Place::both(&sandbox) {
        let (unwritten, _) = place.read();
        assert_eq!(unwritten, "\"0\"", "{}", place.path);
        let first = tag(&place.put(&unwritten, &allowing(&["ok.test"])));
        // Somebody else, who read before that.
        for stale in [
            place.put(&unwritten, &allowing(&["evil.test"])),
            place.patch(&unwritten, &json!({ "allowed_domains": ["evil.test"] })),
        ] {
            let error = stale.refused(412, "PRECONDITION_FAILED");
            assert_eq!(format!("\"{}\"", error["details"]["revision"]), first, "{error}");
        }
        let in_body = |policy: &Value| {
            let mut policy = policy.clone();
            policy["revision"] = json!(0);
            policy
        };
        for stale in [
            place
                .client
                .put(&place.path)
                .json(&in_body(&allowing(&["evil.test"]))),
            place
                .client
                .patch(&place.path)
                .json(&in_body(&json!({ "allowed_domains": ["evil.test"] }))),
            // Any revision by the header, this one by the body.
            place
                .client
                .put(&place.path)
                .header("if-match", "*")
                .json(&in_body(&allowing(&["evil.test"]))),
        ] {
            stale.send().refused(409, "CONFLICT");
        }
        place
            .put("first", &allowing(&["evil.test"]))
            .refused_field("If-Match");
        assert_eq!(place.read().0, first, "{}", place.path);
        assert_eq!(place.names(), json!(["ok.test"]), "{}", place.path);

        let second = tag(&place.put(&first, &allowing(&["ok.test", "api.test"])));
        assert_ne!(second, first, "{}", place.path);
        place
            .put(&first, &allowing(&["evil.test"]))
            .refused(412, "PRECONDITION_FAILED");
        let third = tag(&place.patch(&second, &json!({ "allowed_domains": ["api.test", "ok.test"] })));
        let any = tag(&place.put("*", &allowing(&["ok.test"])));
        assert_eq!(
            BTreeSet::from([&first, &second, &third, &any]).len(),
            4,
            "{}",
            place.path
        );
        assert_eq!(place.names(), json!(["ok.test"]), "{}", place.path);
        place.wait_applied();
        // What the sandbox may is what the last accepted change says.
        probe
            .try_one(&probe::https("ok.test", "ok.test"))
            .assert_answered("hello from ok.test");
        assert_resolves(&probe, "api.test", false);
        assert_resolves(&probe, "evil.test", false);
        probe
            .try_one(&probe::tcp(OK, 80, "canary"))
            .assert_refused_at_connect();
    }
    sandbox.stop();
}

/// Reads the policy, adds a name and writes it back, anew whenever somebody was faster. Gives the revision.
#[track_caller]
fn add(place: &Place<'_>, name: &str) -> String {
    for _ in 0..TRIES {
        let (read, mut shown) = place.read();
        let names = place.policy(&mut shown)["allowed_domains"].as_array_mut();
        names.expect("a list").push(json!(name));
        let answer = place.put(&read, &shown);
        if answer.status.as_u16() == 412 {
            continue;
        }
        return tag(&answer);
    }
    panic!("{name} was never accepted");
}

/// Changes one field without having read the others, again when too many others did the same. Gives the revision.
#[track_caller]
fn change(place: &Place<'_>, changes: &Value) -> String {
    for _ in 0..TRIES {
        let answer = place.client.patch(&place.path).json(changes).send();
        if answer.status.as_u16() == 409 {
            answer.refused(409, "CONFLICT");
            continue;
        }
        return tag(&answer);
    }
    panic!("{changes} was never accepted");
}

pub(crate) fn of_changes_at_once_none_is_lost(machine: &Machine) {
    let organization = machine.node.register("editors");
    let sandbox = organization.sandbox(&json!({}));
    let probe = machine.probe(&sandbox);
    let name = |editor: usize, number: usize| format!("n{editor}-{number}.wild.test");
    let numbers = |editor: usize| (0..NAMES).map(move |number| (editor, number));
    let all: Vec<String> = (0..EDITORS)
        .flat_map(numbers)
        .map(|(editor, number)| name(editor, number))
        .collect();
    for place in &Place::both(&sandbox) {
        let empty = tag(&place.put("\"0\"", &allowing(&[])));
        let revisions: Vec<String> = thread::scope(|threads| {
            let editors = (0..EDITORS).map(|editor| {
                threads.spawn(move || -> Vec<String> {
                    numbers(editor)
                        .map(|(editor, number)| add(place, &name(editor, number)))
                        .collect()
                })
            });
            let changers = ["label_max", "name_max"].map(|field| {
                threads.spawn(move || -> Vec<String> {
                    let changes = (0..NAMES).map(|number| json!({ "dns": { (field): 50 + number } }));
                    changes.map(|changes| change(place, &changes)).collect()
                })
            });
            let threads: Vec<_> = editors.chain(changers).collect();
            let ended = threads.into_iter().map(|thread| thread.join());
            ended.flat_map(|changed| changed.expect("no panic")).collect()
        });
        // Every change has a revision of its own, and nothing of any was taken back by another.
        let different: BTreeSet<&String> = revisions.iter().chain([&empty]).collect();
        assert_eq!(different.len(), (EDITORS + 2) * NAMES + 1, "{revisions:?}");
        let mut shown = place.wait_applied();
        let policy = place.policy(&mut shown);
        let mut stored: Vec<&str> = policy["allowed_domains"]
            .as_array()
            .expect("a list")
            .iter()
            .filter_map(Value::as_str)
            .collect();
        stored.sort_unstable();
        let mut expected: Vec<&str> = all.iter().map(String::as_str).collect();
        expected.sort_unstable();
        assert_eq!(stored, expected, "{}", place.path);
        let last = 49 + NAMES;
        assert_eq!(
            (&policy["dns"]["label_max"], &policy["dns"]["name_max"]),
            (&json!(last), &json!(last)),
            "{}",
            place.path
        );
        let lookups: Vec<Value> = all.iter().map(|name| probe::lookup(name)).collect();
        for (name, outcome) in all.iter().zip(probe.try_all(&lookups)) {
            assert_eq!(
                outcome.addresses,
                [std::net::IpAddr::from(WILD)],
                "{name}: {outcome:?}"
            );
        }
        assert_resolves(&probe, "nobody.wild.test", false);
    }
    sandbox.stop();
}
