//! One sandbox's compiled rules, with the names of the tiers they came from, and its bindings of secrets.

use std::sync::Arc;

use sandgate_api::{
    feed::{FeedSandbox, PolicyTier, TierName},
    id::OrgId,
};
use sandgate_policy::{
    DnsBudget, DomainName, FailureMode, Flow, KernelTable, Platform, Policy, PolicyError, Reason,
    RequestHead, SandboxPolicy, Verdict,
};

use crate::intercept::bindings::{BindingError, Bindings};

/// Compiled rules.
pub struct Rules {
    policy: SandboxPolicy,
    tiers: Vec<TierName>,
    bindings: Arc<Bindings>,
    generation: u32,
    org_id: OrgId,
}

/// What the controller wants cannot be enforced as written.
#[derive(Debug, thiserror::Error)]
pub enum RulesError {
    /// A policy.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// A binding.
    #[error(transparent)]
    Binding(#[from] BindingError),
}

/// What the rules say of a flow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Judgement {
    /// Whether it may pass.
    pub decision: Decision,
    /// Of a flow whose name was not read: the name may change the answer, so look for one.
    pub needs_name: bool,
    /// It may pass only if its requests are read.
    pub intercept: bool,
    /// The secrets that each of its requests must use.
    pub credentials: Vec<String>,
}

/// What was decided, and by whom.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Decision {
    /// Why; [`Reason::Allowed`] and nothing else means yes.
    pub reason: Reason,
    /// The tier that decided.
    pub tier: Option<TierName>,
    /// The rule that decided, in its tier.
    pub rule: Option<String>,
}

impl Decision {
    /// A decision that no tenant's rule made.
    pub fn of(reason: Reason) -> Self {
        let tier = (reason == Reason::PlatformDenied).then_some(TierName::Platform);
        Self {
            reason,
            tier,
            rule: None,
        }
    }

    /// Whether it is a yes.
    pub fn is_allowed(&self) -> bool {
        self.reason == Reason::Allowed
    }

    /// The same decision, for a reason seen from elsewhere.
    pub fn because(self, reason: Reason) -> Self {
        Self { reason, ..self }
    }
}

impl Rules {
    /// Compiles what the controller wants of a sandbox.
    ///
    /// # Errors
    /// When it cannot be enforced as written.
    pub fn compile(platform: &Platform, wanted: &FeedSandbox) -> Result<Self, RulesError> {
        let bindings = Bindings::compile(&wanted.bindings)?;
        Ok(Self::with(
            platform,
            &wanted.tiers,
            bindings,
            wanted.ca_generation,
            wanted.org_id.clone(),
        )?)
    }

    /// Rules that allow nothing, for a sandbox whose own cannot be enforced.
    ///
    /// # Errors
    /// Never in practice: the smallest policy compiles.
    pub fn nothing(platform: &Platform, org_id: OrgId) -> Result<Self, PolicyError> {
        let policy = Policy::parse(&serde_json::json!({ "mode": "deny_all" }))?;
        let tier = TierName::Platform;
        Self::with(
            platform,
            &[PolicyTier { tier, policy }],
            Bindings::default(),
            0,
            org_id,
        )
    }

    /// The rules of these tiers and bindings.
    ///
    /// # Errors
    /// When the tiers do not compile.
    pub(crate) fn with(
        platform: &Platform,
        tiers: &[PolicyTier],
        bindings: Bindings,
        generation: u32,
        org_id: OrgId,
    ) -> Result<Self, PolicyError> {
        let named: Vec<(String, Policy)> = tiers
            .iter()
            .map(|tier| (name(tier.tier).to_owned(), tier.policy.clone()))
            .collect();
        Ok(Self {
            policy: SandboxPolicy::compile_with(platform, &named, &bindings.hosts())?,
            tiers: tiers.iter().map(|tier| tier.tier).collect(),
            bindings: Arc::new(bindings),
            generation,
            org_id,
        })
    }

    /// Whose sandbox it is.
    pub fn org_id(&self) -> &OrgId {
        &self.org_id
    }

    /// The secrets that are injected.
    pub fn bindings(&self) -> &Arc<Bindings> {
        &self.bindings
    }

    /// Which certificate authority the sandbox trusts.
    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// The kernel's half.
    pub fn kernel_table(&self) -> KernelTable {
        self.policy.kernel_table()
    }

    /// Whether flows go on when they cannot be recorded.
    pub fn failure_mode(&self) -> FailureMode {
        self.policy.failure_mode()
    }

    /// What may be asked of DNS.
    pub fn dns(&self) -> DnsBudget {
        self.policy.dns()
    }

    /// Judges a flow.
    pub fn judge(&self, flow: &Flow<'_>) -> Judgement {
        self.judgement(self.policy.decide(flow))
    }

    /// Judges one request on a flow.
    pub fn judge_request(&self, flow: &Flow<'_>, request: &RequestHead<'_>) -> Judgement {
        self.judgement(self.policy.decide_request(flow, request))
    }

    fn judgement(&self, verdict: Verdict) -> Judgement {
        Judgement {
            needs_name: verdict.needs_name,
            intercept: verdict.intercept,
            credentials: verdict.credentials.clone(),
            decision: self.decision(verdict),
        }
    }

    /// Judges asking for a name.
    pub fn judge_name(&self, name: &DomainName) -> Decision {
        self.decision(self.policy.decide_name(name))
    }

    fn decision(&self, verdict: Verdict) -> Decision {
        let tier = match verdict.tier {
            Some(index) => self.tiers.get(index).copied(),
            None => (verdict.reason == Reason::PlatformDenied).then_some(TierName::Platform),
        };
        // The flag decides: a verdict that contradicts itself is a no.
        let reason = match (verdict.allowed, verdict.reason) {
            (true, _) => Reason::Allowed,
            (false, Reason::Allowed) => Reason::DefaultDeny,
            (false, reason) => reason,
        };
        Decision {
            reason,
            tier,
            rule: verdict.rule,
        }
    }
}

fn name(tier: TierName) -> &'static str {
    match tier {
        TierName::Platform => "platform",
        TierName::Organization => "organization",
        TierName::Template => "template",
        TierName::Sandbox => "sandbox",
    }
}
