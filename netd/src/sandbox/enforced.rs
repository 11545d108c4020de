//! What is in force for one sandbox: rules, pins, live flows. Pure: it decides and keeps the books, and
//! returns what must be told to the kernel and to the flows' tasks. Time comes from the caller.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{Arc, OnceLock},
};

use sandgate_policy::{DomainName, Flow, NormalPath, Protocol, Reason, RequestHead};
use tokio_util::sync::CancellationToken;

use super::{Decision, Judgement, Rules};
use crate::pins::{Pins, Seconds};

/// What is known about a TCP flow when it is judged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// The destination the sandbox chose.
    pub to: SocketAddr,
    /// The name read from the flow, when it was read.
    pub name: Option<DomainName>,
}

/// What address and port alone say about a flow.
#[derive(Debug, PartialEq, Eq)]
pub enum FirstLook {
    /// No.
    Refuse(Decision),
    /// Yes, unread.
    Opaque,
    /// It depends on the name.
    Sniff,
    /// Yes, and a name may say that its requests are to be read. Without one it goes unread.
    Glance,
    /// Yes, recorded as this denial by a tier in audit mode, unless the name says otherwise. All that is wrong with the
    /// flow is recorded, and nothing of it ends the flow.
    Audit(Decision),
}

/// One request as it is judged, and judged again when the rules change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestFacts {
    /// The method.
    pub method: String,
    /// The canonical path.
    pub path: NormalPath,
    /// It asks to go on as another protocol.
    pub upgrade: bool,
}

impl RequestFacts {
    /// The same, as the policy wants it.
    pub fn head(&self) -> RequestHead<'_> {
        RequestHead {
            method: &self.method,
            path: &self.path,
            upgrade: self.upgrade,
        }
    }
}

/// The string on which a flow's task hangs.
#[derive(Debug, Default)]
pub struct Cut {
    token: CancellationToken,
    reason: OnceLock<CutReason>,
}

/// Why a live flow was ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CutReason {
    /// New rules forbid it; this is their decision.
    Forbidden(Decision),
    /// The sandbox is gone.
    SandboxGone,
}

impl Cut {
    /// Waits for the cut.
    pub async fn cut(&self) -> CutReason {
        self.token.cancelled().await;
        self.reason.get().cloned().unwrap_or(CutReason::SandboxGone)
    }

    fn end(&self, reason: CutReason) {
        // The first reason stands.
        let _second = self.reason.set(reason);
        self.token.cancel();
    }
}

/// Which of the rules that a sandbox has had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Version(u64);

pub(super) struct Enforced {
    rules: Rules,
    version: Version,
    pins: Pins,
    live: HashMap<u64, Live>,
    next: u64,
    closed: bool,
}

struct Live {
    facts: Facts,
    /// The names under which the destination was pinned when the flow began: a pin that ends later does not
    /// end the flow.
    bound: Vec<DomainName>,
    /// Whether its requests are read and judged one by one.
    intercepted: bool,
    /// Those that are going on.
    requests: HashMap<u64, RequestFacts>,
    cut: Arc<Cut>,
}

pub(super) struct Entered {
    pub(super) flow: u64,
    pub(super) cut: Arc<Cut>,
    pub(super) judgement: Judgement,
}

pub(super) struct Replaced {
    pub(super) cut: Vec<u64>,
    pub(super) unbound: Vec<IpAddr>,
}

impl Enforced {
    pub(super) fn new(rules: Rules, pins: Pins) -> Self {
        Self {
            rules,
            version: Version(0),
            pins,
            live: HashMap::new(),
            next: 0,
            closed: false,
        }
    }

    pub(super) fn rules(&self) -> &Rules {
        &self.rules
    }

    /// Another one as soon as others are in force.
    pub(super) fn version(&self) -> Version {
        self.version
    }

    pub(super) fn rules_mut(&mut self) -> &mut Rules {
        &mut self.rules
    }

    pub(super) fn pins(&mut self) -> &mut Pins {
        &mut self.pins
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed
    }

    pub(super) fn first_look(&self, to: SocketAddr, now: Seconds) -> FirstLook {
        let bound = self.pins.names(to.ip(), now);
        let facts = Facts { to, name: None };
        let judgement = judge(&self.rules, &facts, &bound);
        match (judgement.decision.is_allowed(), judgement.needs_name) {
            (true, false) => FirstLook::Opaque,
            (true, true) if judgement.decision.is_audited() => FirstLook::Audit(judgement.decision),
            (true, true) => FirstLook::Glance,
            (false, true) => FirstLook::Sniff,
            (false, false) => FirstLook::Refuse(judgement.decision),
        }
    }

