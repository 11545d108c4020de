//! What people ask of the egress audit afterwards: why, what would allow it, and what another policy would have said.
//! The policy's own decision function answers; there is no second engine.

use std::collections::HashMap;

use jiff::Timestamp;
use sandgate_api::{
    audit::{AuditEvent, AuditVerdict},
    feed::{Revision, TierName},
    id::{OrgId, SandboxId},
    rest::{ApiCall, AuditDecision, Explanation, ReplayedAttempt, Simulation, Suggestion},
};
use sandgate_policy::{Platform, Policy, PolicyError, Quota, Reason};
use tokio::sync::Semaphore;

use super::{
    Service, ServiceError,
    policies::{MERGE_ATTEMPTS, always_changing, invalid},
};
use crate::store::{AuditFilter, StoredPolicy};
use amend::Change;
use attempt::{Attempt, Judge, Said, Tiers};

mod amend;
mod attempt;
mod suggest;
#[cfg(test)]
mod tests;
mod words;

/// Records that are replayed at once.
const REPLAYED: usize = 20_000;
/// Records read at a time.
const PAGE: u32 = 1_000;
/// Replays at once.
static REPLAYS: Semaphore = Semaphore::const_new(2);
/// Groups of attempts in one answer.
const GROUPS: usize = 1_000;

/// Which records are looked at.
#[derive(Debug, Clone, Copy, Default)]
pub struct Span {
    /// Not before.
    pub since: Option<Timestamp>,
    /// Before.
    pub until: Option<Timestamp>,
}

/// The policies that govern a sandbox, as they are stored.
struct Present {
    organization: Option<StoredPolicy>,
    sandbox: Option<StoredPolicy>,
    /// It can still be changed.
    is_live: bool,
}

impl Present {
    fn tiers(&self) -> Tiers {
        let policy = |stored: &Option<StoredPolicy>| stored.as_ref().map(|stored| stored.policy.clone());
        Tiers::new(policy(&self.organization), policy(&self.sandbox))
    }

    fn revision(&self, tier: TierName) -> Revision {
        let stored = match tier {
            TierName::Organization => &self.organization,
            TierName::Platform | TierName::Template | TierName::Sandbox => &self.sandbox,
        };
        stored.as_ref().map_or(0, |stored| stored.revision)
    }
}

/// A record, and what could be done about it.
struct Finding {
    explanation: Explanation,
    changes: Vec<Change>,
    sandbox_id: SandboxId,
    present: Present,
}

impl Service {
    /// Why a record says what it says, and what would allow it.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`].
    pub async fn explain(&self, org_id: &OrgId, event_id: &str) -> Result<Explanation, ServiceError> {
        Ok(self.finding(org_id, event_id).await?.explanation)
    }

    /// Makes the calls of [`Service::explain`].
    ///
    /// # Errors
    /// [`ServiceError::NotFound`]; [`ServiceError::Conflict`] where no change of a policy allows it, with the sentence.
    pub async fn allow(&self, org_id: &OrgId, event_id: &str) -> Result<Explanation, ServiceError> {
        for _attempt in 0..MERGE_ATTEMPTS {
            let found = self.finding(org_id, event_id).await?;
            if found.changes.is_empty() {
                if found.explanation.decision_now == Some(AuditDecision::Allow) {
                    return Ok(found.explanation);
                }
                return Err(ServiceError::Conflict(found.explanation.sentence));
            }
            match self.carry_out(org_id, &found).await {
                Ok(applied) => {
                    return Ok(Explanation {
                        decision_now: Some(AuditDecision::Allow),
                        applied: Some(applied),
                        ..found.explanation
                    });
                }
                // What would allow it may be another thing now.
                Err(ServiceError::Stale { .. }) => {}
                Err(other) => return Err(other),
            }
        }
        Err(always_changing())
    }

    async fn carry_out(&self, org_id: &OrgId, found: &Finding) -> Result<bool, ServiceError> {
        let mut applied = true;
        for Change { tier, patch } in &found.changes {
            let expected = Some(found.present.revision(*tier));
            applied &= match tier {
                TierName::Organization => {
                    let changed = self.merge_organization_policy(org_id, patch, expected).await?;
                    changed.applied
                }
                TierName::Platform | TierName::Template | TierName::Sandbox => {
                    let id = &found.sandbox_id;
                    self.merge_sandbox_policy(org_id, id, patch, expected)
                        .await?
                        .applied
                }
            };
        }
        Ok(applied)
    }

