//! Numbers that are read when they are asked for, because somebody else keeps them.

use std::{fmt, sync::Arc};

use sandgate_daemon::metrics::prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
};
use tokio::sync::watch;

use crate::{
    audit::Audit,
    feed::{Enforced, Standing},
    kernel::{Counters, Datapath},
    sandbox::Sandboxes,
    uplink::Passing,
};

/// What netd holds, and what the kernel has counted.
pub struct Present {
    /// Those on this node.
    pub sandboxes: Arc<Sandboxes>,
    /// Where records wait.
    pub audit: Arc<Audit>,
    /// The kernel half.
    pub datapath: Arc<Datapath>,
    /// What is in force.
    pub enforced: watch::Receiver<Option<Enforced>>,
    /// What the canaries said.
    pub standing: watch::Receiver<Standing>,
}

impl fmt::Debug for Present {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Present").finish_non_exhaustive()
    }
}

impl Collector for Present {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        self.gauges(&mut encoder)?;
        let dropped = ConstCounter::new(self.audit.lost());
        dropped.encode(encoder.encode_descriptor(
            "sandgate_netd_audit_dropped_records",
            "Attempts whose audit records found no room (fail_open).",
            None,
            MetricType::Counter,
        )?)?;
        match self.datapath.counters() {
            Ok(counters) => kernel(&mut encoder, &counters),
            Err(error) => {
                tracing::warn!(%error, "the kernel's counters cannot be read");
                Ok(())
            }
        }
    }
}

impl Present {
    fn gauges(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let sandboxes = self.sandboxes.all();
        let (mut flows, mut pins) = (0, 0);
        for sandbox in &sandboxes {
            flows += sandbox.limits.open_flows();
            pins += sandbox.pins();
        }
        let (revision, refused) = self
            .enforced
            .borrow()
            .as_ref()
            .map_or((0, 0), |enforced| (enforced.revision, enforced.errors.len()));
        for (name, help, value) in [
            (
                "sandgate_netd_sandboxes",
                "Sandboxes that netd enforces.",
                count(sandboxes.len()),
            ),
            (
                "sandgate_netd_refused_sandboxes",
                "Of them, those that are denied everything because their rules cannot be enforced.",
                count(refused),
            ),
            ("sandgate_netd_open_flows", "Flows that are open.", count(flows)),
            (
                "sandgate_netd_pins",
                "Addresses that sandboxes hold under a name that they asked for.",
                count(pins),
            ),
            (
                "sandgate_netd_audit_queue_records",
                "Audit records that wait for the controller.",
                count(self.audit.waiting()),
            ),
            (
                "sandgate_netd_audit_spool_bytes",
                "Bytes of them in the spool.",
                self.audit.spooled(),
            ),
            (
                "sandgate_netd_feed_revision",
                "The feed revision that is in force.",
                revision,
            ),
            (
                "sandgate_netd_canaries",
                "1 when the canaries returned: refusing and redirecting work.",
                u64::from(self.standing.borrow().ready.is_ok()),
            ),
        ] {
            let gauge = ConstGauge::new(value);
            gauge.encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)?;
        }
        kernel_pass(encoder, &self.standing.borrow().kernel_pass)
    }
}

fn kernel_pass(encoder: &mut DescriptorEncoder<'_>, passing: &Passing) -> Result<(), fmt::Error> {
    let mut family = encoder.encode_descriptor(
        "sandgate_netd_kernel_pass",
        "1 where what needs no look inside leaves without netd, by family of addresses.",
        None,
        MetricType::Gauge,
    )?;
    for (name, passes) in [("ipv4", &passing.ipv4), ("ipv6", &passing.ipv6)] {
        let gauge = ConstGauge::new(u64::from(passes.is_ok()));
        gauge.encode(family.encode_family(&[("family", name)])?)?;
    }
    Ok(())
}

/// These live as long as the pinned maps do, which is longer than this process.
fn kernel(encoder: &mut DescriptorEncoder<'_>, counters: &Counters) -> Result<(), fmt::Error> {
    let packets = [
        ("steered", counters.steered),
        ("dns", counters.dns),
        ("inbound", counters.inbound),
        ("refused", counters.refused),
        ("dropped", counters.dropped),
        ("no_listener", counters.no_listener),
        ("delivered", counters.delivered),
        ("unadmitted", counters.unadmitted),
    ];
    let mut family = encoder.encode_descriptor(
        "sandgate_netd_kernel_packets",
        "Packets by what the kernel programs did with them; no_listener is a part of refused.",
        None,
        MetricType::Counter,
    )?;
    for (outcome, count) in packets {
        let counter = ConstCounter::new(count);
        counter.encode(family.encode_family(&[("outcome", outcome)])?)?;
    }
    let suppressed = ConstCounter::new(counters.suppressed);
    suppressed.encode(encoder.encode_descriptor(
        "sandgate_netd_kernel_suppressed_denials",
        "Denials that were too many or too fast for an event of their own and were only counted.",
        None,
        MetricType::Counter,
    )?)
}

fn count(number: usize) -> u64 {
    u64::try_from(number).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use prometheus_client::{encoding::text::encode, registry::Registry};
    use sandgate_daemon::metrics::prometheus_client;

    use super::*;

    #[derive(Debug)]
    struct Pass(Passing);

    impl Collector for Pass {
        fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
            kernel_pass(&mut encoder, &self.0)
        }
    }

    #[test]
    fn each_family_shows_whether_it_passes() {
        let broken = || Err("broken".to_owned());
        for (ipv4, ipv6, shown) in [
            (Ok(()), Ok(()), (1, 1)),
            (Ok(()), broken(), (1, 0)),
            (broken(), broken(), (0, 0)),
        ] {
            let mut registry = Registry::default();
            registry.register_collector(Box::new(Pass(Passing { ipv4, ipv6 })));
            let mut text = String::new();
            encode(&mut text, &registry).expect("written");
            for (family, value) in [("ipv4", shown.0), ("ipv6", shown.1)] {
                let line = format!("\nsandgate_netd_kernel_pass{{family=\"{family}\"}} {value}\n");
                assert!(text.contains(&line), "{text}");
            }
        }
    }
}
