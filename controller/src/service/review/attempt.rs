//! An attempt that the audit tells of, as the decision function takes it.

use std::net::{IpAddr, SocketAddr};

use sandgate_api::{
    audit::AuditEvent,
    feed::TierName,
    rest::{AuditDecision, ReplayedAttempt},
};
use sandgate_policy::{
    DomainName, Flow, NormalPath, Platform, Policy, PolicyError, Protocol, Quota, Reason, RequestHead,
    SandboxPolicy, Verdict,
};

use super::words::tier_word;

/// What policies decide of a record.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Attempt {
    /// A question for a name.
    Name(DomainName),
    /// A connection, or a datagram.
    Flow(Target),
    /// One request on a connection that is read.
    Request {
        to: Target,
        method: String,
        path: NormalPath,
    },
}

/// Where a flow goes.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Target {
    pub(super) protocol: Protocol,
    pub(super) to: SocketAddr,
    /// The name that it shows.
    pub(super) name: Option<DomainName>,
    /// The name under which the sandbox had the address from DNS. What is forwarded unread shows no other.
    pub(super) bound: Option<DomainName>,
}

/// The tiers that govern a sandbox, the one of highest precedence first.
#[derive(Debug, Clone)]
pub(super) struct Tiers(Vec<(TierName, Policy)>);

/// The tiers, ready to decide.
pub(super) struct Judge {
    policy: SandboxPolicy,
    names: Vec<TierName>,
}

impl Attempt {
    /// None where the record is of something that no policy decides: malformed or unreachable, out of a quota, or a
    /// protocol that nobody may use.
    pub(super) fn of(event: &AuditEvent) -> Option<Self> {
        if !is_judged(event.reason) {
            return None;
        }
        let name = event
            .host
            .as_deref()
            .and_then(|host| DomainName::parse(host).ok());
        let (protocol, is_read) = match event.protocol.as_str() {
            "dns" => return name.map(Self::Name),
            "tls" | "http" | "https" => (Protocol::Tcp, true),
            "tcp" => (Protocol::Tcp, false),
            "udp" => (Protocol::Udp, false),
            _ => return None,
        };
        // A name that cannot be read is not the same as none. An address in its place is.
        if name.is_none()
            && event
                .host
                .as_deref()
                .is_some_and(|host| host.parse::<IpAddr>().is_err())
        {
            return None;
        }
        let to = Target {
            protocol,
            to: SocketAddr::new(event.ip?, event.port?),
            bound: name.clone().filter(|_| event.reason != Reason::AddressNotBound),
            name: name.filter(|_| is_read),
        };
        let path = event.path.as_deref().map(NormalPath::parse);
        match (&event.method, path) {
            (Some(method), Some(Ok((path, _query)))) => Some(Self::Request {
                to,
                method: method.clone(),
                path,
            }),
            (Some(_), Some(Err(_))) => None,
            (_, _) => Some(Self::Flow(to)),
        }
    }

    /// The name it shows, asks for or goes by.
    pub(super) fn name(&self) -> Option<&DomainName> {
        match self {
            Self::Name(name) => Some(name),
            Self::Flow(target) | Self::Request { to: target, .. } => {
                target.name.as_ref().or(target.bound.as_ref())
            }
        }
    }

    /// Where it goes, unless it is a question.
    pub(super) fn target(&self) -> Option<&Target> {
        match self {
            Self::Name(_) => None,
            Self::Flow(target) | Self::Request { to: target, .. } => Some(target),
        }
    }

    fn verdict(&self, policy: &SandboxPolicy) -> Verdict {
        match self {
            Self::Name(name) => policy.decide_name(name),
            Self::Flow(target) => target.with_flow(|flow| policy.decide(flow)),
            Self::Request { to, method, path } => {
                let head = RequestHead {
                    method,
                    path,
                    upgrade: false,
                };
                to.with_flow(|flow| policy.decide_request(flow, &head))
            }
        }
    }