    async fn finding(&self, org_id: &OrgId, event_id: &str) -> Result<Finding, ServiceError> {
        let event = self.shared.store.audit_event(org_id, event_id).await?;
        let event = event.ok_or_else(|| {
            let shown: String = event_id.chars().take(80).collect();
            ServiceError::NotFound(format!("audit record {shown}"))
        })?;
        let sandbox_id = event.sandbox_id.clone();
        let present = self.present(org_id, &sandbox_id).await?;
        let tiers = present.tiers();
        let platform = &self.shared.config.platform;
        let judged = Attempt::of(&event);
        let said = match &judged {
            Some(attempt) => {
                let judge = tiers.judge(platform).map_err(|error| invalid("", error))?;
                Some(judge.say(attempt))
            }
            None => None,
        };
        let changes = match (&judged, &said) {
            (Some(attempt), Some(said)) if !said.is_allowed() && present.is_live => {
                amend::changes(platform, &tiers, attempt).unwrap_or_default()
            }
            (_, _) => Vec::new(),
        };
        let calls = changes.iter().map(|change| call(&sandbox_id, change)).collect();
        let sentence = format!(
            "{} {}",
            words::sentence(&event),
            advice(&event, &tiers, said.as_ref(), &changes, present.is_live)
        );
        Ok(Finding {
            explanation: Explanation {
                event_id: event.id,
                sentence: sentence.trim_end().to_owned(),
                decision_now: said.map(|said| {
                    if said.is_allowed() {
                        AuditDecision::Allow
                    } else {
                        AuditDecision::Deny
                    }
                }),
                calls,
                applied: None,
            },
            changes,
            sandbox_id,
            present,
        })
    }

    /// Replays a sandbox's records under another policy of its own.
    ///
    /// # Errors
    /// [`ServiceError::SandboxNotFound`]; a policy that does not fit together with the organisation's.
    pub async fn simulate(
        &self,
        org_id: &OrgId,
        id: &SandboxId,
        candidate: Policy,
        span: Span,
    ) -> Result<Simulation, ServiceError> {
        let tiers = self
            .present(org_id, id)
            .await?
            .tiers()
            .with(TierName::Sandbox, candidate);
        let judge = tiers
            .judge(&self.shared.config.platform)
            .map_err(|error| invalid("network", error))?;
        let (events, truncated) = self.recorded(org_id, id, span).await?;
        let id = id.clone();
        aside(move || replay(id, &judge, &events, truncated)).await
    }

    /// Writes the policy that allows what a sandbox did and nothing else. What it does in audit mode is what it needs.
    ///
    /// # Errors
    /// [`ServiceError::SandboxNotFound`]; [`ServiceError::Conflict`] when it did more than a policy can list.
    pub async fn suggest(
        &self,
        org_id: &OrgId,
        id: &SandboxId,
        span: Span,
    ) -> Result<Suggestion, ServiceError> {
        let present = self.present(org_id, id).await?;
        let (events, truncated) = self.recorded(org_id, id, span).await?;
        let own = present.sandbox.map(|stored| stored.policy).unwrap_or_default();
        let (id, platform) = (id.clone(), self.shared.config.platform.clone());
        let written = aside(move || write(id, &platform, &own, &events, truncated)).await?;
        written.map_err(|error| {
            ServiceError::Conflict(format!("what it did is more than a policy lists: {error}"))
        })
    }

    async fn present(&self, org_id: &OrgId, id: &SandboxId) -> Result<Present, ServiceError> {
        let record = self.record(org_id, id).await?;
        Ok(Present {
            organization: self.shared.store.organization_policy(org_id).await?,
            sandbox: self.shared.store.sandbox_policy(id).await?,
            is_live: record.status.is_live(),
        })
    }

    /// A sandbox's records, the newest first, and whether there are more.
    async fn recorded(
        &self,
        org_id: &OrgId,
        id: &SandboxId,
        span: Span,
    ) -> Result<(Vec<AuditEvent>, bool), ServiceError> {
        let mut events = Vec::new();
        let mut before = None;
        loop {
            let filter = AuditFilter {
                sandbox_id: Some(id.clone()),
                since: span.since,
                until: span.until,
                before,
                limit: PAGE,
                ..AuditFilter::default()
            };
            let page = self.shared.store.audit(org_id, &filter).await?;
            before = page.last().map(|row| row.sequence);
            let is_last = page.len() < PAGE as usize;
            events.extend(page.into_iter().map(|row| row.event));
            if is_last || events.len() >= REPLAYED {
                return Ok((events, !is_last));
            }
        }
    }
}

/// Runs what takes a while where it holds up nobody else.
async fn aside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, ServiceError> {
    // Never closed: without a place it is not worse than without the limit.
    let _place = REPLAYS.acquire().await.ok();
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|_stopped| ServiceError::Internal("the records could not be looked at".to_owned()))
}

fn replay(sandbox_id: SandboxId, judge: &Judge, events: &[AuditEvent], truncated: bool) -> Simulation {
    let (mut attempts, mut unchanged, mut not_judged) = (0, 0, 0);
    let (mut newly_allowed, mut newly_denied) = (Groups::default(), Groups::default());
    for event in events {
        attempts += event.repeated;
        let Some(attempt) = Attempt::of(event) else {
            not_judged += event.repeated;
            continue;
        };
        let said = judge.say(&attempt);
        match (passed(event), said.passes) {
            (false, true) => newly_allowed.add(&attempt, event, &said),
            (true, false) => newly_denied.add(&attempt, event, &said),
            (true, true) | (false, false) => unchanged += event.repeated,
        }
    }
    Simulation {
        sandbox_id,
        attempts,
        unchanged,
        not_judged,
        newly_allowed: newly_allowed.into_list(),
        newly_denied: newly_denied.into_list(),
        truncated,
    }
}

