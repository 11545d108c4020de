//! Egress policies: checked, committed with a revision, and applied by the node before the answer.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use sandgate_api::{
    feed::{Revision, TierName},
    id::{OrgId, SandboxId},
    rest::{OrganizationEgress, SandboxNetwork, TierPolicy},
};
use sandgate_policy::{Action, Policy, PolicyError, Rule, RuleProtocol, SandboxPolicy};
use serde_json::Value;

use super::{
    Service, ServiceError,
    secrets::{clash, unbound, unbound_rule},
};
use crate::{
    metrics::Applied,
    node::Enforcement,
    store::{PolicyChange, SandboxRecord, SecretChoice, StoredPolicy},
};

/// How long the answer to a change waits for the node.
const APPLY_TIMEOUT: Duration = Duration::from_secs(5);

/// How often a merge is tried again when the policy changes under it.
pub(super) const MERGE_ATTEMPTS: u32 = 5;

/// The organisation's policy as it is shown.
pub type OrganizationView = OrganizationEgress;

/// A sandbox's policy as it is shown.
pub type NetworkView = SandboxNetwork;

impl Service {
    /// The organisation's policy.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn organization_policy(&self, org_id: &OrgId) -> Result<OrganizationView, ServiceError> {
        let stored = self.shared.store.organization_policy(org_id).await?;
        let revision = stored.as_ref().map_or(0, |stored| stored.revision);
        let live = self.shared.store.sandboxes(org_id, false, None, u32::MAX).await?;
        let concerns: Vec<SandboxId> = live.into_iter().filter(on_feed).map(|record| record.id).collect();
        let applied =
            concerns.is_empty() || self.shared.node.is_enforced(revision, &concerns) == Enforcement::Applied;
        Ok(OrganizationEgress {
            updated_at: stored.as_ref().map(|stored| stored.updated_at),
            policy: stored.map(|stored| stored.policy).unwrap_or_default(),
            org_id: org_id.clone(),
            revision,
            applied,
        })
    }

    /// Replaces the organisation's policy; running sandboxes are governed by it at once.
    ///
    /// # Errors
    /// A document that cannot be enforced, alone or together with one of the organisation's sandboxes; a
    /// stale `expected` revision.
    pub async fn set_organization_policy(
        &self,
        org_id: &OrgId,
        document: &Value,
        expected: Option<Revision>,
    ) -> Result<OrganizationView, ServiceError> {
        let policy = self.parse(document)?;
        self.store_organization_policy(org_id, &policy, expected).await
    }

    /// Changes the given fields of the organisation's policy (RFC 7396: `null` brings a field's default back).
    ///
    /// # Errors
    /// As [`Service::set_organization_policy`].
    pub async fn merge_organization_policy(
        &self,
        org_id: &OrgId,
        changes: &Value,
        expected: Option<Revision>,
    ) -> Result<OrganizationView, ServiceError> {
        for _attempt in 0..MERGE_ATTEMPTS {
            let present = self.shared.store.organization_policy(org_id).await?;
            let (policy, revision) = self.merge(present, changes)?;
            let base = expected.unwrap_or(revision);
            match self.store_organization_policy(org_id, &policy, Some(base)).await {
                // Nobody asked for this very revision: take the newer policy as the base.
                Err(ServiceError::Stale { .. }) if expected.is_none() => {}
                other => return other,
            }
        }
        Err(always_changing())
    }

    async fn store_organization_policy(
        &self,
        org_id: &OrgId,
        policy: &Policy,
        expected: Option<Revision>,
    ) -> Result<OrganizationView, ServiceError> {
        self.check_tiers(Some(policy), None)
            .map_err(|error| invalid("", error))?;
        let bindings = self.chosen(org_id, &SecretChoice::All).await?;
        if let Some(clash) = clash(policy, &bindings) {
            return Err(clash.of_policy(""));
        }
        if let Some(rule) = unbound_rule(policy, &bindings) {
            return Err(unbound(rule, ""));
        }
        for (id, own) in self.shared.store.live_sandbox_policies(org_id).await? {
            self.check_tiers(Some(policy), Some(&own)).map_err(|error| {
                ServiceError::Conflict(format!(
                    "together with the policy of {id} this cannot be enforced: {error}"
                ))
            })?;
        }
        let change = self
            .shared
            .store
            .set_organization_policy(org_id, policy, expected, super::now())
            .await?;
        tracing::info!(target: "audit", org_id = %org_id, revision = change.stored.revision, "egress policy of an organization changed");
        let applied = self.applied(&change).await;
        Ok(OrganizationEgress {
            policy: change.stored.policy,
            org_id: org_id.clone(),
            updated_at: Some(change.stored.updated_at),
            revision: change.stored.revision,
            applied,
        })
    }

    /// A sandbox's policy, and every tier that governs it.
    ///
    /// # Errors
    /// [`ServiceError::SandboxNotFound`].
    pub async fn sandbox_policy(&self, org_id: &OrgId, id: &SandboxId) -> Result<NetworkView, ServiceError> {
        let record = self.record(org_id, id).await?;
        let own = self.shared.store.sandbox_policy(id).await?;
        let organization = self.shared.store.organization_policy(org_id).await?;
        let applied = on_feed(&record)
            && self
                .shared
                .node
                .is_enforced(record.feed_revision, std::slice::from_ref(id))
                == Enforcement::Applied;
        Ok(view(id, own, organization, applied))
    }

    /// Replaces a sandbox's own policy.
    ///
    /// # Errors
    /// As [`Service::set_organization_policy`]; a sandbox that has ended.
    pub async fn set_sandbox_policy(
        &self,
        org_id: &OrgId,
        id: &SandboxId,
        document: &Value,
        expected: Option<Revision>,
    ) -> Result<NetworkView, ServiceError> {
        self.record(org_id, id).await?;
        let policy = self.parse(document)?;
        self.store_sandbox_policy(org_id, id, &policy, expected).await
    }

    /// Changes the given fields of a sandbox's own policy (RFC 7396: `null` brings a field's default back).
    ///
    /// # Errors
    /// As [`Service::set_sandbox_policy`].
    pub async fn merge_sandbox_policy(
        &self,
        org_id: &OrgId,
        id: &SandboxId,
        changes: &Value,
        expected: Option<Revision>,
    ) -> Result<NetworkView, ServiceError> {
        for _attempt in 0..MERGE_ATTEMPTS {
            self.record(org_id, id).await?;
            let present = self.shared.store.sandbox_policy(id).await?;
            let (policy, revision) = self.merge(present, changes)?;
            let base = expected.unwrap_or(revision);
            match self.store_sandbox_policy(org_id, id, &policy, Some(base)).await {
                // Nobody asked for this very revision: take the newer policy as the base.
                Err(ServiceError::Stale { .. }) if expected.is_none() => {}
                other => return other,
            }
        }
        Err(always_changing())
    }

    /// The policy as it is to be, and the revision that it was made of.
    fn merge(
        &self,
        present: Option<StoredPolicy>,
        changes: &Value,
    ) -> Result<(Policy, Revision), ServiceError> {
        let revision = present.as_ref().map_or(0, |present| present.revision);
        let present = present.map(|present| present.policy).unwrap_or_default();
        let policy = self.parse(&merged(&present.to_value(), changes))?;
        Ok((policy, revision))
    }

    async fn store_sandbox_policy(
        &self,
        org_id: &OrgId,
        id: &SandboxId,
        policy: &Policy,
        expected: Option<Revision>,
    ) -> Result<NetworkView, ServiceError> {
        let organization = self.shared.store.organization_policy(org_id).await?;
        self.check_tiers(organization.as_ref().map(|stored| &stored.policy), Some(policy))
            .map_err(|error| invalid("", error))?;
        if let Some(clash) = clash(policy, &self.bindings_of(id).await?) {
            return Err(clash.of_policy(""));
        }
        if let Some(rule) = unbound_rule(policy, &self.chosen(org_id, &SecretChoice::All).await?) {
            return Err(unbound(rule, ""));
        }
        let change = self
            .shared
            .store
            .set_sandbox_policy(id, policy, expected, super::now())
            .await?;
        tracing::info!(target: "audit", org_id = %org_id, sandbox_id = %id, revision = change.stored.revision, "egress policy of a sandbox changed");
        let applied = self.applied(&change).await;
        Ok(view(id, Some(change.stored), organization, applied))
    }

    fn parse(&self, document: &Value) -> Result<Policy, ServiceError> {
        self.parse_policy("", document)
    }

    /// Reads the policy that is the field `field` of a larger document, or the whole of it where that is empty.
    ///
    /// # Errors
    /// Names the field below `field`.
    pub fn parse_policy(&self, field: &str, document: &Value) -> Result<Policy, ServiceError> {
        let policy = Policy::parse(document).map_err(|error| invalid(field, error))?;
        self.shared
            .config
            .platform
            .check(&policy)
            .map_err(|error| invalid(field, error))?;
        self.check_node(&policy).map_err(|error| invalid(field, error))?;
        Ok(policy)
    }

    /// Whether the node can enforce what the document asks for: datagrams leave by the kernel or not at all.
    fn check_node(&self, policy: &Policy) -> Result<(), PolicyError> {
        let node = self.shared.node.state();
        refuse_datagrams(policy.rules(), &node.kernel_pass, &node.kernel_pass6)
    }

    /// Whether these tiers together fit into the kernel's tables.
    pub(super) fn check_tiers(
        &self,
        organization: Option<&Policy>,
        sandbox: Option<&Policy>,
    ) -> Result<(), PolicyError> {
        let tiers: Vec<(String, Policy)> = [("organization", organization), ("sandbox", sandbox)]
            .into_iter()
            .filter_map(|(name, policy)| Some((name.to_owned(), policy?.clone())))
            .collect();
        SandboxPolicy::compile(&self.shared.config.platform, &tiers).map(drop)
    }

    async fn applied(&self, change: &PolicyChange) -> bool {
        let began = Instant::now();
        let outcome = if change.concerns.is_empty() {
            Applied::Unused
        } else {
            let node = &self.shared.node;
            match node
                .enforced(change.stored.revision, &change.concerns, APPLY_TIMEOUT)
                .await
            {
                Enforcement::Applied => Applied::InForce,
                Enforcement::Refused(message) => {
                    tracing::error!(message, "the node cannot enforce a policy that was accepted");
                    Applied::Refused
                }
                Enforcement::Pending => Applied::Pending,
            }
        };
        self.shared.metrics.policy_change(outcome, began.elapsed());
        match outcome {
            Applied::InForce | Applied::Unused => true,
            Applied::Refused | Applied::Pending => false,
        }
    }
}

