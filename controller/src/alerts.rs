//! Which audit records somebody should look at: `security.alert`. Owns: what makes a record one, and that one sandbox
//! makes no more of them than one of each kind a minute. Pure: it goes by the records' own times, so that a batch that was
//! long on its way, or comes twice, is judged as it would have been then.

use std::{
    collections::{HashMap, HashSet},
    hash::{BuildHasher as _, RandomState},
};

use jiff::{SignedDuration, Timestamp};
use sandgate_api::{
    audit::{AlertKind, AuditEvent, AuditVerdict},
    id::SandboxId,
};
use sandgate_policy::{Quota, Reason};

/// How often one sandbox may raise an alert of one kind, and over how long denials are put together.
const WINDOW: SignedDuration = SignedDuration::from_secs(60);
/// Different destinations that are refused within a window, of a sandbox that looks for one that is not.
const SCANNED: usize = 20;
/// Refused attempts within a window, of a sandbox that does not give up.
const REPEATED: u64 = 200;

/// What is remembered of the sandboxes.
#[derive(Debug, Default)]
pub struct Alerts {
    hasher: RandomState,
    sandboxes: HashMap<SandboxId, Watched>,
    /// The latest record that was seen.
    newest: Option<Timestamp>,
}

#[derive(Debug)]
struct Watched {
    began: Timestamp,
    /// Destinations that were refused, as far as they need to be told apart.
    refused: HashSet<u64>,
    attempts: u64,
    /// When alerts were raised.
    raised: HashMap<AlertKind, Timestamp>,
}

/// An alert that a record has become.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Raised {
    /// Whose.
    pub sandbox_id: SandboxId,
    /// What.
    pub kind: AlertKind,
    /// When the one before it was raised.
    before: Option<Timestamp>,
}

impl Alerts {
    /// Marks the records that are alerts, and takes the mark from those that are one too many.
    pub fn mark(&mut self, events: &mut [AuditEvent]) -> Vec<Raised> {
        let mut raised = Vec::new();
        for event in events {
            let seen = self.kind(event);
            event.alert = None;
            let Some(kind) = seen else { continue };
            let watched = self.watched(event);
            let before = watched.raised.get(&kind).copied();
            if before.is_some_and(|before| is_within(before, event.time)) {
                continue;
            }
            watched.raised.insert(kind, event.time);
            event.alert = Some(kind);
            raised.push(Raised {
                sandbox_id: event.sandbox_id.clone(),
                kind,
                before,
            });
        }
        self.sweep();
        raised
    }

    /// They were not stored, and come again.
    pub fn unmark(&mut self, raised: Vec<Raised>) {
        for Raised {
            sandbox_id,
            kind,
            before,
        } in raised.into_iter().rev()
        {
            let Some(watched) = self.sandboxes.get_mut(&sandbox_id) else {
                continue;
            };
            match before {
                Some(before) => watched.raised.insert(kind, before),
                None => watched.raised.remove(&kind),
            };
        }
    }

    fn kind(&mut self, event: &AuditEvent) -> Option<AlertKind> {
        let by_itself = event.alert.or_else(|| by_reason(event));
        if event.verdict != AuditVerdict::Deny {
            return by_itself;
        }
        let target = self.hasher.hash_one((&event.host, event.ip, event.port));
        let watched = self.watched(event);
        if !is_within(watched.began, event.time) {
            watched.began = event.time;
            watched.refused.clear();
            watched.attempts = 0;
        }
        watched.attempts = watched.attempts.saturating_add(event.repeated);
        if watched.refused.len() < SCANNED {
            watched.refused.insert(target);
        }
        let is_scan = watched.refused.len() >= SCANNED;
        let is_storm = watched.attempts >= REPEATED;
        by_itself
            .or_else(|| is_scan.then_some(AlertKind::Scanning))
            .or_else(|| is_storm.then_some(AlertKind::RepeatedDenials))
    }