    pub(super) fn judge_packet(&self, udp: bool, to: SocketAddr) -> Decision {
        let protocol = if udp { Protocol::Udp } else { Protocol::Tcp };
        self.rules
            .judge(&Flow {
                protocol,
                to,
                name: None,
                names_bound: &[],
            })
            .decision
    }

    pub(super) fn admit(&mut self, facts: Facts, now: Seconds) -> Result<Entered, Decision> {
        if self.closed {
            return Err(Decision::of(Reason::UnknownSandbox));
        }
        let bound = self.pins.names(facts.to.ip(), now);
        let judgement = admissible(&self.rules, &facts, &bound)?;
        let flow = self.next;
        self.next += 1;
        let cut = Arc::new(Cut::default());
        self.pins.hold(facts.to.ip());
        self.live.insert(
            flow,
            Live {
                facts,
                bound,
                intercepted: judgement.intercept,
                requests: HashMap::new(),
                cut: Arc::clone(&cut),
            },
        );
        Ok(Entered { flow, cut, judgement })
    }

    /// Judges a request on a live flow and, if it is allowed, enters it into the books.
    pub(super) fn admit_request(
        &mut self,
        flow: u64,
        facts: RequestFacts,
    ) -> Result<(u64, Judgement), Decision> {
        let live = self.live.get_mut(&flow);
        let Some(live) = live.filter(|_| !self.closed) else {
            return Err(Decision::of(Reason::UnknownSandbox));
        };
        let judgement = judge_request(&self.rules, live, &facts);
        if !judgement.decision.is_allowed() {
            return Err(judgement.decision);
        }
        let request = self.next;
        self.next += 1;
        live.requests.insert(request, facts);
        Ok((request, judgement))
    }

    pub(super) fn leave_request(&mut self, flow: u64, request: u64) {
        if let Some(live) = self.live.get_mut(&flow) {
            live.requests.remove(&request);
        }
    }

    pub(super) fn leave(&mut self, flow: u64) {
        if let Some(ended) = self.live.remove(&flow) {
            self.pins.release(ended.facts.to.ip());
        }
    }

    pub(super) fn has_any(&self, flows: &[u64]) -> bool {
        flows.iter().any(|flow| self.live.contains_key(flow))
    }

    pub(super) fn replace(&mut self, rules: Rules, now: Seconds) -> Replaced {
        self.rules = rules;
        self.version.0 += 1;
        let rules = &self.rules;
        let unbound = self.pins.sweep(now, |name| rules.judge_name(name).is_allowed());
        let mut cut = Vec::new();
        for (flow, live) in &self.live {
            if let Some(decision) = forbidden(rules, live) {
                live.cut.end(CutReason::Forbidden(decision));
                cut.push(*flow);
            }
        }
        Replaced { cut, unbound }
    }

    pub(super) fn close(&mut self, reason: &CutReason) -> Vec<u64> {
        self.closed = true;
        for live in self.live.values() {
            live.cut.end(reason.clone());
        }
        self.live.keys().copied().collect()
    }

    pub(super) fn sweep_pins(&mut self, now: Seconds) -> Vec<IpAddr> {
        self.pins.sweep(now, |_| true)
    }
}

/// Whether a flow with these facts may be forwarded.
fn admissible(rules: &Rules, facts: &Facts, bound: &[DomainName]) -> Result<Judgement, Decision> {
    let judgement = judge(rules, facts, bound);
    if judgement.decision.is_allowed() {
        Ok(judgement)
    } else {
        Err(judgement.decision)
    }
}

/// Why a live flow may not go on: as a whole, because its requests would have to be read, or because of one
/// that is going on.
fn forbidden(rules: &Rules, live: &Live) -> Option<Decision> {
    let judgement = match admissible(rules, &live.facts, &live.bound) {
        Ok(judgement) => judgement,
        Err(decision) => return Some(decision),
    };
    if judgement.intercept && !live.intercepted {
        return Some(judgement.decision);
    }
    let decisions = live
        .requests
        .values()
        .map(|request| judge_request(rules, live, request).decision);
    decisions.into_iter().find(|decision| !decision.is_allowed())
}

