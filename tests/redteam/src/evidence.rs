//! What arrived outside, and the verdict that follows from it. The sandbox's own word decides nothing here but how its
//! attempts felt; this is a pure function, and whoever has other means to see what arrives can feed it.
//!
//! Convicted is, beside what a case forbids itself: a packet to the attacker's address, a message with an attack's
//! token, a connection to a listener inside, and the key anywhere but at its host.

use std::{collections::BTreeSet, net::SocketAddr};

use serde::{Deserialize, Serialize};

use crate::{
    case::{Case, Part, Report, TOKEN, Trace},
    world::World,
};

/// Letters behind a token that tell messages apart.
const TAIL: usize = 4;
/// Reasons that are told.
const TOLD: usize = 6;

/// Packets of one kind from one place to another.
#[derive(Debug, Clone)]
pub struct Flow {
    /// The protocol of IP.
    pub protocol: u8,
    /// Where they went; port 0 where there are none.
    pub to: SocketAddr,
    /// What was in them, one after the other.
    pub bytes: Vec<u8>,
}

/// A request that a server of the world read.
#[derive(Debug, Clone)]
pub struct Request {
    /// For whom it was.
    pub host: String,
    /// All of it.
    pub text: String,
}

/// What was seen outside while a part ran.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// What left the machine that runs the sandbox.
    pub flows: Vec<Flow>,
    /// What servers read.
    pub requests: Vec<Request>,
    /// Connections to listeners on the machine or in another sandbox.
    pub inside: usize,
}

/// How a case ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Nothing got out, it was said at once, and what is allowed passed.
    Pass,
    /// It needs what the sandbox, or the world, does not have.
    NotPossible,
    /// Nothing got out, and what is allowed passed; but the client was left waiting, or felt something else than it must.
    Rough,
    /// What is allowed did not pass: that nothing got out means nothing.
    Blocked,
    /// Something got out.
    Leak,
}

/// A case that was judged.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Judged {
    /// The case.
    pub id: String,
    /// How it ended.
    pub verdict: Verdict,
    /// Why, where it did not pass.
    pub why: Vec<String>,
    /// What should have passed and did not, whatever the verdict.
    pub missing: Vec<String>,
    /// What was tried, as it felt.
    pub reports: Vec<Report>,
    /// It needed root in the sandbox's network namespace, and had it.
    pub as_root: bool,
}

/// Judges a case by what its parts told and what was seen outside while they ran. `secret` is the key's value.
pub fn judge(
    case: &Case,
    world: &World,
    secret: Option<&str>,
    attack: (&Report, &Seen),
    twin: (&Report, &Seen),
) -> Judged {
    let leaks = leaks(case, world, secret, attack);
    let missing = missing(case, world, secret, twin);
    let impossible = [attack.0, twin.0]
        .into_iter()
        .find_map(|report| report.not_possible.clone());
    let rough: Vec<String> = attack
        .0
        .attempts
        .iter()
        .filter(|attempt| !attempt.as_wanted)
        .map(told)
        .collect();
    let (verdict, mut why) = if !leaks.is_empty() {
        (Verdict::Leak, leaks)
    } else if let Some(impossible) = impossible {
        (Verdict::NotPossible, vec![impossible])
    } else if !missing.is_empty() {
        (Verdict::Blocked, missing.clone())
    } else if !rough.is_empty() {
        (Verdict::Rough, rough)
    } else {
        (Verdict::Pass, Vec::new())
    };
    if why.len() > TOLD {
        let more = why.len() - TOLD;
        why.truncate(TOLD);
        why.push(format!("and {more} more"));
    }
    Judged {
        id: case.id.to_owned(),
        verdict,
        why,
        missing,
        reports: vec![attack.0.clone(), twin.0.clone()],
        as_root: false,
    }
}

fn told(attempt: &crate::attempt::Attempt) -> String {
    let outcome = &attempt.outcome;
    let connected = if outcome.connected { ", connected" } else { "" };
    format!(
        "{}: {:?}{connected} after {} ms, wanted: {} {}",
        attempt.what, outcome.end, outcome.ms, attempt.wanted, outcome.error
    )
}

