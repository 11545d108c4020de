//! One sandbox's compiled rules, with the names of the tiers they came from, and its bindings of secrets.

use std::sync::{Arc, OnceLock};

use sandgate_api::{
    audit::AuditVerdict,
    feed::{FeedSandbox, PolicyTier, TierName},
    id::OrgId,
};
use sandgate_policy::{
    BoundHost, DnsBudget, DomainName, FailureMode, Flow, KernelTable, Platform, Policy, PolicyError, Quota,
    Quotas, Reason, RequestHead, SandboxPolicy, Verdict,
};

use super::library::Library;
use crate::{
    intercept::bindings::{BindingError, Bindings},
    kernel::{Datapath, DatapathError, EndpointHandle, PolicyContent},
};

/// Compiled rules.
pub struct Rules {
    compiled: Arc<Compiled>,
    /// The kernel's half, until it is in the kernel; never of rules that others have put there.
    table: Option<KernelTable>,
    bindings: Arc<Bindings>,
    generation: u32,
    org_id: OrgId,
}

/// What sandboxes with the same tiers and bindings share.
pub(super) struct Compiled {
    policy: SandboxPolicy,
    tiers: Vec<PolicyTier>,
    pub(super) hosts: Vec<BoundHost>,
    /// What it is called in the kernel, once it was there.
    content: OnceLock<PolicyContent>,
}

impl Compiled {
    pub(super) fn new(
        platform: &Platform,
        tiers: &[PolicyTier],
        hosts: Vec<BoundHost>,
    ) -> Result<(Self, KernelTable), PolicyError> {
        let named: Vec<(String, Policy)> = tiers
            .iter()
            .map(|tier| (name(tier.tier).to_owned(), Policy::clone(&tier.policy)))
            .collect();
        let (policy, table) = SandboxPolicy::compile_with_table(platform, &named, &hosts)?;
        let compiled = Self {
            policy,
            tiers: tiers.to_vec(),
            hosts,
            content: OnceLock::new(),
        };
        Ok((compiled, table))
    }
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
    /// Why; [`Reason::Allowed`] means yes.
    pub reason: Reason,
    /// The tier that decided.
    pub tier: Option<TierName>,
    /// The rule that decided, in its tier.
    pub rule: Option<String>,
    /// Whether it is carried out. A denial that is not is one of a tier in audit mode: what it is about goes on, and is
    /// recorded with it.
    pub enforced: bool,
}

impl Decision {
    /// A decision that no tenant's rule made.
    pub fn of(reason: Reason) -> Self {
        let tier = (reason == Reason::PlatformDenied).then_some(TierName::Platform);
        Self {
            reason,
            tier,
            rule: None,
            enforced: true,
        }
    }

    /// Whether what it is about goes on.
    pub fn is_allowed(&self) -> bool {
        self.reason == Reason::Allowed || !self.enforced
    }

    /// Whether it is a denial that is not carried out.
    pub fn is_audited(&self) -> bool {
        self.reason != Reason::Allowed && !self.enforced
    }

    /// The word for it in records.
    pub fn verdict(&self) -> AuditVerdict {
        match (self.reason, self.enforced) {
            (Reason::Allowed, _) => AuditVerdict::Allow,
            (_, true) => AuditVerdict::Deny,
            (_, false) => AuditVerdict::Audit,
        }
    }

    /// The same decision, recorded and not carried out.
    #[must_use]
    pub fn audited(self) -> Self {
        Self {
            enforced: false,
            ..self
        }
    }

    /// The same decision, for a reason seen from elsewhere.
    pub fn because(self, reason: Reason) -> Self {
        Self { reason, ..self }
    }
}

impl Rules {
    /// Compiles what the controller wants of a sandbox, or finds it in the library.
    ///
    /// # Errors
    /// When it cannot be enforced as written.
    pub fn compile(library: &Library, platform: &Platform, wanted: &FeedSandbox) -> Result<Self, RulesError> {
        let bindings = Bindings::compile(&wanted.bindings)?;
        let (compiled, table) = library.compiled(platform, &wanted.tiers, bindings.hosts())?;
        Ok(Self {
            compiled,
            table,
            bindings: Arc::new(bindings),
            generation: wanted.ca_generation,
            org_id: wanted.org_id.clone(),
        })
    }

