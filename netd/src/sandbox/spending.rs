//! How much of its policy's `quotas` a sandbox has used. Owns: what went to each host, the hosts it has met, how often
//! each secret went into a request. Pure: time and decisions come from the caller. In memory only: the next netd begins
//! anew.

use std::{
    collections::HashMap,
    fmt::Write as _,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use sandgate_policy::{DomainName, Quota, Quotas, Reason};
use sandgate_relay::allowance::{Allowance, UNLIMITED};

use super::{Decision, Rules};

/// What some quotas are for. An hour begins with the first that is counted in it.
const HOUR: Duration = Duration::from_secs(3600);
/// Hosts that are told apart while they are counted. More are refused, or go uncounted where no tier enforces a quota.
const HOSTS_MAX: usize = 16_384;

/// Whom bytes are for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Host {
    /// A name that the flow shows, or the only one for which its address is pinned.
    Name(DomainName),
    /// Where no name is known.
    Address(IpAddr),
}

/// What one sandbox used.
#[derive(Debug)]
pub(crate) struct Spending {
    /// Of bytes to one host, for all of them.
    upload_limit: Arc<AtomicU64>,
    /// Hosts are remembered when no flow goes to them.
    keeps_hosts: bool,
    hosts: HashMap<Host, Known>,
    met: Option<Window>,
    secrets: HashMap<String, Window>,
}

#[derive(Debug)]
struct Known {
    upload: Arc<Allowance>,
    /// Flows to it that are open.
    flows: usize,
}

#[derive(Debug, Clone, Copy)]
struct Window {
    ends: Instant,
    used: u64,
}

impl Window {
    /// The one that runs, or the next.
    fn at(window: Option<Self>, now: Instant) -> Self {
        window.filter(|window| now < window.ends).unwrap_or(Self {
            ends: now + HOUR,
            used: 0,
        })
    }
}

/// No: a quota is used up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OverQuota {
    /// The decision of the tier whose quota it is.
    pub decision: Decision,
    /// For people.
    pub detail: String,
    /// When there is more of it; never, if nothing is said.
    pub retry_after: Option<Duration>,
}

/// Yes. With the denial of a tier in audit mode, if it has used up its quota.
pub(crate) type Noted = Option<Decision>;

impl Spending {
    pub(crate) fn new(rules: &Rules) -> Self {
        let mut spending = Self {
            upload_limit: Arc::new(AtomicU64::new(UNLIMITED)),
            keeps_hosts: false,
            hosts: HashMap::new(),
            met: None,
            secrets: HashMap::new(),
        };
        spending.follow(rules);
        spending
    }

    /// Goes by these rules from here on. What was counted stays counted, as long as somebody wants it counted.
    pub(crate) fn follow(&mut self, rules: &Rules) {
        let counted = rules.quotas_counted();
        let limit = rules.quotas().upload_bytes_per_host.unwrap_or(UNLIMITED);
        self.upload_limit.store(limit, Ordering::Relaxed);
        self.keeps_hosts = keeps_hosts(&counted);
        if !self.keeps_hosts {
            self.hosts.retain(|_, known| known.flows > 0);
        }
        if counted.new_hosts_per_hour.is_none() {
            self.met = None;
        }
        if counted.secret_uses_per_hour.is_none() {
            self.secrets.clear();
        }
    }

