//! Numbers that are read when they are asked for, because somebody else keeps them.

use std::fmt;

use sandgate_api::feed::Revision;
use sandgate_daemon::metrics::prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
};
use tokio::sync::watch;

use crate::node::NodeLink;

/// The feed and the node.
pub struct Present {
    /// What the node says.
    pub node: NodeLink,
    /// The feed's revision.
    pub revision: watch::Receiver<Revision>,
}

impl fmt::Debug for Present {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Present").finish_non_exhaustive()
    }
}

impl Collector for Present {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let state = self.node.state();
        for (name, help, value) in [
            (
                "sandgate_controller_feed_revision",
                "The feed's revision as of the last commit.",
                *self.revision.borrow(),
            ),
            (
                "sandgate_controller_feed_acknowledged_revision",
                "The last revision that the node has in force.",
                state.acknowledged,
            ),
            (
                "sandgate_controller_node_connected",
                "1 while the node follows the feed.",
                u64::from(state.connected),
            ),
            (
                "sandgate_controller_node_ready",
                "1 while the node takes new sandboxes.",
                u64::from(state.ready),
            ),
        ] {
            let gauge = ConstGauge::new(value);
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)?;
        }
        let counter = ConstCounter::new(self.node.records_stored());
        counter.encode(encoder.encode_descriptor(
            "sandgate_controller_audit_records",
            "Audit records that the node delivered and the store took.",
            None,
            counter.metric_type(),
        )?)?;
        let mut alerts = encoder.encode_descriptor(
            "sandgate_controller_security_alerts",
            "Audit records that somebody should look at, by kind.",
            None,
            MetricType::Counter,
        )?;
        for (kind, count) in self.node.alerts_stored() {
            let labels = [("kind", kind.as_str())];
            ConstCounter::new(count).encode(alerts.encode_family(&labels)?)?;
        }
        Ok(())
    }
}
