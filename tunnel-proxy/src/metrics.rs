//! tunnel-proxy's numbers. Owns: their names, labels and buckets. Labels are closed sets; never a sandbox, a tunnel, a
//! name or an address, all of which strangers or tenants choose.

use std::time::Duration;

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};
use sandgate_api::control::DialError;
use sandgate_daemon::metrics::{SECONDS, UNIT_SECONDS, prometheus_client};
use sandgate_relay::inward::DialFailure;

use crate::account::{Outcome, Spoken};

/// The variable that says where they are shown.
pub const ADDRESS_VARIABLE: &str = "SANDGATE_TUNNEL_METRICS_ADDR";

/// Everything that is counted.
#[derive(Debug)]
pub struct Metrics {
    requests: Family<RequestLabels, Counter>,
    bytes: Family<DirectionLabels, Counter>,
    dials: Family<DialLabels, Counter>,
    dial_seconds: Histogram,
    connections: Gauge,
    under_way: Gauge,
    tunnels: Gauge,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            requests: Family::default(),
            bytes: Family::default(),
            dials: Family::default(),
            dial_seconds: Histogram::new(SECONDS),
            connections: Gauge::default(),
            under_way: Gauge::default(),
            tunnels: Gauge::default(),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    protocol: Spoken,
    outcome: Outcome,
    code: CodeClass,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DirectionLabels {
    direction: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DialLabels {
    outcome: &'static str,
}

/// The first digit of a status, or none for bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct CodeClass(Option<u16>);

impl EncodeLabelValue for CodeClass {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
        let class = match self.0.map(|status| status / 100) {
            Some(1) => "1xx",
            Some(2) => "2xx",
            Some(3) => "3xx",
            Some(4) => "4xx",
            Some(5) => "5xx",
            // Programs behind tunnels may answer any number.
            Some(_) => "other",
            None => "none",
        };
        EncodeLabelValue::encode(&class, encoder)
    }
}

impl EncodeLabelValue for Spoken {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
        EncodeLabelValue::encode(&self.as_str(), encoder)
    }
}

impl EncodeLabelValue for Outcome {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
        EncodeLabelValue::encode(&self.as_str(), encoder)
    }
}

/// Counts something as open until it is dropped.
#[derive(Debug)]
pub struct Open(Gauge);

impl Open {
    fn new(gauge: &Gauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl Metrics {
    /// Shows them.
    pub fn register(&self, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix("sandgate_tunnel");
        registry.register(
            "requests",
            "Requests, and connections that carry bytes, when they have ended",
            self.requests.clone(),
        );
        registry.register(
            "bytes",
            "Bytes of bodies and of upgraded connections, toward the sandbox (in) and away from it (out)",
            self.bytes.clone(),
        );
        registry.register(
            "dials",
            "Connections into sandboxes that were asked for",
            self.dials.clone(),
        );
        registry.register_with_unit(
            "dial",
            "Time until a connection into a sandbox was there",
            UNIT_SECONDS,
            self.dial_seconds.clone(),
        );
        registry.register(
            "connections",
            "Open connections of clients",
            self.connections.clone(),
        );
        registry.register(
            "requests_under_way",
            "Requests, and connections that carry bytes, under way",
            self.under_way.clone(),
        );
        registry.register("tunnels", "Tunnels that are served", self.tunnels.clone());
    }

    /// One request or connection that carries bytes has ended.
    pub fn ended(&self, protocol: Spoken, outcome: Outcome, status: Option<u16>, (up, down): (u64, u64)) {
        let labels = RequestLabels {
            protocol,
            outcome,
            code: CodeClass(status),
        };
        self.requests.get_or_create(&labels).inc();
        for (direction, bytes) in [("in", up), ("out", down)] {
            self.bytes
                .get_or_create(&DirectionLabels { direction })
                .inc_by(bytes);
        }
    }

    /// netd was asked for a connection.
    pub fn dialled<T>(&self, outcome: &Result<T, DialFailure>, took: Duration) {
        let word = match outcome {
            Ok(_) => "connected",
            Err(DialFailure::Refused(error)) => match error {
                DialError::UnknownSandbox => "unknown_sandbox",
                DialError::PortNotAllowed => "not_allowed",
                DialError::Refused => "refused",
                DialError::TimedOut => "timed_out",
                DialError::Failed => "failed",
            },
            Err(DialFailure::Silent) => "node_silent",
            Err(DialFailure::Away) => "node_away",
            Err(DialFailure::Io(_)) => "failed",
        };
        self.dials.get_or_create(&DialLabels { outcome: word }).inc();
        if outcome.is_ok() {
            self.dial_seconds.observe(took.as_secs_f64());
        }
    }

    /// A client's connection.
    pub fn connection(&self) -> Open {
        Open::new(&self.connections)
    }

    /// A request, or a connection that carries bytes.
    pub fn request(&self) -> Open {
        Open::new(&self.under_way)
    }

    /// How many tunnels there are.
    pub fn serves(&self, tunnels: usize) {
        self.tunnels.set(i64::try_from(tunnels).unwrap_or(i64::MAX));
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::encoding::text::encode;

    use super::*;

    #[test]
    fn what_happens_is_counted_under_words_of_ours_alone() {
        let metrics = Metrics::default();
        let mut registry = Registry::default();
        metrics.register(&mut registry);
        let open = metrics.connection();
        metrics.ended(Spoken::Http1, Outcome::Served, Some(204), (3, 5));
        metrics.ended(Spoken::Tcp, Outcome::Cut, None, (0, 0));
        metrics.ended(Spoken::Http2, Outcome::Served, Some(799), (0, 0));
        metrics.dialled(&Err::<(), _>(DialError::Refused.into()), Duration::ZERO);
        metrics.dialled(&Ok(()), Duration::from_millis(1));
        let mut text = String::new();
        encode(&mut text, &registry).expect("text");
        for line in [
            r#"sandgate_tunnel_requests_total{protocol="http/1",outcome="served",code="2xx"} 1"#,
            r#"sandgate_tunnel_requests_total{protocol="tcp",outcome="cut",code="none"} 1"#,
            r#"sandgate_tunnel_requests_total{protocol="http/2",outcome="served",code="other"} 1"#,
            r#"sandgate_tunnel_bytes_total{direction="out"} 5"#,
            r#"sandgate_tunnel_dials_total{outcome="refused"} 1"#,
            "sandgate_tunnel_dial_seconds_count 1",
            "sandgate_tunnel_connections 1",
        ] {
            assert!(text.contains(line), "{line} is missing in\n{text}");
        }
        drop(open);
        text.clear();
        encode(&mut text, &registry).expect("text");
        assert!(text.contains("sandgate_tunnel_connections 0"), "{text}");
    }
}
