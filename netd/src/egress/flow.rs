//! One flow, from its first byte to its record.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use jiff::Timestamp;
use sandgate_policy::{DomainName, NormalPath, Reason};
use sandgate_relay::{
    copy::{self, Traffic},
    http1::head::{Head, Host},
    splice,
};
use tokio::{
    io::{AsyncWriteExt as _, Interest},
    net::TcpStream,
    sync::OwnedSemaphorePermit,
    time::Instant,
};

use super::{
    Egress,
    hello::Hides,
    refuse,
    retry::{self, Unsettled},
    sniff::{self, Beginning, Spoken},
};
use crate::{
    audit::{Attempt, Owner, Passed},
    intercept::{Channel, Target, inject::is_marked_in_clear},
    sandbox::{Admitted, CutReason, Decision, Facts, FirstLook, Sandbox},
};

/// A flow in which nothing moves for this long is closed.
pub(super) const IDLE: Duration = Duration::from_secs(3600);
/// Time for the beginning of a flow to go out.
const FIRST_WRITE: Duration = Duration::from_secs(30);
/// How long an opaque flow is watched for a name, for its record only.
const WATCH: Duration = Duration::from_secs(5);
const WATCH_BYTES: usize = 4096;

/// A flow that was counted in, and not yet judged.
pub(super) struct Entry {
    pub(super) sandbox: Arc<Sandbox>,
    pub(super) owner: Owner,
    pub(super) to: SocketAddr,
    look: FirstLook,
    pub(super) began: Timestamp,
    pub(super) clock: Instant,
    /// Held while the flow lives.
    _slot: OwnedSemaphorePermit,
}

impl Entry {
    /// Whom it is for.
    pub(super) fn target(&self, name: Option<DomainName>, channel: Channel) -> Target {
        let to = self.to;
        Target { name, to, channel }
    }
}

/// What a flow says of itself.
pub(super) struct Said {
    protocol: &'static str,
    host: Option<String>,
    name: Option<DomainName>,
    detail: Option<String>,
    /// What is wrong with it, where nothing of that ends it.
    fault: Option<Box<Decision>>,
}

impl Said {
    fn nothing() -> Self {
        Self {
            protocol: "tcp",
            host: None,
            name: None,
            detail: None,
            fault: None,
        }
    }

    /// Of HTTP whose requests are not known.
    fn clear() -> Self {
        Self {
            protocol: "http",
            ..Self::nothing()
        }
    }

    fn attempt(&self, to: SocketAddr) -> Attempt {
        Attempt {
            protocol: self.protocol,
            host: self.host.clone(),
            ip: Some(to.ip()),
            port: Some(to.port()),
            detail: self.detail.clone(),
            ..Attempt::default()
        }
    }
}

/// How the flow goes on after it was admitted.
enum Manner {
    /// TLS, every byte both ways; these were read already.
    Splice(Hello),
    /// Requests in clear, of which the first begins with this head. Every byte was read already of these.
    Clear(Box<Head>, Vec<u8>),
    /// The same by HTTP/2, of which no request is known.
    ClearHttp2(Vec<u8>),
    /// Every byte both ways, unread.
    Opaque,
    /// The same, after a look for a name that found none or does not count: these bytes were read already.
    Begun(Vec<u8>),
    /// The same, under the name that was found.
    Named(Vec<u8>),
}

/// What was read of a TLS flow.
struct Hello {
    received: Vec<u8>,
    /// How many of these bytes are the ClientHello's.
    length: usize,
}

