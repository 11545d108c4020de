//! The sandboxes' resolver. Owns: which question is answered how. A name that the rules cannot allow is
//! refused here and never asked for upstream; an address leaves here only after it was pinned for the
//! sandbox and its name, so that the kernel and the proxy know it before the sandbox does.

pub mod message;
mod serve;
pub mod upstream;

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Instant,
};

use hickory_proto::op::ResponseCode;
use ipnet::Ipv4Net;
use sandgate_api::rest::DOCTOR_HOST;
use sandgate_daemon::tasks::Tasks;
use sandgate_policy::{DomainName, Platform, Reason};

use self::{
    message::{Answer, Asked, Question, Received, Resolved, Upstream},
    upstream::Servers,
};
use crate::{
    audit::{Attempt, Audit, Owner},
    metrics::{Metrics, QueryEnd},
    nodeaddr::NodeAddresses,
    router::GATEWAY,
    sandbox::{Decision, PinError, Sandbox, Sandboxes},
};

/// How long the self-test host's address may be kept, in seconds.
const SELF_TEST_TTL: u32 = 5;

/// Everything an answer needs.
pub struct Resolver {
    /// Who asks.
    pub sandboxes: Arc<Sandboxes>,
    /// Where refusals are recorded.
    pub audit: Arc<Audit>,
    /// Where questions are counted.
    pub metrics: Metrics,
    /// Who knows.
    pub servers: Servers,
    /// What nobody may learn.
    pub platform: Arc<Platform>,
    /// The same.
    pub node: NodeAddresses,
    /// The same.
    pub sandbox_cidr: Ipv4Net,
    /// Where questions are worked on.
    pub tasks: Tasks,
}

/// What to send back.
enum Reply {
    /// This, cut to the transport's size.
    Answer { answer: Answer, payload: u16 },
    /// These bytes.
    Plain(Vec<u8>),
    /// Nothing.
    Silence,
}

impl Resolver {
    /// Answers one packet of a sandbox.
    async fn reply(&self, sandbox: &Sandbox, packet: &[u8]) -> Reply {
        let question = match message::read(packet) {
            Received::Question(question) => question,
            Received::Improper(answer, code) => {
                self.metrics.asked(QueryEnd::Malformed);
                self.record(
                    sandbox,
                    None,
                    Decision::of(Reason::DnsRefused),
                    Some(code.to_str().to_owned()),
                );
                return Reply::Plain(answer);
            }
            Received::Nothing => return Reply::Silence,
        };
        let payload = question.payload;
        let (answer, end) = self.answer(sandbox, &question).await;
        self.metrics.asked(end);
        Reply::Answer { answer, payload }
    }

    /// What a sandbox gets that has too many questions open: an answer that costs nothing.
    fn over_limit(&self, sandbox: &Sandbox, packet: &[u8]) -> Reply {
        match message::read(packet) {
            Received::Question(question) => {
                self.metrics.asked(QueryEnd::Limited);
                let detail = Some("too many questions at once".to_owned());
                self.record(sandbox, None, Decision::of(Reason::Quota), detail);
                Reply::Answer {
                    answer: question.answer(ResponseCode::Refused),
                    payload: question.payload,
                }
            }
            Received::Improper(answer, _) => {
                self.metrics.asked(QueryEnd::Malformed);
                Reply::Plain(answer)
            }
            Received::Nothing => Reply::Silence,
        }
    }

    async fn answer(&self, sandbox: &Sandbox, question: &Question) -> (Answer, QueryEnd) {
        let refuse = |decision: Decision, detail: Option<String>| {
            self.record(sandbox, Some(question.display_name()), decision, detail);
            question.answer(ResponseCode::Refused)
        };
        if let Asked::Other(kind) = question.asked() {
            let refused = refuse(Decision::of(Reason::DnsType), Some(format!("type {kind}")));
            return (refused, QueryEnd::Type);
        }
        let Some(name) = question.name() else {
            let refused = refuse(
                Decision::of(Reason::DnsRefused),
                Some("not a host name".to_owned()),
            );
            return (refused, QueryEnd::Refused);
        };
        if is_ours(&name) {
            let end = if question.asked() == Asked::Withheld {
                QueryEnd::Empty
            } else {
                QueryEnd::Answered
            };
            return (answer_ours(question), end);
        }
        let decision = sandbox.judge_name(&name);
        if !decision.is_allowed() {
            return (
                refuse(decision.because(Reason::DnsRefused), None),
                QueryEnd::Refused,
            );
        }
        if question.asked() == Asked::Withheld {
            return (question.answer(ResponseCode::NoError), QueryEnd::Empty);
        }
        let clock = Instant::now();
        let upstream = self.servers.resolve(&name).await;
        self.metrics.resolved(clock.elapsed());
        let failed = || (question.answer(ResponseCode::ServFail), QueryEnd::Failed);
        let resolved = match upstream {
            Ok(Upstream::Exists(resolved)) => resolved,
            Ok(Upstream::NoSuchName(_)) => {
                return (question.answer(ResponseCode::NXDomain), QueryEnd::NoSuchName);
            }
            Ok(Upstream::Truncated) => return failed(),
            Err(error) => {
                tracing::warn!(sandbox_id = %sandbox.id, %error, "cannot resolve a name");
                return failed();
            }
        };
        let kept: Vec<Ipv4Addr> = self.public(&resolved);
        if kept.is_empty() && !resolved.addresses.is_empty() {
            let stripped = resolved.addresses.len();
            let detail = Some(format!("{stripped} addresses that no sandbox may reach"));
            self.record(
                sandbox,
                Some(question.display_name()),
                Decision::of(Reason::DnsRebinding),
                detail,
            );
            return (question.answer(ResponseCode::NXDomain), QueryEnd::Rebinding);
        }
        match sandbox.pin(&name, &kept) {
            Ok(()) if kept.is_empty() => (question.resolved(&resolved, &kept), QueryEnd::Empty),
            Ok(()) => (question.resolved(&resolved, &kept), QueryEnd::Answered),
            Err(PinError::NotAllowed(decision)) => (
                refuse(decision.because(Reason::DnsRefused), None),
                QueryEnd::Refused,
            ),
            Err(error @ (PinError::Kernel(_) | PinError::Log(_))) => {
                tracing::error!(sandbox_id = %sandbox.id, %error, "cannot pin an answer");
                failed()
            }
        }
    }

