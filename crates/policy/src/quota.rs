//! How much a sandbox may do of what its rules allow: bytes to one host, uses of one secret, hosts it meets.

use std::sync::Arc;

use crate::{
    document::{Action, Policy, Rule, RuleProtocol},
    error::PolicyError,
};

/// What is counted, each for itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Quota {
    /// Bytes that go to one host, in the sandbox's whole life.
    UploadBytesPerHost,
    /// Hosts that it connects to for the first time, in an hour.
    NewHostsPerHour,
    /// Requests into which one secret is put, in an hour.
    SecretUsesPerHour,
}

impl Quota {
    /// All of them, in the order of the document.
    pub const ALL: [Self; 3] = [
        Self::UploadBytesPerHost,
        Self::NewHostsPerHour,
        Self::SecretUsesPerHour,
    ];

    /// The path of its field in a document, which records give as their rule.
    pub const fn path(self) -> &'static str {
        match self {
            Self::UploadBytesPerHost => "quotas.upload_bytes_per_host",
            Self::NewHostsPerHour => "quotas.new_hosts_per_hour",
            Self::SecretUsesPerHour => "quotas.secret_uses_per_hour",
        }
    }

    /// The quota of which a record gives the path.
    pub fn from_path(path: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|quota| quota.path() == path)
    }

    /// The name of its field in `quotas`.
    pub(crate) fn field(self) -> &'static str {
        self.path().trim_start_matches("quotas.")
    }
}

/// What a document says of them. What it does not say has no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Quotas {
    /// In bytes.
    pub upload_bytes_per_host: Option<u64>,
    /// Hosts.
    pub new_hosts_per_hour: Option<u64>,
    /// Requests.
    pub secret_uses_per_hour: Option<u64>,
}

impl Quotas {
    /// How much may be used.
    pub const fn limit(&self, quota: Quota) -> Option<u64> {
        match quota {
            Quota::UploadBytesPerHost => self.upload_bytes_per_host,
            Quota::NewHostsPerHour => self.new_hosts_per_hour,
            Quota::SecretUsesPerHour => self.secret_uses_per_hour,
        }
    }

    /// Of each limit the lower one.
    #[must_use]
    pub fn strictest(self, other: Self) -> Self {
        let lower = |quota| match (self.limit(quota), other.limit(quota)) {
            (Some(one), Some(two)) => Some(one.min(two)),
            (one, two) => one.or(two),
        };
        Self {
            upload_bytes_per_host: lower(Quota::UploadBytesPerHost),
            new_hosts_per_hour: lower(Quota::NewHostsPerHour),
            secret_uses_per_hour: lower(Quota::SecretUsesPerHour),
        }
    }

    /// The first that can only be kept where every connection goes through userland, which counts.
    pub(crate) fn of_flows(&self) -> Option<Quota> {
        [Quota::UploadBytesPerHost, Quota::NewHostsPerHour]
            .into_iter()
            .find(|quota| self.limit(*quota).is_some())
    }
}

/// Datagrams leave by the kernel alone, where nobody counts them: a rule that allows them and a quota of flows cannot both
/// be kept, in one document or in two tiers of a sandbox. The field is one of the last document.
pub(crate) fn check(policies: &[&Policy]) -> Result<(), PolicyError> {
    let Some(quota) = policies.iter().find_map(|policy| policy.quotas.of_flows()) else {
        return Ok(());
    };
    let datagrams = |policy: &&Policy| policy.rules.iter().position(allows_datagrams);
    if !policies.iter().any(|policy| datagrams(policy).is_some()) {
        return Ok(());
    }
    let message = format!(
        "datagrams are not counted: no tier of a sandbox can have `{}` while another allows protocol \"udp\"",
        quota.path()
    );
    let field = match policies.last().and_then(datagrams) {
        Some(rule) => format!("rules[{rule}].protocol"),
        None => quota.path().to_owned(),
    };
    Err(PolicyError::new(field, message))
}

fn allows_datagrams(rule: &Arc<Rule>) -> bool {
    rule.protocol == RuleProtocol::Udp && rule.action == Action::Allow
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_strictest_has_the_least_of_each() {
        let one = Quotas {
            upload_bytes_per_host: Some(10),
            new_hosts_per_hour: Some(5),
            ..Quotas::default()
        };
        let two = Quotas {
            upload_bytes_per_host: Some(20),
            secret_uses_per_hour: Some(3),
            ..Quotas::default()
        };
        let strictest = one.strictest(two);
        assert_eq!(strictest, two.strictest(one));
        assert_eq!(
            Quota::ALL.map(|quota| strictest.limit(quota)),
            [Some(10), Some(5), Some(3)]
        );
        assert_eq!(one.strictest(Quotas::default()), one);
    }

    #[test]
    fn a_path_names_one_quota() {
        for quota in Quota::ALL {
            assert_eq!(Quota::from_path(quota.path()), Some(quota));
            assert_eq!(format!("quotas.{}", quota.field()), quota.path());
        }
        assert_eq!(Quota::from_path("quotas"), None);
    }
}