fn judge(rules: &Rules, facts: &Facts, bound: &[DomainName]) -> Judgement {
    rules.judge(&flow(facts, bound))
}

fn judge_request(rules: &Rules, live: &Live, request: &RequestFacts) -> Judgement {
    rules.judge_request(&flow(&live.facts, &live.bound), &request.head())
}

fn flow<'a>(facts: &'a Facts, bound: &'a [DomainName]) -> Flow<'a> {
    Flow {
        protocol: Protocol::Tcp,
        to: facts.to,
        name: facts.name.as_ref(),
        names_bound: bound,
    }
}

#[cfg(test)]
mod tests {
    use sandgate_api::{
        feed::{PolicyTier, TierName},
        id::OrgId,
    };
    use sandgate_policy::{Platform, Policy};
    use serde_json::{Value, json};

    use super::*;
    use crate::intercept::bindings::Bindings;

    fn rules(policy: Value) -> Rules {
        let policy = Policy::parse(&policy).expect("a policy");
        let tiers = [PolicyTier {
            tier: TierName::Sandbox,
            policy: policy.into(),
        }];
        Rules::with(
            &Platform::new(Vec::new()),
            &tiers,
            Bindings::default(),
            0,
            OrgId::nobody(),
        )
        .expect("compiled")
    }

    fn allowing(names: &[&str]) -> Rules {
        rules(json!({ "mode": "allowlist", "allowed_domains": names }))
    }

    fn name(text: &str) -> DomainName {
        DomainName::parse(text).expect("a name")
    }

    fn to(port: u16) -> SocketAddr {
        SocketAddr::from(([203, 0, 113, 10], port))
    }

    fn facts(text: &str) -> Facts {
        Facts {
            to: to(443),
            name: Some(name(text)),
        }
    }

    fn pinned(rules: Rules, names: &[&str]) -> Enforced {
        let mut enforced = Enforced::new(rules, Pins::default());
        for text in names {
            enforced.pins().pin(&name(text), to(443).ip(), 0);
        }
        enforced
    }

    #[test]
    fn a_name_counts_only_with_an_address_pinned_for_it() {
        let mut enforced = pinned(allowing(&["ok.test", "api.test"]), &["ok.test"]);
        assert_eq!(enforced.first_look(to(443), 1), FirstLook::Sniff);
        assert!(enforced.admit(facts("ok.test"), 1).is_ok());
        let refused = enforced
            .admit(facts("api.test"), 1)
            .err()
            .map(|decision| decision.reason);
        assert_eq!(refused, Some(Reason::AddressNotBound));
        let refused = enforced
            .admit(facts("evil.test"), 1)
            .err()
            .map(|decision| decision.reason);
        assert!(refused.is_some_and(|reason| reason != Reason::Allowed));
        let unread = Facts {
            to: to(443),
            name: None,
        };
        assert!(enforced.admit(unread, 1).is_err());
    }

    #[test]
    fn another_port_or_an_unpinned_address_is_refused_unread() {
        let enforced = pinned(allowing(&["ok.test"]), &["ok.test"]);
        assert!(matches!(enforced.first_look(to(22), 1), FirstLook::Refuse(_)));
        let elsewhere = SocketAddr::from(([203, 0, 113, 66], 443));
        let FirstLook::Refuse(decision) = enforced.first_look(elsewhere, 1) else {
            panic!("not refused")
        };
        assert_eq!(decision.reason, Reason::AddressNotBound);
    }

    #[tokio::test]
    async fn new_rules_cut_exactly_the_flows_they_forbid() {
        let mut enforced = pinned(allowing(&["ok.test", "api.test"]), &["ok.test", "api.test"]);
        let kept = enforced.admit(facts("ok.test"), 1).expect("admitted");
        let Entered { flow: goes, cut, .. } = enforced.admit(facts("api.test"), 1).expect("admitted");
        let replaced = enforced.replace(allowing(&["ok.test"]), 2);
        assert_eq!(replaced.cut, [goes]);
        assert!(replaced.unbound.is_empty(), "the address still has a name");
        assert!(matches!(cut.cut().await, CutReason::Forbidden(_)));
        assert!(!kept.cut.token.is_cancelled());
        assert!(enforced.has_any(&[goes]));
        enforced.leave(goes);
        assert!(!enforced.has_any(&replaced.cut));
        assert!(enforced.has_any(&[kept.flow]));
    }