impl Egress {
    /// Counts a flow in, or records why not.
    pub(super) fn enter(&self, sandbox: &Arc<Sandbox>, to: SocketAddr) -> Option<Entry> {
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
            refused(Reason::Quota, "the audit has no room for more records");
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
    pub(super) async fn run(self: &Arc<Self>, entry: Entry, mut near: TcpStream) {
        let (mut said, manner) = match self.read(&entry, &mut near).await {
            Ok(read) => read,
            Err((said, decision)) => {
                refuse(&near);
                self.audit
                    .deny(&entry.owner, &decision, said.attempt(entry.to), 1);
                return;
            }
        };
        if let Manner::ClearHttp2(received) = manner {
            return Box::pin(self.read_http2_in_clear(entry, near, received)).await;
        }
        let (mut admitted, manner) = match admit(&entry, &mut said, manner) {
            Ok(admitted) => admitted,
            Err(decision) => {
                refuse(&near);
                self.audit
                    .deny(&entry.owner, &decision, said.attempt(entry.to), 1);
                return;
            }
        };
        // By the rules that admitted it or later ones: those of the first look may be gone, after a beginning that was
        // long in coming.
        let audit = matches!(entry.sandbox.first_look(entry.to), FirstLook::Audit(_));
        // Boxed: the states of such a flow are large, and most flows are others.
        let manner = match (manner, &said.name) {
            (Manner::Splice(hello), Some(name)) if admitted.intercept => {
                let target = entry.target(Some(name.clone()), Channel::Tls);
                let begun = (near, hello.received);
                return Box::pin(self.intercept(entry, admitted, target, begun, said.detail)).await;
            }
            // On its way through here it would lose the other protocol that it asks for.
            (Manner::Clear(head, received), _) if audit && head.asks_for_upgrade() => Manner::Named(received),
            // All else that is denied in clear is denied by rules in force.
            (Manner::Clear(head, received), _)
                if audit && admitted.intercept && NormalPath::parse(head.target()).is_err() =>
            {
                said.detail = Some("a path that can be read in two ways".to_owned());
                admitted.decision = Decision::of(Reason::Malformed).audited();
                Manner::Named(received)
            }
            (Manner::Clear(_, received), name) => {
                let target = entry.target(name.clone(), Channel::Clear);
                return Box::pin(self.read_in_clear(entry, admitted, target, near, received)).await;
            }
            // Whatever its handshake comes to, nothing of it ends the flow.
            (Manner::Splice(hello), _) if audit => Manner::Named(hello.received),
            (manner, _) => manner,
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
        if !matches!(ended, Ended::Well) {
            refuse(&near);
        }
        let (decision, detail) = ended.settle(admitted.decision.clone());
        said.detail = detail.or(said.detail);
        let passed = Passed {
            began: entry.began,
            lasted: entry.clock.elapsed(),
            up: traffic.up(),
            down: traffic.down(),
        };
        self.metrics.carried(passed.up, passed.down);
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
            FirstLook::Sniff | FirstLook::Glance | FirstLook::Audit(_) => {}
        }
        let glance = entry.look == FirstLook::Glance;
        let audit = matches!(entry.look, FirstLook::Audit(_));
        // What would end the flow in another mode is only recorded of it.
        let faulty = |said: Said, decision: Decision, received: Vec<u8>| {
            if audit {
                let fault = Some(Box::new(decision.audited()));
                return Ok((Said { fault, ..said }, Manner::Begun(received)));
            }
            Err(Box::new((said, decision)))
        };
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
            Spoken::Unreadable(_) if glance => Ok((Said::nothing(), Manner::Begun(received))),
            Spoken::Unreadable(why) => {
                let (said, decision) = malformed(why);
                faulty(said, decision, received).map_err(|refused| *refused)
            }
            Spoken::Tls(hello) => {
                let name = match hello.server_name.as_deref().map(DomainName::parse) {
                    None => None,
                    Some(Ok(name)) => Some(name),
                    Some(Err(_)) if glance => None,
                    Some(Err(_)) => {
                        let (mut said, decision) = malformed("a server name that is not a name");
                        said.protocol = "tls";
                        said.host = hello.server_name;
                        return faulty(said, decision, received).map_err(|refused| *refused);
                    }
                };
                // A GREASE extension looks the same on the wire, and browsers always send one. The outer name
                // is what is judged, so it must be allowed and the address pinned for it.
                let detail = match hello.hides {
                    Hides::Nothing => None,
                    Hides::Perhaps => Some("with an encrypted ClientHello or GREASE".to_owned()),
                    Hides::Name => Some("with a hidden server name that is not GREASE".to_owned()),
                };
                let mut said = Said {
                    protocol: "tls",
                    host: name.as_ref().map(|name| name.as_str().to_owned()),
                    name,
                    detail,
                    ..Said::nothing()
                };
                if hello.hides == Hides::Name && !glance {
                    let decision = entry.sandbox.judge_ech();
                    if !decision.is_allowed() {
                        return faulty(said, decision, received).map_err(|refused| *refused);
                    }
                    said.fault = Some(decision).filter(Decision::is_audited).map(Box::new);
                }
                let length = hello.length;
                Ok((said, Manner::Splice(Hello { received, length })))
            }
            // In audit mode nothing that is said on it may end it.
            Spoken::Http2 if glance || audit => Ok((Said::clear(), Manner::Begun(received))),
            Spoken::Http2 => Ok((Said::clear(), Manner::ClearHttp2(received))),
            Spoken::Http(head) => {
                let said = host_said(&head.host);
                if is_marked_in_clear(&head) {
                    let detail = Some("a placeholder in a request in clear".to_owned());
                    return Err((Said { detail, ..said }, Decision::of(Reason::PlaceholderMisuse)));
                }
                if glance {
                    return Ok((said, Manner::Begun(received)));
                }
                if let Some(why) = mismatch(&head.host, entry.to) {
                    let detail = Some(why.to_owned());
                    return faulty(
                        Said { detail, ..said },
                        Decision::of(Reason::HostMismatch),
                        received,
                    )
                    .map_err(|refused| *refused);
                }
                Ok((said, Manner::Clear(Box::new(head), received)))
            }
        }
    }

