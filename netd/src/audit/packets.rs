//! Turns the kernel's denials into records. The reader waits on a thread of its own: it blocks.

use std::{sync::Arc, thread, time::Duration};

use sandgate_policy::Reason;
use tokio_util::sync::CancellationToken;

use super::{Attempt, Audit, Owner};
use crate::{
    kernel::{DenyEvent, EventReader},
    metrics::Metrics,
    sandbox::{Decision, Sandbox, Sandboxes},
};

/// How long the reader waits for denials before it looks whether to end.
const WAIT: Duration = Duration::from_millis(200);
/// Pause after a failed read.
const PAUSE: Duration = Duration::from_secs(1);

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
const DNS: u16 = 53;

/// Reads denials until `end`.
///
/// # Errors
/// When the thread cannot be started.
pub fn follow(
    mut reader: EventReader,
    sandboxes: Arc<Sandboxes>,
    audit: Arc<Audit>,
    metrics: Metrics,
    end: CancellationToken,
) -> std::io::Result<thread::JoinHandle<()>> {
    thread::Builder::new().name("denials".to_owned()).spawn(move || {
        while !end.is_cancelled() {
            match reader.next_batch(WAIT) {
                Ok(events) => {
                    for event in events {
                        if !event.audit {
                            metrics.denied_in_kernel(event.reason, event.repeated.max(1));
                        }
                        // Nobody's: an interface that is no sandbox's, or the canary.
                        if let Some(sandbox) = sandboxes.by_ordinal(event.ordinal) {
                            record(&audit, &sandbox, &event);
                        }
                    }
                }
                Err(error) => {
                    tracing::error!(%error, "cannot read the kernel's denials");
                    thread::sleep(PAUSE);
                }
            }
        }
    })
}

fn record(audit: &Audit, sandbox: &Sandbox, event: &DenyEvent) {
    let owner = Owner::of(sandbox);
    let decision = decision(sandbox, event);
    audit.deny(&owner, &decision, attempt(event), event.repeated.max(1));
}

/// The kernel knows the reason and not the rule: the rules say which one, where they come to the same.
fn decision(sandbox: &Sandbox, event: &DenyEvent) -> Decision {
    let judged = match event.protocol {
        TCP | UDP => sandbox.judge_packet(event.protocol == UDP, event.dst),
        _ => return Decision::of(event.reason),
    };
    if judged.reason == event.reason && judged.enforced != event.audit {
        return judged;
    }
    let decision = Decision::of(event.reason);
    if event.audit { decision.audited() } else { decision }
}

fn attempt(event: &DenyEvent) -> Attempt {
    let protocol = match (event.ethertype, event.protocol) {
        (_, UDP | TCP) if event.dst.port() == DNS => "dns",
        (_, TCP) => "tcp",
        (_, UDP) => "udp",
        (_, ICMP | ICMPV6) => "icmp",
        _ => "ip",
    };
    let detail = match event.ethertype {
        0 | ETHERTYPE_IPV4 => None,
        ETHERTYPE_IPV6 => event.dst.ip().is_unspecified().then(|| "IPv6".to_owned()),
        other => Some(format!("ethertype {other:#06x}")),
    };
    let detail = match event.reason {
        Reason::UpstreamUnreachable => Some("netd was not listening".to_owned()),
        _ => detail,
    };
    let to = Some(event.dst).filter(|to| !to.ip().is_unspecified());
    Attempt {
        protocol,
        ip: to.map(|to| to.ip()),
        port: to.map(|to| to.port()).filter(|port| *port != 0),
        detail,
        ..Attempt::default()
    }
}
