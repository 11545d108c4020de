//! Brings records to the controller: in batches, again and again until they are acknowledged.

use std::{sync::Arc, time::Duration};

use sandgate_api::{audit::AuditEvent, feed::AuditBatch};

use super::Audit;
use crate::feed::Controller;

/// Records of one batch.
const BATCH: usize = 512;
/// Pauses after a failure, growing from one to the other.
const PAUSE: [Duration; 2] = [Duration::from_millis(200), Duration::from_secs(5)];

impl Audit {
    /// Delivers records for as long as it is polled.
    pub async fn deliver(self: Arc<Self>, controller: Arc<Controller>) {
        let mut pause = PAUSE[0];
        loop {
            let events = self.next_batch();
            if events.is_empty() {
                self.filled.notified().await;
                continue;
            }
            let count = events.len();
            match controller.post("/feed/audit", &AuditBatch { events }).await {
                Ok(()) => {
                    self.lock().queue.delivered();
                    pause = PAUSE[0];
                }
                Err(error) => {
                    tracing::warn!(%error, records = count, "cannot deliver audit records, trying again");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(PAUSE[1]);
                }
            }
        }
    }

    /// Waits, at most `limit`, until everything recorded so far is delivered.
    pub async fn flush(&self, limit: Duration) -> bool {
        self.settle();
        let empty = async {
            while !self.next_batch().is_empty() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let delivered = tokio::time::timeout(limit, empty).await.is_ok();
        self.sync().await;
        delivered
    }

    fn next_batch(&self) -> Vec<AuditEvent> {
        self.lock().queue.batch(BATCH).to_vec()
    }
}
