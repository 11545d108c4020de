//! What tiers say beside their rules, for a sandbox as a whole: DNS, hidden names, failures, quotas.

use super::{SandboxPolicy, Tiers, Verdict};
use crate::{
    dns::DnsBudget,
    document::{Ech, FailureMode},
    quota::{Quota, Quotas},
    reason::Reason,
    tier::{Cause, Judgement, Tier},
};

impl SandboxPolicy {
    /// Decides by what tiers say of DNS beside names: `breach` says whether a query is too much for a budget, and why.
    /// The tier that enforces the limit comes first, then one that only records it.
    pub fn decide_dns(&self, breach: impl Fn(&DnsBudget) -> Option<Reason>) -> Verdict {
        self.decide_field("dns", |tier| breach(&tier.dns))
    }

    /// Decides a flow whose ClientHello hides its name in a form that is never sent for show.
    pub fn decide_ech(&self) -> Verdict {
        self.decide_field("ech", |tier| match tier.ech {
            Ech::Deny => Some(Reason::Ech),
            Ech::Allow => None,
        })
    }

    /// Decides by a quota of which `used` are used, with what is asked for.
    pub fn decide_quota(&self, quota: Quota, used: u64) -> Verdict {
        self.decide_field(quota.path(), |tier| {
            let limit = tier.quotas.limit(quota);
            limit.is_some_and(|limit| used > limit).then_some(Reason::Quota)
        })
    }

    fn decide_field(&self, name: &'static str, denies: impl Fn(&Tier) -> Option<Reason>) -> Verdict {
        let denial = self
            .order
            .iter()
            .find_map(|tier| denies(&self.tiers[*tier]).map(|reason| (*tier, reason)));
        let (tier, reason) = denial.unwrap_or_else(|| (self.last(), Reason::Allowed));
        let cause = Cause::Field(name);
        self.verdict(tier, Judgement { reason, cause }, false)
    }

    /// What may be asked of DNS: of each limit the strictest of all tiers that enforce, and no limit where none does.
    pub fn dns(&self) -> DnsBudget {
        let budgets = self.counted(Tiers::Enforcing).map(|tier| self.tiers[tier].dns);
        budgets.fold(DnsBudget::UNLIMITED, DnsBudget::strictest)
    }

    /// The same over all tiers, where any is in audit mode: what goes beyond it is recorded and not refused.
    pub fn dns_audited(&self) -> Option<DnsBudget> {
        let budgets = self.counted(Tiers::All).map(|tier| self.tiers[tier].dns);
        let is_audited = self.tiers.iter().any(|tier| tier.is_audit);
        is_audited.then(|| budgets.fold(DnsBudget::UNLIMITED, DnsBudget::strictest))
    }

    /// The strictest of the modes of tiers that enforce; open where none does.
    pub fn failure_mode(&self) -> FailureMode {
        let open = |tier: usize| self.tiers[tier].failure_mode == FailureMode::FailOpen;
        if self.counted(Tiers::Enforcing).all(open) {
            FailureMode::FailOpen
        } else {
            FailureMode::FailClosed
        }
    }

    /// Of each quota the strictest of all tiers that enforce.
    pub fn quotas(&self) -> Quotas {
        let quotas = self.counted(Tiers::Enforcing).map(|tier| self.tiers[tier].quotas);
        quotas.fold(Quotas::default(), Quotas::strictest)
    }

    /// The same over all tiers: what must be counted.
    pub fn quotas_counted(&self) -> Quotas {
        let quotas = self.tiers.iter().map(|tier| tier.quotas);
        quotas.fold(Quotas::default(), Quotas::strictest)
    }
}

#[cfg(test)]
mod tests;