    #[test]
    fn names_that_are_no_longer_allowed_lose_their_pins() {
        let mut enforced = pinned(allowing(&["ok.test"]), &["ok.test"]);
        let replaced = enforced.replace(allowing(&["api.test"]), 1);
        assert_eq!(replaced.unbound, [to(443).ip()]);
        enforced.replace(allowing(&["ok.test"]), 1);
        assert!(enforced.admit(facts("ok.test"), 1).is_err());
    }

    #[test]
    fn a_flow_outlives_its_pin() {
        let mut enforced = pinned(allowing(&["ok.test"]), &["ok.test"]);
        enforced.admit(facts("ok.test"), 1).expect("admitted");
        let day_after = 2 * crate::pins::PIN_LIFETIME.as_secs();
        enforced.sweep_pins(day_after);
        assert!(
            enforced
                .replace(allowing(&["ok.test", "api.test"]), day_after)
                .cut
                .is_empty()
        );
    }

    #[test]
    fn nothing_is_admitted_after_the_end() {
        let mut enforced = pinned(allowing(&["ok.test"]), &["ok.test"]);
        let Entered { flow, cut, .. } = enforced.admit(facts("ok.test"), 1).expect("admitted");
        assert_eq!(enforced.close(&CutReason::SandboxGone), [flow]);
        assert!(cut.token.is_cancelled());
        assert!(enforced.admit(facts("ok.test"), 1).is_err());
    }

    #[test]
    fn without_a_policy_web_traffic_goes_and_the_rest_does_not() {
        let rules = Rules::with(
            &Platform::new(Vec::new()),
            &[],
            Bindings::default(),
            0,
            OrgId::nobody(),
        )
        .expect("compiled");
        let enforced = Enforced::new(rules, Pins::default());
        assert_eq!(enforced.first_look(to(443), 1), FirstLook::Opaque);
        assert!(matches!(enforced.first_look(to(22), 1), FirstLook::Refuse(_)));
    }

    #[test]
    fn the_rules_of_a_sandbox_that_cannot_be_enforced_allow_nothing() {
        let rules = Rules::nothing(&Platform::new(Vec::new()), OrgId::nobody()).expect("compiled");
        assert!(!rules.judge_name(&name("ok.test")).is_allowed());
        let enforced = Enforced::new(rules, Pins::default());
        assert!(matches!(enforced.first_look(to(443), 1), FirstLook::Refuse(_)));
    }

    #[test]
    fn a_request_that_new_rules_forbid_ends_its_flow() {
        let listing = |paths: &[&str]| {
            rules(json!({ "mode": "allowlist", "rules": [{
                "name": "read", "action": "allow", "domains": ["ok.test"], "ports": ["443"],
                "http": [{ "methods": ["GET"], "paths": paths }] }] }))
        };
        let request = |path: &str| RequestFacts {
            method: "GET".to_owned(),
            path: NormalPath::parse(path).expect("a path").0,
            upgrade: false,
        };
        let mut enforced = pinned(listing(&["/a", "/b"]), &["ok.test"]);
        let entered = enforced.admit(facts("ok.test"), 1).expect("admitted");
        assert!(entered.judgement.intercept);
        let refused = enforced.admit_request(entered.flow, request("/c"));
        assert_eq!(refused.expect_err("judged").reason, Reason::PathDenied);
        let (going, _) = enforced
            .admit_request(entered.flow, request("/b"))
            .expect("admitted");
        let (_, judgement) = enforced
            .admit_request(entered.flow, request("/a"))
            .expect("admitted");
        assert!(judgement.decision.is_allowed());
        assert!(enforced.replace(listing(&["/a", "/b", "/c"]), 2).cut.is_empty());
        assert_eq!(enforced.replace(listing(&["/a"]), 2).cut, [entered.flow]);
        enforced.leave_request(entered.flow, going);
    }

    #[test]
    fn a_flow_that_is_not_read_ends_when_it_must_be() {
        let mut enforced = pinned(allowing(&["ok.test"]), &["ok.test"]);
        let entered = enforced.admit(facts("ok.test"), 1).expect("admitted");
        assert!(!entered.judgement.intercept);
        let reading = json!({ "mode": "allowlist", "rules": [{
            "name": "read", "action": "allow", "domains": ["ok.test"], "ports": ["443"], "tls": "intercept" }] });
        assert_eq!(enforced.replace(rules(reading), 2).cut, [entered.flow]);
    }
}