fn write(
    sandbox_id: SandboxId,
    platform: &Platform,
    own: &Policy,
    events: &[AuditEvent],
    truncated: bool,
) -> Result<Suggestion, PolicyError> {
    let passing: Vec<(&AuditEvent, Attempt)> = events
        .iter()
        .filter(|event| passed(event))
        .filter_map(|event| Some((event, Attempt::of(event)?)))
        .collect();
    let mut used = suggest::Used::default();
    for (_, attempt) in &passing {
        used.add(attempt);
    }
    let policy = used.policy(own)?;
    let judge = Tiers::new(None, Some(policy.clone())).judge(platform)?;
    let (attempts, left_out) = covered(&judge, &passing);
    Ok(Suggestion {
        sandbox_id,
        policy,
        attempts,
        left_out,
        truncated,
    })
}

fn passed(event: &AuditEvent) -> bool {
    match event.verdict {
        AuditVerdict::Allow | AuditVerdict::Audit => true,
        AuditVerdict::Deny => false,
    }
}

/// How many of the attempts the judge allows, and which it does not.
fn covered(judge: &Judge, passing: &[(&AuditEvent, Attempt)]) -> (u64, Vec<ReplayedAttempt>) {
    let mut attempts = 0;
    let mut left_out = Groups::default();
    for (event, attempt) in passing {
        let said = judge.say(attempt);
        if said.passes {
            attempts += event.repeated;
        } else {
            left_out.add(attempt, event, &said);
        }
    }
    (attempts, left_out.into_list())
}

fn call(id: &SandboxId, change: &Change) -> ApiCall {
    let path = match change.tier {
        TierName::Organization => "/api/v1/settings/egress".to_owned(),
        TierName::Platform | TierName::Template | TierName::Sandbox => {
            format!("/api/v1/sandbox/{id}/network")
        }
    };
    ApiCall {
        method: "PATCH".to_owned(),
        path,
        body: change.patch.clone(),
    }
}

/// What follows from it.
fn advice(
    event: &AuditEvent,
    tiers: &Tiers,
    said: Option<&Said>,
    changes: &[Change],
    is_live: bool,
) -> String {
    let Some(said) = said else {
        return match (event.tier, event.rule.as_deref().and_then(Quota::from_path)) {
            (Some(tier), Some(quota)) if event.reason == Reason::Quota => {
                words::quota(tier, quota, tiers.quota(tier, quota))
            }
            (_, _) => "No policy decides this.".to_owned(),
        };
    };
    if said.is_allowed() {
        return match event.verdict {
            AuditVerdict::Allow => String::new(),
            AuditVerdict::Deny | AuditVerdict::Audit => "The policies as they are now allow it.".to_owned(),
        };
    }
    if !is_live {
        return "The sandbox has ended; its policy is not changed any more.".to_owned();
    }
    let tiers: Vec<&str> = changes
        .iter()
        .map(|change| words::tier_word(change.tier))
        .collect();
    match (tiers.as_slice(), said.reason) {
        ([], Reason::AddressNotBound) => {
            "The name may be allowed: the sandbox has to ask DNS for it and use an address of the answer."
                .to_owned()
        }
        ([], Reason::PlatformDenied) => "Only the operator can allow it.".to_owned(),
        ([], _) => "No single change of a policy allows it.".to_owned(),
        (tiers, _) => format!(
            "A change of the policy of the {} allows it.",
            tiers.join(" and of the ")
        ),
    }
}

/// Attempts that are alike, counted.
#[derive(Default)]
struct Groups {
    counts: HashMap<String, ReplayedAttempt>,
}

impl Groups {
    fn add(&mut self, attempt: &Attempt, event: &AuditEvent, said: &Said) {
        let replayed = attempt.replayed(event, said);
        let key = format!(
            "{:?}",
            ReplayedAttempt {
                count: 0,
                ..replayed.clone()
            }
        );
        self.counts
            .entry(key)
            .and_modify(|group| group.count += replayed.count)
            .or_insert(replayed);
    }

    /// The most frequent first.
    fn into_list(self) -> Vec<ReplayedAttempt> {
        let mut list: Vec<(String, ReplayedAttempt)> = self.counts.into_iter().collect();
        list.sort_by(|(a_key, a), (b_key, b)| b.count.cmp(&a.count).then_with(|| a_key.cmp(b_key)));
        list.truncate(GROUPS);
        list.into_iter().map(|(_, group)| group).collect()
    }
}