    async fn forward(
        &self,
        admitted: &Admitted,
        to: SocketAddr,
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
            // Taken elsewhere.
            Manner::Clear(..) | Manner::ClearHttp2(_) => Ended::Stopped("it cannot be read here"),
            Manner::Splice(hello) => handshake(near, &mut far, &hello, said, traffic).await,
            Manner::Begun(received) | Manner::Named(received) => {
                match send_first(&mut far, &received).await {
                    Ok(()) => {
                        traffic.add_up(received.len());
                        splice_on(near, &far, traffic).await
                    }
                    Err(why) => Ended::Stopped(why),
                }
            }
            Manner::Opaque => {
                observe(near, &far, said).await;
                splice_on(near, &far, traffic).await
            }
        };
        if !matches!(ended, Ended::Well) {
            refuse(&far);
        }
        ended
    }
}

/// Splices a TLS flow, once it is settled which server its handshake is with.
async fn handshake(
    near: &mut TcpStream,
    far: &mut TcpStream,
    hello: &Hello,
    said: &Said,
    traffic: &Traffic,
) -> Ended {
    // What came behind the hello may be a second one, and so does not go out before the server has spoken.
    let (first, behind) = hello.received.split_at(hello.length);
    if let Err(why) = send_first(far, first).await {
        return Ended::Stopped(why);
    }
    traffic.add_up(first.len());
    match retry::settle(near, far, behind, said.host.as_deref(), traffic).await {
        Ok(()) => splice_on(near, far, traffic).await,
        Err(Unsettled::FarFailed) => Ended::Stopped("the server went away"),
        Err(Unsettled::NearFailed) => Ended::Stopped("the client went away"),
        Err(Unsettled::TimedOut) => Ended::Stopped("no answer during the TLS handshake"),
        Err(error @ Unsettled::AnotherName) => Ended::Failed(Reason::HostMismatch, error.to_string()),
        Err(error @ Unsettled::Malformed(_)) => Ended::Failed(Reason::Malformed, error.to_string()),
    }
}

