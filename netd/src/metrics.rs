//! netd's numbers. Owns: their names, labels and buckets. Counting is done where things happen.
//!
//! Labels are closed sets: words of the audit and outcomes. Never a sandbox, an organisation, a name or an
//! address, all of which those inside choose or which would tell one tenant's doings apart.

mod broker;
mod present;

use std::time::Duration;

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder},
    metrics::{counter::Counter, family::Family, histogram::Histogram},
    registry::Registry,
};
use sandgate_api::audit::AuditVerdict;
use sandgate_daemon::metrics::{SECONDS, UNIT_SECONDS, prometheus_client};
use sandgate_policy::Reason;

pub use broker::Counted;
pub use present::Present;

/// The variable that says where they are shown.
pub const ADDRESS_VARIABLE: &str = "SANDGATE_NETD_METRICS_ADDR";

/// Everything that is counted as it happens. Clones share the numbers.
#[derive(Debug, Clone)]
pub struct Metrics {
    decisions: Family<DecisionLabels, Counter>,
    bytes: Family<DirectionLabels, Counter>,
    queries: Family<QueryLabels, Counter>,
    query_seconds: Histogram,
    interceptions: Family<InterceptionLabels, Counter>,
    leases: Family<LeaseLabels, Counter>,
    denials: Family<ReasonLabels, Counter>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            decisions: Family::default(),
            bytes: Family::default(),
            queries: Family::default(),
            query_seconds: Histogram::new(SECONDS),
            interceptions: Family::default(),
            leases: Family::default(),
            denials: Family::default(),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DecisionLabels {
    protocol: &'static str,
    verdict: &'static str,
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DirectionLabels {
    direction: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct QueryLabels {
    outcome: QueryEnd,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct InterceptionLabels {
    outcome: InterceptionEnd,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LeaseLabels {
    kind: LeaseKind,
    outcome: LeaseEnd,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabels {
    reason: &'static str,
}

/// A closed set of words, as label values.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$of:meta])* $word:ident = $text:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name {
            $($(#[$of])* $word,)+
        }

        impl $name {
            const ALL: &'static [Self] = &[$(Self::$word,)+];

            const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$word => $text,)+
                }
            }
        }

        impl EncodeLabelValue for $name {
            fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
                EncodeLabelValue::encode(&self.as_str(), encoder)
            }
        }
    };
}

words! {
    /// How a DNS question ended.
    QueryEnd {
        /// With addresses, all pinned.
        Answered = "answered",
        /// With nothing, as the name may be asked for and has no address that is given out.
        Empty = "empty",
        /// The name does not exist.
        NoSuchName = "no_such_name",
        /// The rules can allow nothing under the name.
        Refused = "refused",
        /// Of a type that is not answered.
        Type = "type",
        /// Every address was one that no sandbox may reach.
        Rebinding = "rebinding",
        /// More names or bytes than the policy's budget allows.
        Budget = "budget",
        /// Too many questions at once.
        Limited = "limited",
        /// Not a proper question.
        Malformed = "malformed",
        /// The upstream or the kernel failed.
        Failed = "failed",
    }
}

words! {
    /// How a flow ended whose requests were read.
    InterceptionEnd {
        /// By itself.
        Closed = "closed",
        /// By something that is no verdict.
        Stopped = "stopped",
        /// The client broke off.
        Client = "client",
        /// By new rules.
        Cut = "cut",
        /// It could not go on.
        Failed = "failed",
        /// It was one too many and never began.
        Limited = "limited",
    }
}

words! {
    /// What a lease is on.
    LeaseKind {
        /// A secret's value.
        Credential = "credential",
        /// A sandbox's authority.
        Authority = "authority",
    }
}

words! {
    /// What the controller answered.
    LeaseEnd {
        /// Here it is.
        Given = "given",
        /// There is none.
        Unknown = "unknown",
        /// Nothing usable.
        Unreachable = "unreachable",
    }
}

impl Metrics {
    /// Shows them in a registry.
    pub fn register(&self, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix("sandgate_netd");
        registry.register(
            "decisions",
            "Decisions as the audit records them: flows, requests inside them, refused DNS questions and packets",
            self.decisions.clone(),
        );
        registry.register(
            "flow_bytes",
            "Bytes of sandboxes' flows, counted when a flow ends; up is from the sandbox",
            self.bytes.clone(),
        );
        registry.register(
            "dns_queries",
            "DNS questions of sandboxes, by outcome",
            self.queries.clone(),
        );
        registry.register_with_unit(
            "dns_upstream_duration",
            "How long the upstream resolvers took for a question that was asked them",
            UNIT_SECONDS,
            self.query_seconds.clone(),
        );
        registry.register(
            "interceptions",
            "Flows whose requests were read, by how they ended",
            self.interceptions.clone(),
        );
        registry.register(
            "leases",
            "Times that the controller was asked for a lease, by outcome",
            self.leases.clone(),
        );
        registry.register(
            "kernel_denials",
            "Packets that the kernel programs denied, as they reported them, by reason",
            self.denials.clone(),
        );
        // Shown from the start, so that a first event is an increase and not a new series.
        for outcome in QueryEnd::ALL {
            drop(self.queries.get_or_create(&QueryLabels { outcome: *outcome }));
        }
        for outcome in InterceptionEnd::ALL {
            let labels = InterceptionLabels { outcome: *outcome };
            drop(self.interceptions.get_or_create(&labels));
        }
        for kind in LeaseKind::ALL {
            for outcome in LeaseEnd::ALL {
                let (kind, outcome) = (*kind, *outcome);
                drop(self.leases.get_or_create(&LeaseLabels { kind, outcome }));
            }
        }
        for direction in ["up", "down"] {
            drop(self.bytes.get_or_create(&DirectionLabels { direction }));
        }
        let labels = DecisionLabels {
            protocol: "tls",
            verdict: AuditVerdict::Allow.as_str(),
            reason: Reason::Allowed.as_str(),
        };
        drop(self.decisions.get_or_create(&labels));
    }