    /// Rules that allow nothing, for a sandbox whose own cannot be enforced.
    ///
    /// # Errors
    /// Never in practice: the smallest policy compiles.
    pub fn nothing(platform: &Platform, org_id: OrgId) -> Result<Self, PolicyError> {
        let policy = Policy::parse(&serde_json::json!({ "mode": "deny_all" }))?.into();
        let tier = TierName::Platform;
        Self::with(
            platform,
            &[PolicyTier { tier, policy }],
            Bindings::default(),
            0,
            org_id,
        )
    }

    /// The rules of these tiers and bindings, shared with nobody.
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
        let (compiled, table) = Compiled::new(platform, tiers, bindings.hosts())?;
        Ok(Self {
            compiled: Arc::new(compiled),
            table: Some(table),
            bindings: Arc::new(bindings),
            generation,
            org_id,
        })
    }

    /// Puts the kernel's half in force, in one step.
    ///
    /// # Errors
    /// When the kernel does not take it; what was in force before stays.
    pub fn install(&mut self, datapath: &Datapath, endpoint: EndpointHandle) -> Result<(), DatapathError> {
        let table = self.table.take();
        if let Some(content) = self.compiled.content.get()
            && datapath.share_policy(endpoint, *content)?
        {
            return Ok(());
        }
        let table = table.unwrap_or_else(|| self.compiled.policy.kernel_table());
        let content = datapath.set_policy(endpoint, &table)?;
        // Another sandbox may have been faster, with the same.
        let _present = self.compiled.content.set(content);
        Ok(())
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

    /// Whether flows go on when they cannot be recorded.
    pub fn failure_mode(&self) -> FailureMode {
        self.compiled.policy.failure_mode()
    }

    /// What may be asked of DNS.
    pub fn dns(&self) -> DnsBudget {
        self.compiled.policy.dns()
    }

    /// Beyond what of it is recorded, where tiers are in audit mode.
    pub fn dns_audited(&self) -> Option<DnsBudget> {
        self.compiled.policy.dns_audited()
    }

    /// How much may be done of what is allowed.
    pub fn quotas(&self) -> Quotas {
        self.compiled.policy.quotas()
    }

    /// The same with tiers in audit mode: what is counted.
    pub fn quotas_counted(&self) -> Quotas {
        self.compiled.policy.quotas_counted()
    }

    /// Judges so much of what a quota is for.
    pub fn judge_quota(&self, quota: Quota, used: u64) -> Decision {
        self.decision(self.compiled.policy.decide_quota(quota, used))
    }

    /// Judges a flow.
    pub fn judge(&self, flow: &Flow<'_>) -> Judgement {
        self.judgement(self.compiled.policy.decide(flow))
    }

    /// Judges one request on a flow.
    pub fn judge_request(&self, flow: &Flow<'_>, request: &RequestHead<'_>) -> Judgement {
        self.judgement(self.compiled.policy.decide_request(flow, request))
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
        self.decision(self.compiled.policy.decide_name(name))
    }

    /// Judges what is asked of DNS beside names, by what of each tier's budget it breaks.
    pub fn judge_dns(&self, breach: impl Fn(&DnsBudget) -> Option<Reason>) -> Decision {
        self.decision(self.compiled.policy.decide_dns(breach))
    }

    /// Judges a flow that hides its name in a form that is never sent for show.
    pub fn judge_ech(&self) -> Decision {
        self.decision(self.compiled.policy.decide_ech())
    }

    fn decision(&self, verdict: Verdict) -> Decision {
        let tier = match verdict.tier {
            Some(index) => self.compiled.tiers.get(index).map(|tier| tier.tier),
            None => (verdict.reason == Reason::PlatformDenied).then_some(TierName::Platform),
        };
        let enforced = !verdict.is_audited();
        // The flag decides: a verdict that contradicts itself is a no.
        let reason = match (verdict.allowed, verdict.reason) {
            (false, Reason::Allowed) => Reason::DefaultDeny,
            (true | false, reason) => reason,
        };
        Decision {
            reason,
            tier,
            rule: verdict.rule,
            enforced,
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
