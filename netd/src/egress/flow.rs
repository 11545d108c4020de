//! One flow, from its first byte to its record.

use std::{net::SocketAddrV4, sync::Arc, time::Duration};

use jiff::Timestamp;
use sandgate_policy::{DomainName, Reason};
use sandgate_relay::copy::{self, Traffic};
use tokio::{
    io::{AsyncWriteExt as _, Interest},
    net::TcpStream,
    sync::OwnedSemaphorePermit,
    time::Instant,
};

use super::{
    Egress, clear,
    head::{Head, Host},
    refuse,
    retry::{self, Unsettled},
    sniff::{self, Beginning, Spoken},
};
use crate::{
    audit::{Attempt, Owner, Passed},
    sandbox::{Admitted, CutReason, Decision, Facts, FirstLook, Sandbox},
};

/// A flow in which nothing moves for this long is closed.
const IDLE: Duration = Duration::from_secs(3600);
/// Time for the beginning of a flow to go out.
const FIRST_WRITE: Duration = Duration::from_secs(30);
/// How long an opaque flow is watched for a name, for its record only.
const WATCH: Duration = Duration::from_secs(5);
const WATCH_BYTES: usize = 4096;

/// A flow that was counted in, and not yet judged.
pub(super) struct Entry {
    sandbox: Arc<Sandbox>,
    owner: Owner,
    to: SocketAddrV4,
    look: FirstLook,
    began: Timestamp,
    clock: Instant,
    /// Held while the flow lives.
    _slot: OwnedSemaphorePermit,
}

/// What a flow says of itself.
struct Said {
    protocol: &'static str,
    host: Option<String>,
    name: Option<DomainName>,
    detail: Option<String>,
}

impl Said {
    fn nothing() -> Self {
        Self {
            protocol: "tcp",
            host: None,
            name: None,
            detail: None,
        }
    }

    fn attempt(&self, to: SocketAddrV4) -> Attempt {
        Attempt {
            protocol: self.protocol,
            host: self.host.clone(),
            ip: Some(*to.ip()),
            port: Some(to.port()),
            detail: self.detail.clone(),
        }
    }
}

/// How the flow goes on after it was admitted.
enum Manner {
    /// Every byte both ways; these were read already.
    Splice(Vec<u8>),
    /// One request in clear, of which these bytes of the body were read already.
    Clear(Box<Head>, Vec<u8>),
    /// Every byte both ways, unread.
    Opaque,
}

impl Egress {
    /// Counts a flow in, or records why not.
    pub(super) fn enter(&self, sandbox: &Arc<Sandbox>, to: SocketAddrV4) -> Option<Entry> {
        let owner = Owner::of(sandbox);
        let refused = |reason, detail: &str| {
            let said = Said {
                detail: Some(detail.to_owned()),
                ..Said::nothing()
            };
            self.audit
                .deny(&owner, &Decision::of(reason), said.attempt(to), 1);
        };
        let Ok(slot) = Arc::clone(&sandbox.limits.flows).try_acquire_owned() else {
            refused(Reason::Quota, "too many connections at once");
            return None;
        };
        if !self.audit.has_room(&owner) {
            refused(Reason::Quota, "the audit queue is full");
            return None;
        }
        let look = sandbox.first_look(to);
        if let FirstLook::Refuse(decision) = &look {
            self.audit.deny(&owner, decision, Said::nothing().attempt(to), 1);
            return None;
        }
        Some(Entry {
            sandbox: Arc::clone(sandbox),
            owner,
            to,
            look,
            began: Timestamp::now(),
            clock: Instant::now(),
            _slot: slot,
        })
    }