    /// Something was decided `count` times.
    pub fn decided(&self, protocol: &'static str, verdict: AuditVerdict, reason: Reason, count: u64) {
        let labels = DecisionLabels {
            protocol,
            verdict: verdict.as_str(),
            reason: reason.as_str(),
        };
        self.decisions.get_or_create(&labels).inc_by(count);
    }

    /// A flow ended.
    pub fn carried(&self, up: u64, down: u64) {
        for (direction, bytes) in [("up", up), ("down", down)] {
            self.bytes
                .get_or_create(&DirectionLabels { direction })
                .inc_by(bytes);
        }
    }

    /// A DNS question ended.
    pub fn asked(&self, outcome: QueryEnd) {
        self.queries.get_or_create(&QueryLabels { outcome }).inc();
    }

    /// The upstream resolvers answered, or did not.
    pub fn resolved(&self, took: Duration) {
        self.query_seconds.observe(took.as_secs_f64());
    }

    /// A flow whose requests were read ended.
    pub fn intercepted(&self, outcome: InterceptionEnd) {
        self.interceptions
            .get_or_create(&InterceptionLabels { outcome })
            .inc();
    }

    /// The controller was asked for a lease.
    pub fn leased(&self, kind: LeaseKind, outcome: LeaseEnd) {
        self.leases.get_or_create(&LeaseLabels { kind, outcome }).inc();
    }

    /// The kernel denied packets.
    pub fn denied_in_kernel(&self, reason: Reason, count: u64) {
        let reason = reason.as_str();
        self.denials.get_or_create(&ReasonLabels { reason }).inc_by(count);
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::encoding::text::encode;

    use super::*;

    #[test]
    fn every_event_moves_its_own_series() {
        let metrics = Metrics::default();
        metrics.decided("tls", AuditVerdict::Allow, Reason::Allowed, 1);
        metrics.decided("udp", AuditVerdict::Deny, Reason::ProtocolDenied, 7);
        metrics.carried(3, 5);
        metrics.asked(QueryEnd::Answered);
        metrics.resolved(Duration::from_millis(2));
        metrics.intercepted(InterceptionEnd::Cut);
        metrics.leased(LeaseKind::Credential, LeaseEnd::Unreachable);
        metrics.denied_in_kernel(Reason::SpoofedSource, 2);
        let mut registry = Registry::default();
        metrics.register(&mut registry);
        let mut text = String::new();
        encode(&mut text, &registry).expect("written");
        for line in [
            r#"decisions_total{protocol="tls",verdict="allow",reason="allowed"} 1"#,
            r#"decisions_total{protocol="udp",verdict="deny",reason="protocol_denied"} 7"#,
            r#"flow_bytes_total{direction="up"} 3"#,
            r#"flow_bytes_total{direction="down"} 5"#,
            r#"dns_queries_total{outcome="answered"} 1"#,
            r#"dns_queries_total{outcome="refused"} 0"#,
            "dns_upstream_duration_seconds_count 1",
            r#"interceptions_total{outcome="cut"} 1"#,
            r#"leases_total{kind="credential",outcome="unreachable"} 1"#,
            r#"leases_total{kind="authority",outcome="given"} 0"#,
            r#"kernel_denials_total{reason="spoofed_source"} 2"#,
        ] {
            assert!(
                text.contains(&format!("\nsandgate_netd_{line}\n")),
                "{line}: {text}"
            );
        }
    }
}
