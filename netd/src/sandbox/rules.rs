//! One sandbox's compiled rules, with the names of the tiers they came from.

use sandgate_api::feed::{PolicyTier, TierName};
use sandgate_policy::{
    DomainName, FailureMode, Flow, KernelTable, Platform, Policy, PolicyError, Reason, SandboxPolicy, Verdict,
};

/// Compiled rules.
pub struct Rules {
    policy: SandboxPolicy,
    tiers: Vec<TierName>,
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
    /// Compiles the tiers of a sandbox.
    ///
    /// # Errors
    /// When a policy cannot be enforced as written.
    pub fn compile(platform: &Platform, tiers: &[PolicyTier]) -> Result<Self, PolicyError> {
        let named: Vec<(String, Policy)> = tiers
            .iter()
            .map(|tier| (name(tier.tier).to_owned(), tier.policy.clone()))
            .collect();
        let policy = SandboxPolicy::compile(platform, &named)?;
        Ok(Self {
            policy,
            tiers: tiers.iter().map(|tier| tier.tier).collect(),
        })
    }

    /// Rules that allow nothing, for a sandbox whose own cannot be enforced.
    ///
    /// # Errors
    /// Never in practice: the smallest policy compiles.
    pub fn nothing(platform: &Platform) -> Result<Self, PolicyError> {
        let policy = Policy::parse(&serde_json::json!({ "mode": "deny_all" }))?;
        Self::compile(
            platform,
            &[PolicyTier {
                tier: TierName::Platform,
                policy,
            }],
        )
    }

    /// The kernel's half.
    pub fn kernel_table(&self) -> KernelTable {
        self.policy.kernel_table()
    }

    /// Whether flows go on when they cannot be recorded.
    pub fn failure_mode(&self) -> FailureMode {
        self.policy.failure_mode()
    }

    /// Judges a flow. The second value says, of a flow whose name was not read, that the name may change it.
    pub fn judge(&self, flow: &Flow<'_>) -> (Decision, bool) {
        let verdict = self.policy.decide(flow);
        let needs_name = verdict.needs_name;
        (self.decision(verdict), needs_name)
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