    /// A flow to the host is about to begin. It must be [`Self::part`]ed from when it has ended.
    pub(crate) fn meet(
        &mut self,
        rules: &Rules,
        host: &Host,
        now: Instant,
    ) -> Result<(Arc<Allowance>, Noted), OverQuota> {
        if let Some(known) = self.hosts.get_mut(host) {
            let next = known.upload.used().saturating_add(1);
            let noted = judge(rules, Quota::UploadBytesPerHost, next, None)?;
            known.flows += 1;
            return Ok((Arc::clone(&known.upload), noted));
        }
        if self.keeps_hosts && self.hosts.len() >= HOSTS_MAX {
            let decision = Decision::of(Reason::Quota);
            if !keeps_hosts(&rules.quotas()) {
                let upload = Allowance::within(Arc::clone(&self.upload_limit));
                return Ok((Arc::new(upload), Some(decision.audited())));
            }
            return Err(OverQuota {
                decision,
                detail: format!("more than {HOSTS_MAX} hosts are not counted"),
                retry_after: None,
            });
        }
        let mut noted = None;
        if rules.quotas_counted().new_hosts_per_hour.is_some() {
            let mut window = Window::at(self.met, now);
            window.used += 1;
            let left = window.ends.saturating_duration_since(now);
            noted = judge(rules, Quota::NewHostsPerHour, window.used, Some(left))?;
            self.met = Some(window);
        }
        let upload = Arc::new(Allowance::within(Arc::clone(&self.upload_limit)));
        let known = Known {
            upload: Arc::clone(&upload),
            flows: 1,
        };
        self.hosts.insert(host.clone(), known);
        Ok((upload, noted))
    }

    /// A flow to the host has ended.
    pub(crate) fn part(&mut self, host: &Host) {
        if let Some(known) = self.hosts.get_mut(host) {
            known.flows = known.flows.saturating_sub(1);
            if known.flows == 0 && !self.keeps_hosts {
                self.hosts.remove(host);
            }
        }
    }

    /// These secrets are about to go into a request, all or none.
    pub(crate) fn use_secrets<'a>(
        &mut self,
        rules: &Rules,
        secrets: impl Iterator<Item = &'a str> + Clone,
        now: Instant,
    ) -> Result<Noted, OverQuota> {
        if rules.quotas_counted().secret_uses_per_hour.is_none() {
            return Ok(None);
        }
        let mut noted = None;
        for secret in secrets.clone() {
            let window = Window::at(self.secrets.get(secret).copied(), now);
            let left = window.ends.saturating_duration_since(now);
            let judged = judge(rules, Quota::SecretUsesPerHour, window.used + 1, Some(left));
            let judged = judged.map_err(|mut over| {
                // A String takes every text.
                let _written = write!(over.detail, " and used up for {secret}");
                over
            })?;
            noted = noted.or(judged);
        }
        self.secrets.retain(|_, window| now < window.ends);
        for secret in secrets {
            let window = Window::at(self.secrets.get(secret).copied(), now);
            let used = window.used + 1;
            self.secrets.insert(secret.to_owned(), Window { used, ..window });
        }
        Ok(noted)
    }
}

fn keeps_hosts(counted: &Quotas) -> bool {
    counted.upload_bytes_per_host.is_some() || counted.new_hosts_per_hour.is_some()
}

/// What the tiers say of so much.
fn judge(rules: &Rules, quota: Quota, used: u64, retry_after: Option<Duration>) -> Result<Noted, OverQuota> {
    let decision = rules.judge_quota(quota, used);
    if decision.is_allowed() {
        return Ok(Some(decision).filter(Decision::is_audited));
    }
    Err(OverQuota {
        decision,
        detail: text(rules.quotas().limit(quota), quota),
        retry_after,
    })
}

/// More would go to a host than may.
pub(crate) fn over_upload(rules: &Rules) -> OverQuota {
    let quota = Quota::UploadBytesPerHost;
    let decision = rules.judge_quota(quota, u64::MAX);
    // The rules in force may have no such quota any more: then these are not they that said so.
    let decision = if decision.is_allowed() {
        Decision::of(Reason::Quota)
    } else {
        decision
    };
    OverQuota {
        decision,
        detail: text(rules.quotas().limit(quota), quota),
        retry_after: None,
    }
}

fn text(limit: Option<u64>, quota: Quota) -> String {
    match limit {
        Some(limit) => format!("{} is {limit}", quota.path()),
        None => quota.path().to_owned(),
    }
}

#[cfg(test)]
mod tests;