/// How a flow ended.
pub(super) enum Ended {
    /// By itself.
    Well,
    /// By something that is no verdict.
    Stopped(&'static str),
    /// The client broke off, in this way.
    Client(String),
    /// By new rules.
    Cut(Decision),
    /// It could not go on.
    Failed(Reason, String),
}

impl Ended {
    /// What is recorded of a flow that `admitted` let in, and what people should know.
    pub(super) fn settle(self, admitted: Decision) -> (Decision, Option<String>) {
        match self {
            Self::Well => (admitted, None),
            Self::Stopped(why) => (admitted, Some(why.to_owned())),
            Self::Client(how) => (admitted, Some(how)),
            Self::Cut(decision) => {
                let detail = format!("new rules: {}", decision.reason.as_str());
                let cut = Decision {
                    enforced: true,
                    ..decision.because(Reason::PolicyTightened)
                };
                (cut, Some(detail))
            }
            Self::Failed(reason, detail) => {
                let decision = Decision {
                    tier: None,
                    ..Decision::of(reason)
                };
                (decision, Some(detail))
            }
        }
    }
}

/// Admits a flow. Of one that is allowed, the first that is wrong with it is recorded.
fn admit(entry: &Entry, said: &mut Said, manner: Manner) -> Result<(Admitted, Manner), Decision> {
    let (mut admitted, manner) = admit_as_shown(entry, said, manner)?;
    if let Some(fault) = said.fault.take() {
        admitted.decision = *fault;
    }
    Ok((admitted, manner))
}

/// One that may go unread, and cannot go under the name it shows, goes without a name.
fn admit_as_shown(entry: &Entry, said: &mut Said, manner: Manner) -> Result<(Admitted, Manner), Decision> {
    let to = entry.to;
    let nameless = Facts { to, name: None };
    if matches!(manner, Manner::Begun(_)) {
        return Ok((entry.sandbox.admit(nameless)?, manner));
    }
    let name = said.name.clone();
    match entry.sandbox.admit(Facts { to, name }) {
        Ok(admitted) => Ok((admitted, manner)),
        Err(_) if matches!(entry.look, FirstLook::Glance | FirstLook::Audit(_)) => {
            said.name = None;
            Ok((entry.sandbox.admit(nameless)?, manner))
        }
        Err(decision) => Err(decision),
    }
}

async fn splice_on(near: &TcpStream, far: &TcpStream, traffic: &Traffic) -> Ended {
    match splice::both_ways(near, far, IDLE, traffic).await {
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
        Some(Spoken::Http2) => said.protocol = "http",
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
        ..Said::nothing()
    }
}

/// How a Host field contradicts the destination, if it does.
pub(super) fn mismatch(host: &Host, to: SocketAddr) -> Option<&'static str> {
    if host.port.is_some_and(|port| port != to.port()) {
        return Some("the Host field names another port");
    }
    if host.address.is_some_and(|address| address != to.ip()) {
        return Some("the Host field names another address");
    }
    None
}

#[cfg(test)]
mod tests {
    use tokio::{io::AsyncReadExt, net::TcpListener};

    use super::*;
    use crate::egress::{hello::tests::client_hello, retry::tests::retry_request};

    async fn connected() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("bound");
        let to = listener.local_addr().expect("its address");
        let (one, other) = tokio::join!(TcpStream::connect(to), listener.accept());
        (one.expect("connected"), other.expect("accepted").0)
    }

    #[tokio::test]
    async fn a_second_hello_in_the_first_segment_does_not_reach_the_server() {
        let (_client, mut near) = connected().await;
        let (mut far, mut server) = connected().await;
        let first = client_hello("ok.test");
        let hello = Hello {
            received: [&first[..], &client_hello("evil.test")].concat(),
            length: first.len(),
        };
        let said = Said {
            host: Some("ok.test".to_owned()),
            ..Said::nothing()
        };
        let traffic = Traffic::default();
        let splicing = async {
            let ended = handshake(&mut near, &mut far, &hello, &said, &traffic).await;
            drop(far);
            ended
        };
        let serving = async {
            let mut seen = vec![0; first.len()];
            server.read_exact(&mut seen).await.expect("the first hello");
            assert_eq!(seen, first);
            server.write_all(&retry_request()).await.expect("written");
            seen.clear();
            server.read_to_end(&mut seen).await.expect("its end");
            seen
        };
        let (ended, seen) = tokio::join!(splicing, serving);
        assert!(matches!(ended, Ended::Failed(Reason::HostMismatch, _)));
        assert!(seen.is_empty(), "{}", seen.escape_ascii());
        assert_eq!(traffic.up(), first.len() as u64);
    }

    #[test]
    fn a_host_field_must_fit_the_destination() {
        let to = SocketAddr::from(([203, 0, 113, 10], 8080));
        let host = |address: Option<[u8; 4]>, port| Host {
            name: None,
            address: address.map(Into::into),
            port,
        };
        assert_eq!(mismatch(&host(None, None), to), None);
        assert_eq!(mismatch(&host(Some([203, 0, 113, 10]), Some(8080)), to), None);
        assert!(mismatch(&host(Some([203, 0, 113, 66]), None), to).is_some());
        assert!(mismatch(&host(None, Some(80)), to).is_some());
    }
}
