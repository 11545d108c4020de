//! Turns flows that the kernel forwarded into records, once they have ended. Owns: what is known of such a flow without
//! having read it, and that a sandbox whose records find no room makes no more of them than can be kept: the kernel is told
//! to forward no new flow of it, and those it has are put together by destination.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use jiff::{SignedDuration, Timestamp};
use nix::time::{ClockId, clock_gettime};
use sandgate_policy::{FailureMode, Protocol, Reason};
use tokio_util::sync::CancellationToken;

use super::{Attempt, Audit, Owner, Passed};
use crate::{
    kernel::{Datapath, DatapathError, EndedFlow, FlowEnd},
    sandbox::{Decision, Sandbox, Sandboxes},
};

/// How often the kernel is asked.
const PAUSE: Duration = Duration::from_secs(1);
/// Within this every flow of a sandbox that is gone was found, but for time that the looks themselves take.
pub const ALL_FOUND: Duration = Duration::from_secs(PAUSE.as_secs() * Datapath::FLOW_LOOKS as u64);
/// Destinations of one sandbox that are kept apart while there is no room; beyond them all are one.
const HELD_MAX: usize = 4096;

/// What waits for room, by the ordinal of the sandbox.
type Held = BTreeMap<u32, Waiting>;

/// Flows of one sandbox, put together by protocol and destination.
struct Waiting {
    /// Kept beyond its departure: its flows are recorded then.
    sandbox: Arc<Sandbox>,
    sums: BTreeMap<(u8, Option<SocketAddr>), Sum>,
}

#[derive(Debug, Clone, Copy)]
struct Sum {
    began: Timestamp,
    lasted: Duration,
    up: u64,
    down: u64,
    flows: u64,
}

/// Records what the kernel forwarded, until `end`; then once more.
pub async fn follow(
    datapath: Arc<Datapath>,
    sandboxes: Arc<Sandboxes>,
    audit: Arc<Audit>,
    end: CancellationToken,
) {
    let mut held = Held::new();
    loop {
        let ended = tokio::select! {
            () = tokio::time::sleep(PAUSE) => false,
            () = end.cancelled() => true,
        };
        let rooms: Vec<_> = sandboxes
            .all()
            .iter()
            .map(|sandbox| (sandbox.handle, audit.has_room(&Owner::of(sandbox))))
            .collect();
        let asked = Arc::clone(&datapath);
        let asking = move || {
            for (endpoint, room) in rooms {
                match asked.allow_new_flows(endpoint, room) {
                    // It left this very moment.
                    Ok(()) | Err(DatapathError::Detached { .. }) => {}
                    Err(error) => {
                        tracing::error!(%error, "cannot tell the kernel whether flows can be recorded")
                    }
                }
            }
            asked.ended_flows()
        };
        match tokio::task::spawn_blocking(asking).await {
            Ok(Ok(flows)) => {
                let now = Now::read();
                for flow in &flows {
                    record(&audit, &sandboxes, &mut held, flow, &now);
                }
            }
            Ok(Err(error)) => tracing::error!(%error, "cannot read which forwarded flows have ended"),
            Err(_panic) => tracing::error!("reading which forwarded flows have ended broke"),
        }
        release(&audit, &mut held, |ordinal| {
            !ended && sandboxes.by_ordinal(ordinal).is_some()
        });
        if ended {
            return;
        }
    }
}

