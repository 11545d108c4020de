//! One flow, from its first byte to its record.

mod ended;
mod reading;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use jiff::Timestamp;
use sandgate_api::audit::AlertKind;
use sandgate_policy::{DomainName, NormalPath, Reason};
use sandgate_relay::{
    copy::{self, Traffic},
    splice,
};
use tokio::{io::AsyncWriteExt as _, net::TcpStream, sync::OwnedSemaphorePermit, time::Instant};

use self::reading::{Hello, Manner, Said, observe};
pub(super) use self::{ended::Ended, reading::mismatch};
use super::{
    Egress, refuse,
    retry::{self, Unsettled},
};
use crate::{
    audit::{Attempt, Owner, Passed},
    intercept::{Channel, Target},
    sandbox::{Admitted, CutReason, Decision, Facts, FirstLook, Met, OverQuota, Sandbox},
};

/// A flow in which nothing moves for this long is closed.
pub(super) const IDLE: Duration = Duration::from_secs(3600);
/// Time for the beginning of a flow to go out.
const FIRST_WRITE: Duration = Duration::from_secs(30);

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

impl Egress {
    /// Counts a flow in, or records why not.
    pub(super) fn enter(&self, sandbox: &Arc<Sandbox>, to: SocketAddr) -> Option<Entry> {
        let owner = Owner::of(sandbox);
        let refused = |detail: &str, alert| {
            let attempt = Attempt {
                detail: Some(detail.to_owned()),
                alert,
                ..Said::nothing().attempt(to)
            };
            self.audit.deny(&owner, &Decision::of(Reason::Quota), attempt, 1);
        };
        let Ok(slot) = Arc::clone(&sandbox.limits.flows).try_acquire_owned() else {
            refused("too many connections at once", None);
            return None;
        };
        if !self.audit.has_room(&owner) {
            let alert = Some(AlertKind::AuditFull);
            refused("the audit has no room for more records", alert);
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
        let met = match meet(&entry, &mut said, &manner) {
            Ok(met) => met,
            Err(over) => {
                refuse(&near);
                self.audit
                    .deny(&entry.owner, &over.decision, said.attempt(entry.to), 1);
                return;
            }
        };
        let traffic = Traffic::within(Arc::clone(met.upload()));
        let end = self.tasks.shutdown();
        let ended = tokio::select! {
            ended = self.forward(&admitted, (entry.to, &met), &mut near, &mut said, manner, &traffic) => ended,
            reason = admitted.cut.cut() => match reason {
                CutReason::Forbidden(decision) => Ended::Cut(decision),
                CutReason::SandboxGone => Ended::Stopped("the sandbox ended"),
            },
            () = end.cancelled() => Ended::Stopped("netd ended"),
        };
        if !matches!(ended, Ended::Well) {
            refuse(&near);
        }
        if admitted.decision.reason == Reason::Allowed
            && let Some(noted) = met.beyond().or_else(|| met.noted.clone())
        {
            admitted.decision = noted;
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
        drop(met);
        drop(admitted);
    }

    async fn forward(
        &self,
        admitted: &Admitted,
        (to, met): (SocketAddr, &Met),
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
            Manner::Splice(hello) => {
                match handshake(near, &mut far, &hello, said.host.as_deref(), traffic).await {
                    Ok(()) => splice_on(near, &far, met, traffic).await,
                    Err(error) => unsettled(error, met),
                }
            }
            Manner::Begun(received) | Manner::Named(received) => {
                match send_first(&mut far, &received, traffic).await {
                    Ok(()) => splice_on(near, &far, met, traffic).await,
                    Err(error) => unsettled(error, met),
                }
            }
            Manner::Opaque => {
                observe(near, &far, said).await;
                splice_on(near, &far, met, traffic).await
            }
        };
        if !matches!(ended, Ended::Well) {
            refuse(&far);
        }
        ended
    }
}

/// Settles which server the handshake of a TLS flow is with.
async fn handshake(
    near: &mut TcpStream,
    far: &mut TcpStream,
    hello: &Hello,
    name: Option<&str>,
    traffic: &Traffic,
) -> Result<(), Unsettled> {
    // What came behind the hello may be a second one, and so does not go out before the server has spoken.
    let (first, behind) = hello.received.split_at(hello.length);
    send_first(far, first, traffic).await?;
    retry::settle(near, far, behind, name, traffic).await
}

/// How a flow ends whose beginning cannot go on.
fn unsettled(error: Unsettled, met: &Met) -> Ended {
    match error {
        Unsettled::Over => Ended::Over(met.over()),
        Unsettled::FarFailed => Ended::Stopped("the server went away"),
        Unsettled::FarTakesNothing => Ended::Stopped("the server takes nothing"),
        Unsettled::NearFailed => Ended::Stopped("the client went away"),
        Unsettled::TimedOut => Ended::Stopped("no answer during the TLS handshake"),
        Unsettled::AnotherName => Ended::Failed(Reason::HostMismatch, error.to_string()),
        Unsettled::Malformed(_) => Ended::Failed(Reason::Malformed, error.to_string()),
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

/// Counts a flow to its host in. On an error the flow's record says why.
fn meet(entry: &Entry, said: &mut Said, manner: &Manner) -> Result<Met, OverQuota> {
    let name = match manner {
        Manner::Splice(_) | Manner::Named(_) => said.name.as_ref(),
        Manner::Opaque | Manner::Begun(_) | Manner::Clear(..) | Manner::ClearHttp2(_) => None,
    };
    let sandbox = &entry.sandbox;
    let met = sandbox.meet(sandbox.host(name, entry.to.ip()));
    met.inspect_err(|over| said.detail = Some(over.detail.clone()))
}

async fn splice_on(near: &TcpStream, far: &TcpStream, met: &Met, traffic: &Traffic) -> Ended {
    match splice::both_ways(near, far, IDLE, traffic).await {
        copy::End::Closed => Ended::Well,
        copy::End::Idle => Ended::Stopped("nothing moved for an hour"),
        copy::End::NearFailed => Ended::Stopped("the client went away"),
        copy::End::FarFailed => Ended::Stopped("the server went away"),
        copy::End::Over => Ended::Over(met.over()),
    }
}

async fn send_first(far: &mut TcpStream, received: &[u8], traffic: &Traffic) -> Result<(), Unsettled> {
    if !traffic.may_send(received.len()) {
        return Err(Unsettled::Over);
    }
    match tokio::time::timeout(FIRST_WRITE, far.write_all(received)).await {
        Ok(Ok(())) => {
            traffic.add_up(received.len());
            Ok(())
        }
        Ok(Err(_)) => Err(Unsettled::FarFailed),
        Err(_elapsed) => Err(Unsettled::FarTakesNothing),
    }
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
        let traffic = Traffic::default();
        let splicing = async {
            let ended = handshake(&mut near, &mut far, &hello, Some("ok.test"), &traffic).await;
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
        assert!(matches!(ended, Err(Unsettled::AnotherName)));
        assert!(seen.is_empty(), "{}", seen.escape_ascii());
        assert_eq!(traffic.up(), first.len() as u64);
    }
}