    /// The addresses that a sandbox may learn.
    fn public(&self, resolved: &Resolved) -> Vec<Ipv4Addr> {
        let may = |address: &Ipv4Addr| {
            !self.node.contains(*address)
                && !self.sandbox_cidr.contains(address)
                && opens_any_port(&self.platform, *address)
        };
        resolved
            .addresses
            .iter()
            .map(|(address, _)| *address)
            .filter(may)
            .collect()
    }

    fn record(&self, sandbox: &Sandbox, host: Option<String>, decision: Decision, detail: Option<String>) {
        let attempt = Attempt {
            protocol: "dns",
            host,
            detail,
            ..Attempt::default()
        };
        self.audit.deny(&Owner::of(sandbox), &decision, attempt, 1);
    }
}

/// Whether it is the name of the self-test host ([`crate::egress`] has it), which is netd's alone: no policy is
/// asked, no pin is needed, and no upstream ever hears of it.
fn is_ours(name: &DomainName) -> bool {
    name.as_str() == DOCTOR_HOST
}

fn answer_ours(question: &Question) -> Answer {
    if question.asked() == Asked::Withheld {
        return question.answer(ResponseCode::NoError);
    }
    question.resolved(&Resolved::address(GATEWAY, SELF_TEST_TTL), &[GATEWAY])
}

/// Whether some port of the address may be reached as far as the platform is concerned.
fn opens_any_port(platform: &Platform, address: Ipv4Addr) -> bool {
    let address = IpAddr::V4(address);
    let ports = platform
        .exceptions()
        .iter()
        .filter(|exception| exception.network().contains(&address));
    let mut ports = ports.map(|exception| exception.port().unwrap_or(443));
    !platform.denies(SocketAddr::new(address, 443))
        || ports.any(|port| !platform.denies(SocketAddr::new(address, port)))
}

#[cfg(test)]
mod tests {
    use hickory_proto::{
        op::{Message, MessageType, OpCode, Query},
        rr::{Name, RData, RecordType},
    };
    use sandgate_policy::PrivateException;

    use super::*;

    fn asked(name: &str, kind: RecordType) -> Question {
        let mut message = Message::new(7, MessageType::Query, OpCode::Query);
        message.add_query(Query::query(Name::from_ascii(name).expect("a name"), kind));
        match message::read(&message.to_vec().expect("written")) {
            Received::Question(question) => question,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_self_test_host_is_the_gateway_and_nothing_else_is() {
        for (name, ours) in [
            ("doctor.sandgate.internal.", true),
            ("DOCTOR.Sandgate.internal.", true),
            ("x.doctor.sandgate.internal.", false),
            ("sandgate.internal.", false),
            ("doctor.sandgate.internal.evil.test.", false),
        ] {
            let name = asked(name, RecordType::A).name().expect("a name");
            assert_eq!(is_ours(&name), ours, "{name:?}");
        }
        for (kind, addresses) in [
            (RecordType::A, &[GATEWAY][..]),
            (RecordType::AAAA, &[]),
            (RecordType::HTTPS, &[]),
        ] {
            let bytes = answer_ours(&asked("doctor.sandgate.internal.", kind)).encode(512);
            let answer = Message::from_vec(&bytes.expect("written")).expect("an answer");
            assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
            let given: Vec<Ipv4Addr> = answer
                .answers
                .iter()
                .map(|record| {
                    assert_eq!(record.ttl, SELF_TEST_TTL);
                    match &record.data {
                        RData::A(address) => address.0,
                        other => panic!("{other:?}"),
                    }
                })
                .collect();
            assert_eq!(given, addresses, "{kind}");
        }
    }

    #[test]
    fn a_private_address_may_be_learnt_only_where_the_operator_opened_it() {
        let exceptions = PrivateException::parse_list("10.0.0.5/32:8443,10.1.0.0/16:*").expect("exceptions");
        let platform = Platform::new(exceptions);
        for (address, may) in [
            ([203, 0, 113, 10], true),
            ([10, 0, 0, 5], true),
            ([10, 1, 2, 3], true),
            ([10, 0, 0, 6], false),
            ([127, 0, 0, 1], false),
            ([169, 254, 169, 254], false),
            ([0, 0, 0, 0], false),
        ] {
            assert_eq!(
                opens_any_port(&platform, Ipv4Addr::from(address)),
                may,
                "{address:?}"
            );
        }
    }
}