    /// Takes a flow to its end and records it.
    pub(super) async fn run(&self, entry: Entry, mut near: TcpStream) {
        let (mut said, manner) = match self.read(&entry, &mut near).await {
            Ok(read) => read,
            Err((said, decision)) => {
                refuse(&near);
                self.audit
                    .deny(&entry.owner, &decision, said.attempt(entry.to), 1);
                return;
            }
        };
        let facts = Facts {
            to: entry.to,
            name: said.name.clone(),
        };
        let admitted = match entry.sandbox.admit(facts) {
            Ok(admitted) => admitted,
            Err(decision) => {
                refuse(&near);
                self.audit
                    .deny(&entry.owner, &decision, said.attempt(entry.to), 1);
                return;
            }
        };
        let traffic = Traffic::default();
        let end = self.tasks.shutdown();
        let ended = tokio::select! {
            ended = self.forward(&admitted, entry.to, &mut near, &mut said, manner, &traffic) => ended,
            reason = admitted.cut.cut() => match reason {
                CutReason::Forbidden(decision) => Ended::Cut(decision),
                CutReason::SandboxGone => Ended::Stopped("the sandbox ended"),
            },
            () = end.cancelled() => Ended::Stopped("netd ended"),
        };
        let decision = match ended {
            Ended::Well => admitted.decision.clone(),
            Ended::Stopped(why) => {
                refuse(&near);
                said.detail = Some(why.to_owned());
                admitted.decision.clone()
            }
            Ended::Cut(decision) => {
                refuse(&near);
                said.detail = Some(format!("new rules: {}", decision.reason.as_str()));
                decision.because(Reason::PolicyTightened)
            }
            Ended::Failed(reason, detail) => {
                refuse(&near);
                said.detail = Some(detail);
                Decision {
                    tier: None,
                    rule: None,
                    ..Decision::of(reason)
                }
            }
        };
        let passed = Passed {
            began: entry.began,
            lasted: entry.clock.elapsed(),
            up: traffic.up(),
            down: traffic.down(),
        };
        self.audit
            .flow(&entry.owner, &decision, said.attempt(entry.to), passed);
        // Closed before the flow leaves the books: who waits for that may rely on it.
        drop(near);
        drop(admitted);
    }

    /// Reads the flow's beginning where the rules need it.
    async fn read(&self, entry: &Entry, near: &mut TcpStream) -> Result<(Said, Manner), (Said, Decision)> {
        match entry.look {
            FirstLook::Opaque => return Ok((Said::nothing(), Manner::Opaque)),
            FirstLook::Refuse(ref decision) => return Err((Said::nothing(), decision.clone())),
            FirstLook::Sniff => {}
        }
        let Ok(_permit) = Arc::clone(&entry.sandbox.limits.sniffs).try_acquire_owned() else {
            let detail = Some("too many connections that say nothing".to_owned());
            return Err((
                Said {
                    detail,
                    ..Said::nothing()
                },
                Decision::of(Reason::Quota),
            ));
        };
        let malformed = |why: &str| {
            let said = Said {
                detail: Some(why.to_owned()),
                ..Said::nothing()
            };
            (said, Decision::of(Reason::Malformed))
        };
        let Beginning { received, protocol } = sniff::sniff(near)
            .await
            .map_err(|_error| malformed("reset before it said whom it is for"))?;
        match protocol {
            Spoken::Unreadable(why) => Err(malformed(why)),
            Spoken::Tls(hello) => {
                let name = match hello.server_name.as_deref().map(DomainName::parse) {
                    None => None,
                    Some(Ok(name)) => Some(name),
                    Some(Err(_)) => {
                        let (mut said, decision) = malformed("a server name that is not a name");
                        said.protocol = "tls";
                        said.host = hello.server_name;
                        return Err((said, decision));
                    }
                };
                // A GREASE extension looks the same on the wire, and browsers always send one. The outer name
                // is what is judged, so it must be allowed and the address pinned for it.
                let detail = hello
                    .encrypted_hello
                    .then(|| "with an encrypted ClientHello or GREASE".to_owned());
                let host = name.as_ref().map(|name| name.as_str().to_owned());
                Ok((
                    Said {
                        protocol: "tls",
                        host,
                        name,
                        detail,
                    },
                    Manner::Splice(received),
                ))
            }
            Spoken::Http(head) => {
                let said = host_said(&head.host);
                if let Some(why) = mismatch(&head.host, entry.to) {
                    let detail = Some(why.to_owned());
                    return Err((Said { detail, ..said }, Decision::of(Reason::HostMismatch)));
                }
                let begun = received[head.length..].to_vec();
                Ok((said, Manner::Clear(Box::new(head), begun)))
            }
        }
    }

    async fn forward(
        &self,
        admitted: &Admitted,
        to: SocketAddrV4,
        near: &mut TcpStream,
        said: &mut Said,
        manner: Manner,
        traffic: &Traffic,
    ) -> Ended {
        let mut far = match self.dialer.dial(admitted, to).await {
            Ok(far) => far,
            Err(error) => return Ended::Failed(error.reason(), error.to_string()),
        };
        let ended = match manner {
            Manner::Clear(head, begun) => {
                match clear::one_request(&mut *near, &mut far, &head, &begun, IDLE, traffic).await {
                    clear::End::Closed => Ended::Well,
                    clear::End::Idle => Ended::Stopped("nothing moved for an hour"),
                    clear::End::NearFailed => Ended::Stopped("the client went away"),
                    clear::End::FarFailed => Ended::Stopped("the server went away"),
                    clear::End::Malformed => {
                        Ended::Failed(Reason::Malformed, "a broken request body".to_owned())
                    }
                }
            }
            Manner::Splice(received) => self.handshake(near, &mut far, &received, said, traffic).await,
            Manner::Opaque => {
                observe(near, &far, said).await;
                splice(near, &mut far, traffic).await
            }
        };
        if !matches!(ended, Ended::Well) {
            refuse(&far);
        }
        ended
    }