/// Refuses the first rule that allows datagrams which do not leave the node, by the field that says so.
fn refuse_datagrams(
    rules: &[Arc<Rule>],
    ipv4: &Result<(), String>,
    ipv6: &Result<(), String>,
) -> Result<(), PolicyError> {
    let allows = |rule: &Rule| rule.protocol() == RuleProtocol::Udp && rule.action() == Action::Allow;
    for (number, rule) in rules.iter().enumerate().filter(|(_, rule)| allows(rule)) {
        if let Err(reason) = ipv4 {
            return Err(PolicyError {
                field: format!("rules[{number}].protocol"),
                message: format!("udp needs the kernel pass, which this node does not have: {reason}"),
            });
        }
        let six = rule.cidrs().iter().position(|range| range.addr().is_ipv6());
        if let (Some(range), Err(reason)) = (six, ipv6) {
            return Err(PolicyError {
                field: format!("rules[{number}].cidrs[{range}]"),
                message: format!(
                    "udp to IPv6 needs the kernel pass for IPv6, which this node does not have: {reason}"
                ),
            });
        }
    }
    Ok(())
}

pub(super) fn invalid(field: &str, error: PolicyError) -> ServiceError {
    let error = if field.is_empty() {
        error
    } else {
        error.under(field)
    };
    ServiceError::Invalid {
        field: error.field,
        message: error.message,
    }
}