    fn watched(&mut self, event: &AuditEvent) -> &mut Watched {
        self.newest = self.newest.max(Some(event.time));
        self.sandboxes
            .entry(event.sandbox_id.clone())
            .or_insert_with(|| Watched {
                began: event.time,
                refused: HashSet::new(),
                attempts: 0,
                raised: HashMap::new(),
            })
    }

    /// Forgets sandboxes of which nothing counts any more.
    fn sweep(&mut self) {
        let Some(newest) = self.newest else { return };
        self.sandboxes.retain(|_, watched| {
            watched.raised.retain(|_, at| is_within(*at, newest));
            is_within(watched.began, newest) || !watched.raised.is_empty()
        });
    }
}

/// Times of records do not ascend: they are those of beginnings.
fn is_within(one: Timestamp, other: Timestamp) -> bool {
    one.duration_since(other).abs() < WINDOW
}

/// What a record is by itself. Of what a tier in audit mode denies nothing was prevented: somebody is trying out a policy.
fn by_reason(event: &AuditEvent) -> Option<AlertKind> {
    if event.verdict != AuditVerdict::Deny {
        return None;
    }
    match event.reason {
        Reason::PlaceholderMisuse => Some(AlertKind::PlaceholderMisuse),
        Reason::CredentialUnavailable => Some(AlertKind::CredentialUnavailable),
        Reason::DnsBudget => Some(AlertKind::DnsTunnelling),
        Reason::DnsRebinding => Some(AlertKind::DnsRebinding),
        Reason::SpoofedSource => Some(AlertKind::SpoofedSource),
        Reason::Quota => {
            let quota = event.rule.as_deref().and_then(Quota::from_path);
            quota.map(|_quota| AlertKind::QuotaExceeded)
        }
        Reason::Allowed
        | Reason::DefaultDeny
        | Reason::DeniedByRule
        | Reason::PlatformDenied
        | Reason::UnknownSandbox
        | Reason::Fragment
        | Reason::ProtocolDenied
        | Reason::PortDenied
        | Reason::NameDenied
        | Reason::NoName
        | Reason::AddressNotBound
        | Reason::HostMismatch
        | Reason::Malformed
        | Reason::Ech
        | Reason::MethodDenied
        | Reason::PathDenied
        | Reason::UpstreamTls
        | Reason::UpstreamUnreachable
        | Reason::DnsRefused
        | Reason::DnsType
        | Reason::PolicyTightened => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn event(second: i64, fields: &Value) -> AuditEvent {
        let mut event = json!({
            "id": format!("e{second}"), "time": Timestamp::from_second(1_800_000_000 + second).expect("a time"),
            "org_id": "org-0123456789abcdef", "sandbox_id": "sandbox-0123456789abcdef", "verdict": "deny",
            "reason": "name_denied", "protocol": "tls", "host": "evil.test", "port": 443,
        });
        for (field, value) in fields.as_object().expect("fields") {
            event[field] = value.clone();
        }
        serde_json::from_value(event).expect("an event")
    }

    fn marks(alerts: &mut Alerts, mut events: Vec<AuditEvent>) -> Vec<Option<AlertKind>> {
        alerts.mark(&mut events);
        events.into_iter().map(|event| event.alert).collect()
    }

    #[test]
    fn what_a_record_says_by_itself_is_an_alert_of_its_kind() {
        for (fields, kind) in [
            (
                json!({ "reason": "placeholder_misuse" }),
                Some(AlertKind::PlaceholderMisuse),
            ),
            (
                json!({ "reason": "credential_unavailable" }),
                Some(AlertKind::CredentialUnavailable),
            ),
            (json!({ "reason": "dns_budget" }), Some(AlertKind::DnsTunnelling)),
            (
                json!({ "reason": "dns_rebinding" }),
                Some(AlertKind::DnsRebinding),
            ),
            (
                json!({ "reason": "spoofed_source" }),
                Some(AlertKind::SpoofedSource),
            ),
            (
                json!({ "reason": "quota", "rule": "quotas.new_hosts_per_hour" }),
                Some(AlertKind::QuotaExceeded),
            ),
            (json!({ "reason": "quota" }), None),
            (json!({ "reason": "name_denied" }), None),
            (json!({ "reason": "dns_budget", "verdict": "audit" }), None),
            // What the node alone sees, it says itself.
            (
                json!({ "reason": "allowed", "verdict": "allow", "alert": "secret_echoed" }),
                Some(AlertKind::SecretEchoed),
            ),
        ] {
            let mut alerts = Alerts::default();
            assert_eq!(marks(&mut alerts, vec![event(0, &fields)]), [kind], "{fields}");
        }
    }

    #[test]
    fn one_sandbox_raises_one_of_a_kind_a_minute() {
        let misuse = |second| event(second, &json!({ "reason": "placeholder_misuse" }));
        let mut alerts = Alerts::default();
        let first = marks(&mut alerts, (0..59).map(misuse).collect());
        assert!(first[0].is_some() && first[1..].iter().all(Option::is_none));
        let other = event(59, &json!({ "reason": "dns_rebinding" }));
        let elsewhere = event(
            59,
            &json!({ "reason": "placeholder_misuse", "sandbox_id": "sandbox-ffff" }),
        );
        let next = marks(&mut alerts, vec![other, elsewhere, misuse(60), misuse(61)]);
        assert_eq!(
            next,
            [
                Some(AlertKind::DnsRebinding),
                Some(AlertKind::PlaceholderMisuse),
                Some(AlertKind::PlaceholderMisuse),
                None
            ]
        );
    }

    #[test]
    fn many_refused_destinations_are_a_scan_and_many_attempts_a_storm() {
        let to = |number: usize| event(0, &json!({ "host": format!("h{number}.test") }));
        let mut alerts = Alerts::default();
        let found = marks(&mut alerts, (0..SCANNED).map(to).collect());
        assert_eq!(found[SCANNED - 1], Some(AlertKind::Scanning));
        assert!(found[..SCANNED - 1].iter().all(Option::is_none), "too early");

        let mut alerts = Alerts::default();
        let same = |second, repeated: u64| event(second, &json!({ "repeated": repeated }));
        assert_eq!(
            marks(&mut alerts, vec![same(0, REPEATED - 1), same(1, 1)]),
            [None, Some(AlertKind::RepeatedDenials)]
        );
        // Spread over more than a minute it is neither.
        let mut alerts = Alerts::default();
        let slow: Vec<_> = (0..40)
            .map(|number| {
                event(
                    number * 60,
                    &json!({ "host": format!("h{number}.test"), "repeated": REPEATED - 1 }),
                )
            })
            .collect();
        assert!(marks(&mut alerts, slow).iter().all(Option::is_none));
        let allowed: Vec<_> = (0..40)
            .map(|number| {
                event(
                    0,
                    &json!({ "host": format!("h{number}.test"), "verdict": "allow", "reason": "allowed" }),
                )
            })
            .collect();
        assert!(marks(&mut Alerts::default(), allowed).iter().all(Option::is_none));
    }

    #[test]
    fn a_batch_that_was_not_stored_raises_its_alerts_when_it_comes_again() {
        let batch = || vec![event(0, &json!({ "reason": "dns_rebinding" }))];
        let mut alerts = Alerts::default();
        let raised = alerts.mark(&mut batch());
        assert_eq!(raised.len(), 1);
        alerts.unmark(raised);
        assert_eq!(marks(&mut alerts, batch()), [Some(AlertKind::DnsRebinding)]);
        assert_eq!(marks(&mut alerts, batch()), [None]);
    }

    #[test]
    fn sandboxes_that_are_quiet_are_forgotten() {
        let mut alerts = Alerts::default();
        for number in 0..100 {
            let fields = json!({ "sandbox_id": format!("sandbox-{number:04x}"), "reason": "dns_rebinding" });
            alerts.mark(&mut [event(0, &fields)]);
        }
        assert_eq!(alerts.sandboxes.len(), 100);
        alerts.mark(&mut [event(200, &json!({}))]);
        assert_eq!(alerts.sandboxes.len(), 1);
    }
}