    /// Splices a TLS flow, once it is settled which server its handshake is with.
    async fn handshake(
        &self,
        near: &mut TcpStream,
        far: &mut TcpStream,
        received: &[u8],
        said: &Said,
        traffic: &Traffic,
    ) -> Ended {
        if let Err(why) = send_first(far, received).await {
            return Ended::Stopped(why);
        }
        traffic.add_up(received.len());
        match retry::settle(near, far, said.host.as_deref(), traffic).await {
            Ok(()) => splice(near, far, traffic).await,
            Err(Unsettled::FarFailed) => Ended::Stopped("the server went away"),
            Err(Unsettled::NearFailed) => Ended::Stopped("the client went away"),
            Err(Unsettled::TimedOut) => Ended::Stopped("no answer during the TLS handshake"),
            Err(error @ Unsettled::AnotherName) => Ended::Failed(Reason::HostMismatch, error.to_string()),
            Err(error @ Unsettled::Malformed(_)) => Ended::Failed(Reason::Malformed, error.to_string()),
        }
    }
}

/// How a flow ended.
enum Ended {
    /// By itself.
    Well,
    /// By something that is no verdict.
    Stopped(&'static str),
    /// By new rules.
    Cut(Decision),
    /// It could not go on.
    Failed(Reason, String),
}

async fn splice(near: &mut TcpStream, far: &mut TcpStream, traffic: &Traffic) -> Ended {
    match copy::both_ways(near, far, IDLE, traffic).await {
        copy::End::Closed => Ended::Well,
        copy::End::Idle => Ended::Stopped("nothing moved for an hour"),
        copy::End::NearFailed => Ended::Stopped("the client went away"),
        copy::End::FarFailed => Ended::Stopped("the server went away"),
    }
}

async fn send_first(far: &mut TcpStream, received: &[u8]) -> Result<(), &'static str> {
    match tokio::time::timeout(FIRST_WRITE, far.write_all(received)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) => Err("the server went away"),
        Err(_elapsed) => Err("the server takes nothing"),
    }
}

/// Looks, without taking anything, whether the beginning of an opaque flow names a host. For the record
/// only: the flow is allowed whatever it says.
async fn observe(near: &TcpStream, far: &TcpStream, said: &mut Said) {
    let mut bytes = vec![0; WATCH_BYTES];
    let looking = async {
        tokio::select! {
            // A server that speaks first is not kept waiting.
            _ = far.ready(Interest::READABLE) => 0,
            seen = near.peek(&mut bytes) => seen.unwrap_or(0),
        }
    };
    let seen = tokio::time::timeout(WATCH, looking).await.unwrap_or(0);
    match sniff::read(&bytes[..seen]) {
        Some(Spoken::Tls(hello)) => {
            said.protocol = "tls";
            said.host = hello
                .server_name
                .and_then(|name| DomainName::parse(&name).ok())
                .map(|name| name.as_str().to_owned());
        }
        Some(Spoken::Http(head)) => {
            let Said { protocol, host, .. } = host_said(&head.host);
            said.protocol = protocol;
            said.host = host;
        }
        Some(Spoken::Unreadable(_)) | None => {}
    }
}

fn host_said(host: &Host) -> Said {
    let text = host.name.as_ref().map(|name| name.as_str().to_owned());
    let text = text.or_else(|| host.address.map(|address| address.to_string()));
    Said {
        protocol: "http",
        host: text,
        name: host.name.clone(),
        detail: None,
    }
}

/// How a Host field contradicts the destination, if it does.
fn mismatch(host: &Host, to: SocketAddrV4) -> Option<&'static str> {
    if host.port.is_some_and(|port| port != to.port()) {
        return Some("the Host field names another port");
    }
    if host.address.is_some_and(|address| address != *to.ip()) {
        return Some("the Host field names another address");
    }
    None
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn a_host_field_must_fit_the_destination() {
        let to = SocketAddrV4::new(Ipv4Addr::new(203, 0, 113, 10), 8080);
        let host = |address: Option<[u8; 4]>, port| Host {
            name: None,
            address: address.map(Ipv4Addr::from),
            port,
        };
        assert_eq!(mismatch(&host(None, None), to), None);
        assert_eq!(mismatch(&host(Some([203, 0, 113, 10]), Some(8080)), to), None);
        assert!(mismatch(&host(Some([203, 0, 113, 66]), None), to).is_some());
        assert!(mismatch(&host(None, Some(80)), to).is_some());
    }
}