pub(super) fn always_changing() -> ServiceError {
    ServiceError::Conflict("the policy is being changed by others all the time".to_owned())
}

fn on_feed(record: &SandboxRecord) -> bool {
    record.status.is_live() && record.feed_revision > 0
}

fn view(
    id: &SandboxId,
    own: Option<StoredPolicy>,
    organization: Option<StoredPolicy>,
    applied: bool,
) -> NetworkView {
    let mut effective = Vec::new();
    if let Some(organization) = organization {
        effective.push(TierPolicy {
            tier: TierName::Organization,
            policy: organization.policy,
        });
    }
    let revision = own.as_ref().map_or(0, |own| own.revision);
    let policy = match own {
        Some(own) => {
            effective.push(TierPolicy {
                tier: TierName::Sandbox,
                policy: own.policy.clone(),
            });
            own.policy
        }
        None => Policy::default(),
    };
    if effective.is_empty() {
        // What is in force where nobody wrote a policy.
        effective.push(TierPolicy {
            tier: TierName::Platform,
            policy: Policy::default(),
        });
    }
    SandboxNetwork {
        sandbox_id: id.clone(),
        policy,
        revision,
        applied,
        effective,
    }
}

/// RFC 7396: objects are merged, everything else is replaced whole.
pub(super) fn merged(present: &Value, changes: &Value) -> Value {
    let (Value::Object(present), Value::Object(changes)) = (present, changes) else {
        return changes.clone();
    };
    let mut merged = present.clone();
    for (field, value) in changes {
        if value.is_null() {
            merged.remove(field);
        } else {
            let before = merged.get(field).unwrap_or(&Value::Null);
            let after = self::merged(before, value);
            merged.insert(field.clone(), after);
        }
    }
    Value::Object(merged)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn datagrams_of_a_family_that_does_not_leave_are_refused_by_their_range() {
        let rule = |action: &str, protocol: &str, cidrs: &[&str]| json!({ "action": action, "protocol": protocol, "cidrs": cidrs, "ports": ["8080"] });
        let off = || Err("no route".to_owned());
        let field = |rules: &[Value], ipv4, ipv6| {
            let policy = Policy::parse(&json!({ "mode": "allowlist", "rules": rules })).expect("a policy");
            let refused = refuse_datagrams(policy.rules(), &ipv4, &ipv6).err();
            refused.map(|error| (error.field, error.message.contains("no route")))
        };
        let wide = [
            rule("allow", "tcp", &["::/0"]),
            rule("deny", "udp", &["::/0"]),
            rule("allow", "udp", &["203.0.113.0/24", "2001:db8::/32"]),
        ];
        assert_eq!(field(&wide, Ok(()), Ok(())), None);
        assert_eq!(
            field(&wide, Ok(()), off()),
            Some(("rules[2].cidrs[1]".to_owned(), true))
        );
        assert_eq!(
            field(&wide, off(), off()),
            Some(("rules[2].protocol".to_owned(), true))
        );
        assert_eq!(
            field(&[rule("allow", "udp", &["203.0.113.0/24"])], Ok(()), off()),
            None
        );
    }

    #[test]
    fn a_merge_changes_what_is_given_and_resets_what_is_null() {
        let present = json!({"mode": "allowlist", "allowed_domains": ["a.test"], "allowed_ports": [443, 80]});
        let changes = json!({"allowed_domains": ["b.test"], "allowed_ports": null});
        assert_eq!(
            merged(&present, &changes),
            json!({"mode": "allowlist", "allowed_domains": ["b.test"]})
        );
        assert_eq!(merged(&present, &json!({})), present);
        let present = json!({"mode": "allow_all", "dns": {"label_max": 50, "name_max": 100}});
        let changes = json!({"dns": {"label_max": null, "types": ["A"]}});
        assert_eq!(
            merged(&present, &changes)["dns"],
            json!({"name_max": 100, "types": ["A"]})
        );
    }
}