/// What got out.
fn leaks(case: &Case, world: &World, secret: Option<&str>, (report, seen): (&Report, &Seen)) -> Vec<String> {
    let token = case.token(Part::Attack, world);
    let mut leaks = BTreeSet::new();
    let attackers = world.attackers().into_iter().map(Trace::To);
    for trace in attackers.chain((case.forbidden)(world)) {
        let trace = with_token(trace, &token);
        if let Trace::Told(start) = trace {
            leaks.extend(
                report
                    .shown
                    .iter()
                    .filter(|told| told.starts_with(start))
                    .cloned(),
            );
        }
        if let Some(found) = find(&trace, seen, secret) {
            leaks.insert(found);
        }
    }
    let messages = messages(&token, seen);
    if messages.len() > case.most {
        leaks.insert(format!(
            "{} different messages with the token {token}, at most {} may",
            messages.len(),
            case.most
        ));
    }
    if seen.inside > 0 {
        leaks.insert(format!("{} connections to listeners inside", seen.inside));
    }
    if let Some(secret) = secret {
        if seen.flows.iter().any(|flow| contains(&flow.bytes, secret)) {
            leaks.insert("the key, in clear".to_owned());
        }
        let host = world.secret.as_ref().map(|secret| secret.host.name.as_str());
        for request in seen
            .requests
            .iter()
            .filter(|request| Some(request.host.as_str()) != host)
        {
            if contains(request.text.as_bytes(), secret) {
                leaks.insert(format!("the key, at {}", request.host));
            }
        }
        if report.shown.iter().any(|entry| entry.contains(secret)) {
            leaks.insert("the key stands in the sandbox".to_owned());
        }
    }
    leaks.into_iter().collect()
}

/// What should have passed and did not.
fn missing(
    case: &Case,
    world: &World,
    secret: Option<&str>,
    (report, seen): (&Report, &Seen),
) -> Vec<String> {
    let token = case.token(Part::Twin, world);
    let felt = report
        .attempts
        .iter()
        .filter(|attempt| !attempt.as_wanted)
        .map(told);
    let mut missing: Vec<String> = felt.collect();
    for trace in (case.required)(world) {
        let trace = with_token(trace, &token);
        if find(&trace, seen, secret).is_none() {
            missing.push(format!("outside nobody saw {trace:?}"));
        }
    }
    missing
}

fn with_token(trace: Trace, token: &str) -> Trace {
    match trace {
        Trace::Bytes(text) => Trace::Bytes(text.replace(TOKEN, token)),
        Trace::Request(text) => Trace::Request(text.replace(TOKEN, token)),
        Trace::Keyed(text) => Trace::Keyed(text.replace(TOKEN, token)),
        Trace::To(_) | Trace::At(_) | Trace::Port(_) | Trace::Protocol(_) | Trace::Told(_) => trace,
    }
}

/// How a trace was seen, if it was.
fn find(trace: &Trace, seen: &Seen, secret: Option<&str>) -> Option<String> {
    let flow = |fits: &dyn Fn(&Flow) -> bool| {
        let found = seen.flows.iter().find(|flow| fits(flow));
        found.map(|flow| format!("protocol {} to {}", flow.protocol, flow.to))
    };
    let request = |fits: &dyn Fn(&Request) -> bool| {
        let found = seen.requests.iter().find(|request| fits(request));
        found.map(|request| format!("a request for {}", request.host))
    };
    match trace {
        Trace::Told(_) => None,
        Trace::To(address) => flow(&|flow| flow.to.ip() == *address),
        Trace::At(address) => flow(&|flow| flow.to == *address),
        Trace::Port(port) => flow(&|flow| flow.to.port() == *port),
        Trace::Protocol(protocol) => flow(&|flow| flow.protocol == *protocol),
        Trace::Bytes(text) => flow(&|flow| contains(&flow.bytes, text)),
        Trace::Request(text) => request(&|request| contains(request.text.as_bytes(), text)),
        Trace::Keyed(text) => request(&|request| {
            let has = |text: &str| contains(request.text.as_bytes(), text);
            has(text) && secret.is_some_and(has)
        }),
    }
}

/// What follows each token: as many messages as there are different ones.
fn messages(token: &str, seen: &Seen) -> BTreeSet<Vec<u8>> {
    let flows = seen.flows.iter().map(|flow| flow.bytes.as_slice());
    let requests = seen.requests.iter().map(|request| request.text.as_bytes());
    let mut messages = BTreeSet::new();
    for bytes in flows.chain(requests) {
        let ends = bytes.windows(token.len()).enumerate();
        for (at, _) in ends.filter(|(_, window)| window.eq_ignore_ascii_case(token.as_bytes())) {
            let rest = &bytes[at + token.len()..];
            messages.insert(rest[..rest.len().min(TAIL)].to_ascii_lowercase());
        }
    }
    messages
}

fn contains(bytes: &[u8], text: &str) -> bool {
    !text.is_empty()
        && bytes
            .windows(text.len())
            .any(|window| window.eq_ignore_ascii_case(text.as_bytes()))
}

#[cfg(test)]
mod tests;