fn record(audit: &Audit, sandboxes: &Sandboxes, held: &mut Held, flow: &EndedFlow, now: &Now) {
    // Nobody's: the canary's.
    let Some(sandbox) = sandboxes.by_ordinal(flow.endpoint.ordinal) else {
        return;
    };
    let owner = Owner::of(&sandbox);
    let began = now.at(flow.began);
    if owner.mode == FailureMode::FailOpen || audit.has_room(&owner) {
        let passed = Passed {
            began,
            lasted: flow.lasted,
            up: flow.up,
            down: flow.down,
        };
        write(
            audit,
            &sandbox,
            &owner,
            (flow.protocol, Some(flow.dst)),
            passed,
            Ended::of(flow.why),
        );
        return;
    }
    let number = u8::from(flow.protocol == Protocol::Udp);
    let key = (number, Some(flow.dst));
    let Waiting { sums, .. } = held.entry(flow.endpoint.ordinal).or_insert_with(|| Waiting {
        sandbox,
        sums: BTreeMap::new(),
    });
    let key = if sums.len() < HELD_MAX || sums.contains_key(&key) {
        key
    } else {
        (number, None)
    };
    let sum = sums.entry(key).or_insert(Sum {
        began,
        lasted: Duration::ZERO,
        up: 0,
        down: 0,
        flows: 0,
    });
    sum.began = sum.began.min(began);
    sum.lasted = sum.lasted.max(flow.lasted);
    sum.up = sum.up.saturating_add(flow.up);
    sum.down = sum.down.saturating_add(flow.down);
    sum.flows += 1;
}

/// Records what has waited, as far as there is room; and all of it of a sandbox that cannot wait, because it or netd goes.
fn release(audit: &Audit, held: &mut Held, can_wait: impl Fn(u32) -> bool) {
    held.retain(|ordinal, Waiting { sandbox, sums }| {
        let can_wait = can_wait(*ordinal);
        let owner = Owner::of(sandbox);
        while (!can_wait || audit.has_room(&owner))
            && let Some(((number, to), sum)) = sums.pop_first()
        {
            let protocol = if number == 0 { Protocol::Tcp } else { Protocol::Udp };
            let passed = Passed {
                began: sum.began,
                lasted: sum.lasted,
                up: sum.up,
                down: sum.down,
            };
            let detail = format!("{} flows: there was no room for a record of each", sum.flows);
            let ended = Ended {
                reason: Reason::Allowed,
                detail: Some(detail),
            };
            write(audit, sandbox, &owner, (protocol, to), passed, ended);
        }
        !sums.is_empty()
    });
}

fn write(
    audit: &Audit,
    sandbox: &Sandbox,
    owner: &Owner,
    (protocol, to): (Protocol, Option<SocketAddr>),
    passed: Passed,
    ended: Ended,
) {
    let judge = |to| sandbox.judge_packet(protocol == Protocol::Udp, to);
    let judged = to.map(judge).filter(|judged| {
        // The rules that allowed it may be gone by its end; then the kernel's word is all that is known.
        ended.reason != Reason::Allowed || judged.is_allowed()
    });
    let decision = judged.map_or_else(
        || Decision::of(ended.reason),
        |judged| judged.because(ended.reason),
    );
    let name = to.and_then(|to| sandbox.only_name(to.ip()));
    let attempt = Attempt {
        protocol: match protocol {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        },
        host: name,
        ip: to.map(|to| to.ip()),
        port: to.map(|to| to.port()),
        detail: ended.detail,
        ..Attempt::default()
    };
    audit.flow(owner, &decision, attempt, passed);
}

/// What the end of a flow means for its record.
struct Ended {
    reason: Reason,
    detail: Option<String>,
}

impl Ended {
    fn of(why: FlowEnd) -> Self {
        let (reason, detail) = match why {
            FlowEnd::Closed | FlowEnd::Reset | FlowEnd::Idle => (Reason::Allowed, None),
            FlowEnd::EndpointGone => (Reason::Allowed, Some("ended with the sandbox")),
            FlowEnd::PolicyTightened => (Reason::PolicyTightened, Some("cut by a new policy")),
        };
        let detail = detail.map(str::to_owned);
        Self { reason, detail }
    }
}

/// One moment on both clocks.
struct Now {
    wall: Timestamp,
    monotonic: Duration,
}

impl Now {
    fn read() -> Self {
        Self {
            wall: Timestamp::now(),
            monotonic: clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from),
        }
    }

    fn at(&self, monotonic: Duration) -> Timestamp {
        let ago = self.monotonic.saturating_sub(monotonic);
        SignedDuration::try_from(ago)
            .ok()
            .and_then(|ago| self.wall.checked_sub(ago).ok())
            .unwrap_or(self.wall)
    }
}
