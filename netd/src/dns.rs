//! The sandboxes' resolver. Owns: which question is answered how. A name that the rules cannot allow is
//! refused here and never asked for upstream; an address leaves here only after it was pinned for the
//! sandbox and its name, so that the kernel and the proxy know it before the sandbox does.
//!
//! A question goes through: its form ([`message`]), its type, its name, what the sandbox may still say by asking
//! ([`budget`]), what is known already ([`cache`]), the upstream ([`upstream`], read by [`found`]), what it may learn
//! ([`filter`]), the pins. All but the upstream is done at once, without waiting; how much of it one sandbox may cause by
//! large answers is bounded ([`load`]).

pub mod budget;
pub mod cache;
mod datagrams;
pub mod filter;
pub mod found;
pub mod load;
pub mod message;
mod plain;
mod serve;
pub mod upstream;

use std::{
    collections::HashSet,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use hickory_proto::op::ResponseCode;
use sandgate_api::rest::DOCTOR_HOST;
use sandgate_daemon::tasks::Tasks;
use sandgate_policy::{DnsBudget, DnsType, DomainName, Reason};

use self::{
    budget::{OverBudget, Report},
    cache::{Cache, Known, Turn},
    filter::Filter,
    found::Found,
    message::{Answer, Asked, Question, Received},
};
use crate::{
    audit::{Attempt, Audit, Owner},
    metrics::{Metrics, QueryEnd},
    router::GATEWAY,
    sandbox::{Decision, PinError, Sandbox, Sandboxes, Version},
};

/// How long the self-test host's address may be kept.
const SELF_TEST_TTL: Duration = Duration::from_secs(5);
/// How often what is over is forgotten, and told.
const SWEEP: Duration = Duration::from_secs(15);

/// Everything an answer needs.
pub struct Resolver {
    /// Who asks.
    pub sandboxes: Arc<Sandboxes>,
    /// Where refusals are recorded.
    pub audit: Arc<Audit>,
    /// Where questions are counted.
    pub metrics: Metrics,
    /// What is known, and who knows the rest.
    pub cache: Arc<Cache>,
    /// What nobody may learn.
    pub filter: Filter,
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

/// What becomes of a question.
enum Step {
    /// This is the answer.
    Done(Reply),
    /// The upstream is being asked.
    Wait(Waiting),
}

/// A question that waits for the upstream.
struct Waiting {
    question: Question,
    name: DomainName,
    turn: Turn,
}

/// An answer, or what there is to ask upstream.
type Answered = Result<(Answer, QueryEnd), (DomainName, Turn)>;

impl Waiting {
    /// The same, asked upstream by a task of its own, so that whoever waits may go away.
    fn apart(mut self) -> Self {
        self.turn = Turn::Wait(self.turn.apart());
        self
    }
}

impl Resolver {
    /// Answers one packet of a sandbox, as far as that can be done without waiting.
    fn begin(&self, sandbox: &Sandbox, packet: &[u8]) -> Step {
        let question = match message::read(packet) {
            Received::Question(question) => question,
            Received::Improper(answer, code) => {
                self.metrics.asked(QueryEnd::Malformed);
                let detail = Some(code.to_str().to_owned());
                self.record(sandbox, None, Decision::of(Reason::DnsRefused), detail);
                return Step::Done(Reply::Plain(answer));
            }
            Received::Nothing => return Step::Done(Reply::Silence),
        };
        match self.answer(sandbox, &question) {
            Ok(answered) => Step::Done(self.reply(&question, answered)),
            Err((name, turn)) => Step::Wait(Waiting { question, name, turn }),
        }
    }

    /// Answers the rest of them.
    async fn finish(&self, sandbox: &Sandbox, waiting: Waiting) -> Reply {
        let Waiting { question, name, turn } = waiting;
        let answered = match turn.found().await {
            // The rules may be others by now.
            Some(found) => self.give(sandbox, &question, (&name, None), &found, found.ttl),
            None => (question.answer(ResponseCode::ServFail), QueryEnd::Failed),
        };
        self.reply(&question, answered)
    }

    fn reply(&self, question: &Question, (answer, end): (Answer, QueryEnd)) -> Reply {
        self.metrics.asked(end);
        let payload = question.payload;
        Reply::Answer { answer, payload }
    }

    /// What a sandbox gets that has too many questions open: an answer that costs nothing.
    fn over_limit(&self, sandbox: &Sandbox, packet: &[u8]) -> Reply {
        match message::read(packet) {
            Received::Question(question) => self.reply(&question, self.too_many(sandbox, &question)),
            Received::Improper(answer, _) => {
                self.metrics.asked(QueryEnd::Malformed);
                Reply::Plain(answer)
            }
            Received::Nothing => Reply::Silence,
        }
    }

    fn too_many(&self, sandbox: &Sandbox, question: &Question) -> (Answer, QueryEnd) {
        self.limit(sandbox, question, "too many questions at once")
    }

    /// The record names no host: one stands for all of a second.
    fn limit(&self, sandbox: &Sandbox, question: &Question, what: &str) -> (Answer, QueryEnd) {
        self.record(sandbox, None, Decision::of(Reason::Quota), Some(what.to_owned()));
        (question.answer(ResponseCode::Refused), QueryEnd::Limited)
    }

    fn refuse(
        &self,
        sandbox: &Sandbox,
        question: &Question,
        decision: Decision,
        detail: Option<String>,
    ) -> (Answer, QueryEnd) {
        let end = if decision.reason == Reason::DnsType {
            QueryEnd::Type
        } else {
            QueryEnd::Refused
        };
        self.record(sandbox, Some(question.display_name()), decision, detail);
        (question.answer(ResponseCode::Refused), end)
    }

    fn answer(&self, sandbox: &Sandbox, question: &Question) -> Answered {
        let wrong_type = |kind: &dyn std::fmt::Display| {
            let detail = Some(format!("type {kind}"));
            Ok(self.refuse(sandbox, question, Decision::of(Reason::DnsType), detail))
        };
        let asked = question.asked();
        if let Asked::Other(kind) = asked {
            return wrong_type(&kind);
        }
        let Some(name) = question.name() else {
            let detail = Some("not a host name".to_owned());
            return Ok(self.refuse(sandbox, question, Decision::of(Reason::DnsRefused), detail));
        };
        if is_ours(&name) {
            return Ok(answer_ours(question));
        }
        let say = sandbox.ask_name(&name);
        if !say.decision.is_allowed() {
            let decision = say.decision.because(Reason::DnsRefused);
            return Ok(self.refuse(sandbox, question, decision, None));
        }
        if say.decision.is_audited() {
            let decision = say.decision.clone().because(Reason::DnsRefused);
            self.record(sandbox, Some(question.display_name()), decision, None);
        }
        let empty = || Ok((question.answer(ResponseCode::NoError), QueryEnd::Empty));
        let kind = match asked {
            // Every client asks for these beside A, and what is refused to it may make it give up.
            Asked::Withheld => return empty(),
            Asked::Records(DnsType::Aaaa)
                if !sandbox.has_ipv6() || !say.dns.types.contains(DnsType::Aaaa) =>
            {
                return empty();
            }
            Asked::Records(kind) if say.dns.types.contains(kind) => kind,
            Asked::Records(kind) => return wrong_type(&kind.as_str()),
            Asked::Other(kind) => return wrong_type(&kind),
        };
        let now = Instant::now();
        let over = |spent: Result<(), OverBudget>| {
            let Err(OverBudget(report)) = spent else {
                return None;
            };
            self.tell(sandbox, &say.dns, report, true);
            Some((question.answer(ResponseCode::Refused), QueryEnd::Budget))
        };
        let noted = |limits: &DnsBudget, spent: Result<(), OverBudget>| {
            if let Err(OverBudget(report)) = spent {
                self.tell(sandbox, limits, report, false);
            }
        };
        let spent = sandbox.dns_budget().name(&say.dns, &name, now);
        if let Some(refused) = over(spent) {
            return Ok(refused);
        }
        if let Some(limits) = &say.dns_audited {
            // An address of the other family would be answered empty, which nobody is told either.
            if kind != DnsType::Aaaa && !limits.types.contains(kind) {
                let decision = sandbox
                    .judge_dns(|tier| (!tier.types.contains(kind)).then_some(Reason::DnsType))
                    .audited();
                let detail = Some(format!("type {}", kind.as_str()));
                self.record(sandbox, Some(question.display_name()), decision, detail);
            }
            let spent = sandbox.dns_audited().name(limits, &name, now);
            noted(limits, spent);
        }
        let key = (name, kind);
        match self.cache.look(&say.org_id, &key, now) {
            Known::Answer(found, left) => {
                let judged = Some(say.rules);
                Ok(self.give(sandbox, question, (&key.0, judged), &found, left))
            }
            Known::Soon(soon) => Err((key.0, Turn::Wait(soon))),
            Known::Nothing => {
                let spent = sandbox.dns_budget().bytes(&say.dns, &key.0, now);
                if let Some(refused) = over(spent) {
                    return Ok(refused);
                }
                if let Some(limits) = &say.dns_audited {
                    let spent = sandbox.dns_audited().bytes(limits, &key.0, now);
                    noted(limits, spent);
                }
                match self.cache.ask(&say.org_id, key.clone()) {
                    Some(turn) => Err((key.0, turn)),
                    None => Ok(self.too_many(sandbox, question)),
                }
            }
        }
    }

    /// The answer that `found` is for this sandbox, pinned for it. It may be kept for `ttl`. The name was allowed by the
    /// rules of the version, if one is given.
    fn give(
        &self,
        sandbox: &Sandbox,
        question: &Question,
        (name, judged): (&DomainName, Option<Version>),
        found: &Found,
        ttl: Duration,
    ) -> (Answer, QueryEnd) {
        if !sandbox.dns_load().give(found.records.len(), Instant::now()) {
            return self.limit(sandbox, question, "too many addresses in a short time");
        }
        let kept: Vec<IpAddr> = found
            .addresses()
            .filter(|address| self.filter.lets_pass(*address))
            .collect();
        let stripped = found.addresses().count() - kept.len();
        if stripped > 0 && kept.is_empty() {
            let detail = Some(format!("{stripped} addresses that no sandbox may reach"));
            let decision = Decision::of(Reason::DnsRebinding);
            self.record(sandbox, Some(question.display_name()), decision, detail);
            return (question.answer(ResponseCode::NXDomain), QueryEnd::Rebinding);
        }
        match sandbox.pin(name, judged, &kept) {
            Ok(pinned) => sandbox.dns_load().pinned(pinned),
            Err(PinError::NotAllowed(decision)) => {
                return self.refuse(sandbox, question, decision.because(Reason::DnsRefused), None);
            }
            Err(error @ (PinError::Kernel(_) | PinError::Log(_))) => {
                sandbox.dns_load().pinned(kept.len());
                tracing::error!(sandbox_id = %sandbox.id, %error, "cannot pin an answer");
                return (question.answer(ResponseCode::ServFail), QueryEnd::Failed);
            }
        }
        let end = match (found.exists, found.records.is_empty()) {
            (false, _) => QueryEnd::NoSuchName,
            (true, true) => QueryEnd::Empty,
            (true, false) => QueryEnd::Answered,
        };
        // Asked for each of hundreds.
        let kept: HashSet<IpAddr> = if stripped == 0 {
            HashSet::new()
        } else {
            kept.into_iter().collect()
        };
        let answer = question.found(found, ttl, |data| {
            stripped == 0 || found::address(data).is_none_or(|address| kept.contains(&address))
        });
        (answer, end)
    }

    fn record(&self, sandbox: &Sandbox, host: Option<String>, decision: Decision, detail: Option<String>) {
        self.record_many(sandbox, host, decision, detail, 1);
    }

    fn record_many(
        &self,
        sandbox: &Sandbox,
        host: Option<String>,
        decision: Decision,
        detail: Option<String>,
        count: u64,
    ) {
        let attempt = Attempt {
            protocol: "dns",
            host,
            detail,
            ..Attempt::default()
        };
        self.audit.deny(&Owner::of(sandbox), &decision, attempt, count);
    }

    /// Records what was beyond `limits`: one record for a zone and window, which counts what no record told yet.
    /// `enforced`: it was refused; else it was answered, and only tiers in audit mode deny it.
    fn tell(&self, sandbox: &Sandbox, limits: &DnsBudget, report: Option<Report>, enforced: bool) {
        let Some(Report { zone, last, count }) = report else {
            return;
        };
        let zone = if zone.is_empty() { "several zones" } else { &zone };
        let beyond = if enforced { "refused" } else { "beyond it" };
        let detail = format!("{}; {count} {beyond} under {zone}", last.limit.describe(limits));
        let judged = sandbox.judge_dns(|tier| last.limit.is_of(limits, tier).then_some(Reason::DnsBudget));
        let decision = Decision {
            enforced,
            ..judged.because(Reason::DnsBudget)
        };
        self.record_many(sandbox, Some(last.name), decision, Some(detail), count);
    }

    /// Forgets what is over, and tells what was not told yet, until netd ends.
    pub async fn keep_tidy(self: Arc<Self>) {
        let end = self.tasks.shutdown();
        loop {
            tokio::select! {
                () = tokio::time::sleep(SWEEP) => {}
                () = end.cancelled() => return,
            }
            let now = Instant::now();
            self.cache.sweep(now);
            for sandbox in self.sandboxes.all() {
                let refused = sandbox.dns_budget().sweep(now);
                let noted = sandbox.dns_audited().sweep(now);
                if refused.is_empty() && noted.is_empty() {
                    continue;
                }
                let (limits, audited) = sandbox.dns_limits();
                for report in refused {
                    self.tell(&sandbox, &limits, Some(report), true);
                }
                if let Some(limits) = audited {
                    for report in noted {
                        self.tell(&sandbox, &limits, Some(report), false);
                    }
                }
            }
        }
    }
}

/// Whether it is the name of the self-test host ([`crate::egress`] has it), which is netd's alone: no policy is
/// asked, no pin is needed, and no upstream ever hears of it.
fn is_ours(name: &DomainName) -> bool {
    name.as_str() == DOCTOR_HOST
}

fn answer_ours(question: &Question) -> (Answer, QueryEnd) {
    if question.asked() != Asked::Records(DnsType::A) {
        return (question.answer(ResponseCode::NoError), QueryEnd::Empty);
    }
    let found = Found::addresses_of([IpAddr::V4(GATEWAY)], SELF_TEST_TTL);
    (
        question.found(&found, SELF_TEST_TTL, |_| true),
        QueryEnd::Answered,
    )
}

#[cfg(test)]
mod tests {
    use hickory_proto::{
        op::{Message, MessageType, OpCode, Query},
        rr::{Name, RecordType},
    };

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
            (RecordType::A, &[IpAddr::V4(GATEWAY)][..]),
            (RecordType::AAAA, &[]),
            (RecordType::HTTPS, &[]),
            (RecordType::TXT, &[]),
        ] {
            let (answer, _) = answer_ours(&asked("doctor.sandgate.internal.", kind));
            let bytes = answer.encode(512);
            let answer = Message::from_vec(&bytes.expect("written")).expect("an answer");
            assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
            let given: Vec<IpAddr> = answer
                .answers
                .iter()
                .map(|record| {
                    assert_eq!(u64::from(record.ttl), SELF_TEST_TTL.as_secs());
                    found::address(&record.data).expect("an address")
                })
                .collect();
            assert_eq!(given, addresses, "{kind}");
        }
    }
}
