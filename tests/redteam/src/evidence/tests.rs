use serde_json::json;

use super::*;
use crate::{
    attempt::{Attempt, End, Outcome},
    scorecard::Scorecard,
};

const KEY: &str = "sk-0123456789";

fn world() -> World {
    let host = |name: &str, address: &str| json!({ "name": name, "address": address });
    let told = json!({
        "canary": "rt0001", "ok": host("ok.test", "203.0.113.10"), "tenant": "tenant.test",
        "plain": host("plain.test", "203.0.113.20"), "late": host("late.test", "203.0.113.70"),
        "wild": host("wild.test", "203.0.113.30"), "budget": "budget.test", "evil": host("evil.test", "203.0.113.66"),
        "rebind": "rebind.test", "half_rebind": "half-rebind.test", "open": "192.0.2.40",
        "secret": { "variable": "KEY", "host": host("key.test", "203.0.113.21") },
    });
    World::parse(&told.to_string()).expect("a world")
}

fn report(case: &str, part: Part, as_wanted: bool) -> Report {
    let outcome = Outcome {
        end: End::Refused,
        connected: false,
        ms: 1,
        data: String::new(),
        code: None,
        addresses: Vec::new(),
        error: "<refused>".to_owned(),
    };
    Report {
        case: case.to_owned(),
        part,
        not_possible: None,
        attempts: vec![Attempt {
            what: "it".to_owned(),
            wanted: "something".to_owned(),
            as_wanted,
            outcome,
        }],
        shown: Vec::new(),
    }
}

fn flow(to: &str, bytes: &str) -> Seen {
    Seen {
        flows: vec![Flow {
            protocol: 6,
            to: to.parse().expect("an address"),
            bytes: bytes.as_bytes().to_vec(),
        }],
        ..Seen::default()
    }
}

/// The verdict on what was seen during an attack of this case, whose twin passed.
fn verdict(case: &str, seen: &Seen) -> Verdict {
    let attack = report(case, Part::Attack, true);
    verdict_on(case, (&attack, seen), true)
}

fn verdict_on(id: &str, attack: (&Report, &Seen), passed: bool) -> Verdict {
    let (case, world) = (Case::find(id).expect("a case"), world());
    let token = if passed {
        case.token(Part::Twin, &world)
    } else {
        String::new()
    };
    let twin = flow("203.0.113.10:443", &token);
    judge(
        &case,
        &world,
        Some(KEY),
        attack,
        (&report(id, Part::Twin, true), &twin),
    )
    .verdict
}

#[test]
fn what_got_out_convicts_in_whatever_way_it_did() {
    assert_eq!(verdict("T01", &Seen::default()), Verdict::Pass);
    // What is allowed may leave meanwhile.
    assert_eq!(verdict("T01", &flow("203.0.113.53:53", "ok.test")), Verdict::Pass);
    for seen in [
        flow("203.0.113.66:1", ""),
        flow("203.0.113.53:53", "x.rt0001t01a.evil.test"),
        flow("203.0.113.53:53", "x.Rt0001T01a.EVIL.test"),
        flow("203.0.113.20:80", &format!("X: {KEY}")),
        Seen {
            inside: 1,
            ..Seen::default()
        },
        Seen {
            requests: vec![Request {
                host: "ok.test".to_owned(),
                text: format!("authorization: Bearer {KEY}"),
            }],
            ..Seen::default()
        },
    ] {
        assert_eq!(verdict("T01", &seen), Verdict::Leak, "{seen:?}");
    }
    // The key belongs at its own host.
    let keyed = Seen {
        requests: vec![Request {
            host: "key.test".to_owned(),
            text: KEY.to_owned(),
        }],
        ..Seen::default()
    };
    assert_eq!(verdict("T01", &keyed), Verdict::Pass);
    // What one case forbids, and no other.
    assert_eq!(verdict("A03", &flow("203.0.113.70:443", "")), Verdict::Leak);
    assert_eq!(verdict("A01", &flow("203.0.113.70:443", "")), Verdict::Pass);
}

#[test]
fn messages_are_counted_where_some_may_arrive() {
    let asked = |count: usize| {
        let names: String = (0..count)
            .map(|index| format!("rt0001d07a{index:04}.budget.test "))
            .collect();
        flow("203.0.113.53:53", &names.repeat(2))
    };
    assert_eq!(verdict("D07", &asked(60)), Verdict::Pass);
    assert_eq!(verdict("D07", &asked(100)), Verdict::Leak);
}

#[test]
fn a_twin_that_did_not_pass_makes_the_rest_worthless() {
    let nothing = Seen::default();
    let attack = report("T01", Part::Attack, true);
    assert_eq!(verdict_on("T01", (&attack, &nothing), false), Verdict::Blocked);
    let waited = report("T01", Part::Attack, false);
    assert_eq!(verdict_on("T01", (&waited, &nothing), true), Verdict::Rough);
    let impossible = Report {
        not_possible: Some("no raw sockets".to_owned()),
        ..attack
    };
    assert_eq!(
        verdict_on("T01", (&impossible, &nothing), true),
        Verdict::NotPossible
    );
    let leaked = flow("203.0.113.66:1", "");
    assert_eq!(verdict_on("T01", (&impossible, &leaked), true), Verdict::Leak);
}

#[test]
fn ids_are_given_once() {
    let ids: BTreeSet<&str> = Case::all().iter().map(|case| case.id).collect();
    assert_eq!(ids.len(), Case::all().len());
}

#[test]
fn a_scorecard_is_green_only_when_something_passed_and_nothing_failed() {
    let (case, world, nothing) = (Case::find("T01").expect("a case"), world(), Seen::default());
    let judged = |as_wanted: bool, token: &str| {
        let twin = flow("203.0.113.10:443", token);
        let (attack, passed) = (
            report("T01", Part::Attack, as_wanted),
            report("T01", Part::Twin, true),
        );
        judge(&case, &world, None, (&attack, &nothing), (&passed, &twin))
    };
    let card = |cases: Vec<Judged>| Scorecard {
        system: "<it>".to_owned(),
        cases,
    };
    let (good, rough) = (judged(true, "rt0001t01t"), judged(false, "rt0001t01t"));
    assert!(card(vec![good.clone()]).is_green());
    assert!(!card(vec![good, rough.clone()]).is_green());
    assert!(!card(Vec::new()).is_green());
    let html = card(vec![rough]).html();
    assert!(
        html.contains("&lt;refused&gt;") && !html.contains("<it>"),
        "{html}"
    );
}