    /// Attempts that count as one when they end alike.
    pub(super) fn replayed(&self, event: &AuditEvent, said: &Said) -> ReplayedAttempt {
        let target = self.target();
        let ip: Option<IpAddr> = target
            .filter(|_| self.name().is_none())
            .map(|target| target.to.ip());
        ReplayedAttempt {
            protocol: event.protocol.clone(),
            host: self.name().map(|name| name.as_str().to_owned()),
            ip,
            port: target.map(|target| target.to.port()),
            method: event.method.clone(),
            path: event.path.clone(),
            decision: said.decision(),
            reason: said.reason,
            tier: said.tier,
            rule: said.rule.clone(),
            count: event.repeated,
        }
    }
}

impl Target {
    fn with_flow<T>(&self, decide: impl FnOnce(&Flow<'_>) -> T) -> T {
        decide(&Flow {
            protocol: self.protocol,
            to: self.to,
            name: self.name.as_ref(),
            names_bound: self.bound.as_slice(),
        })
    }
}

/// What the tiers say of an attempt.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Said {
    pub(super) passes: bool,
    pub(super) reason: Reason,
    pub(super) tier: TierName,
    pub(super) rule: Option<String>,
}

impl Said {
    /// It passes, and not only because the tier that denies it is in audit mode.
    pub(super) fn is_allowed(&self) -> bool {
        self.passes && self.reason == Reason::Allowed
    }

    /// As the contract words it.
    pub(super) fn decision(&self) -> AuditDecision {
        if self.passes {
            AuditDecision::Allow
        } else {
            AuditDecision::Deny
        }
    }
}

impl Tiers {
    pub(super) fn new(organization: Option<Policy>, sandbox: Option<Policy>) -> Self {
        let tiers = [
            (TierName::Organization, organization),
            (TierName::Sandbox, sandbox),
        ];
        Self(
            tiers
                .into_iter()
                .filter_map(|(name, policy)| Some((name, policy?)))
                .collect(),
        )
    }

    /// The tiers that there are. Where nobody wrote one, the sandbox's is the place to write the first.
    pub(super) fn written(&self) -> Vec<(TierName, Policy)> {
        if self.0.is_empty() {
            return vec![(TierName::Sandbox, Policy::default())];
        }
        self.0.clone()
    }

    /// What a tier's policy says of a quota.
    pub(super) fn quota(&self, tier: TierName, quota: Quota) -> Option<u64> {
        let policy = self.0.iter().find(|(name, _)| *name == tier);
        policy.and_then(|(_, policy)| policy.quotas().limit(quota))
    }

    /// The same with another policy in one tier.
    pub(super) fn with(&self, tier: TierName, policy: Policy) -> Self {
        let mut tiers = self.0.clone();
        match tiers.iter_mut().find(|(name, _)| *name == tier) {
            Some((_, present)) => *present = policy,
            // Of the two, the sandbox's comes last, and the organisation's is never added alone below it.
            None => tiers.push((tier, policy)),
        }
        tiers.sort_by_key(|(name, _)| *name == TierName::Sandbox);
        Self(tiers)
    }

    /// # Errors
    /// When the tiers together are more than the kernel's tables hold.
    pub(super) fn judge(&self, platform: &Platform) -> Result<Judge, PolicyError> {
        let named: Vec<_> = self
            .0
            .iter()
            .map(|(name, policy)| (tier_word(*name).to_owned(), policy.clone()))
            .collect();
        Ok(Judge {
            policy: SandboxPolicy::compile(platform, &named)?,
            names: self.0.iter().map(|(name, _)| *name).collect(),
        })
    }
}

impl Judge {
    pub(super) fn say(&self, attempt: &Attempt) -> Said {
        let verdict = attempt.verdict(&self.policy);
        let tier = verdict.tier.and_then(|tier| self.names.get(tier).copied());
        Said {
            passes: verdict.allowed,
            reason: verdict.reason,
            tier: tier.unwrap_or(TierName::Platform),
            rule: verdict.rule,
        }
    }
}

/// Whether a policy is what decided it.
pub(super) fn is_judged(reason: Reason) -> bool {
    matches!(
        reason,
        Reason::Allowed
            | Reason::DefaultDeny
            | Reason::DeniedByRule
            | Reason::PlatformDenied
            | Reason::ProtocolDenied
            | Reason::PortDenied
            | Reason::NameDenied
            | Reason::NoName
            | Reason::AddressNotBound
            | Reason::MethodDenied
            | Reason::PathDenied
            | Reason::DnsRefused
            | Reason::PolicyTightened
    )
}
