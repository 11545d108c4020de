//! What a flow says of itself: its beginning, read as far as the rules need it. Nothing is taken from it that does not go
//! on.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use sandgate_policy::{DomainName, Reason};
use sandgate_relay::http1::head::{Head, Host};
use tokio::{io::Interest, net::TcpStream};

use super::Entry;
use crate::{
    audit::Attempt,
    egress::{
        Egress,
        hello::Hides,
        sniff::{self, Beginning, Spoken},
    },
    intercept::inject::is_marked_in_clear,
    sandbox::{Decision, FirstLook},
};

/// How long an opaque flow is watched for a name, for its record only.
const WATCH: Duration = Duration::from_secs(5);
const WATCH_BYTES: usize = 4096;

/// What a flow says of itself.
pub(super) struct Said {
    pub(super) protocol: &'static str,
    pub(super) host: Option<String>,
    pub(super) name: Option<DomainName>,
    pub(super) detail: Option<String>,
    /// What is wrong with it, where nothing of that ends it.
    pub(super) fault: Option<Box<Decision>>,
}

impl Said {
    pub(super) fn nothing() -> Self {
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

    pub(super) fn attempt(&self, to: SocketAddr) -> Attempt {
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
pub(super) enum Manner {
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
pub(super) struct Hello {
    pub(super) received: Vec<u8>,
    /// How many of these bytes are the ClientHello's.
    pub(super) length: usize,
}

impl Egress {
    /// Reads the flow's beginning where the rules need it.
    pub(super) async fn read(
        &self,
        entry: &Entry,
        near: &mut TcpStream,
    ) -> Result<(Said, Manner), (Said, Decision)> {
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
}

/// Looks, without taking anything, whether the beginning of an opaque flow names a host. For the record
/// only: the flow is allowed whatever it says.
pub(super) async fn observe(near: &TcpStream, far: &TcpStream, said: &mut Said) {
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
pub(in crate::egress) fn mismatch(host: &Host, to: SocketAddr) -> Option<&'static str> {
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
    use super::*;

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
