//! Brings records to the controller: in batches, again and again until they are acknowledged.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;

use super::Audit;
use crate::feed::Controller;

/// Records of one batch.
const BATCH: usize = 512;
/// What comes within this time goes along in one batch: each costs both ends something besides what its records cost.
const TOGETHER: Duration = Duration::from_millis(20);
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
                tokio::time::sleep(TOGETHER).await;
                continue;
            }
            let count = events.len();
            match controller.post_written("/feed/audit", body(&events)).await {
                Ok(()) => {
                    self.lock().queue.delivered();
                    pause = PAUSE[0];
                    if count < BATCH {
                        tokio::time::sleep(TOGETHER).await;
                    }
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

    fn next_batch(&self) -> Vec<Bytes> {
        self.lock().queue.batch(BATCH).to_vec()
    }
}

/// An [`AuditBatch`](sandgate_api::feed::AuditBatch) of these records, each of which is JSON already.
fn body(events: &[Bytes]) -> Bytes {
    let mut body = Vec::with_capacity(events.iter().map(|event| event.len() + 1).sum::<usize>() + 16);
    body.extend_from_slice(b"{\"events\":[");
    for (index, event) in events.iter().enumerate() {
        if index > 0 {
            body.push(b',');
        }
        body.extend_from_slice(event);
    }
    body.extend_from_slice(b"]}");
    body.into()
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;
    use sandgate_api::feed::AuditBatch;
    use sandgate_policy::{FailureMode, Reason};

    use super::{
        super::{Attempt, Owner, Passed, event},
        *,
    };
    use crate::sandbox::Decision;

    #[test]
    fn a_batch_is_what_the_controller_reads() {
        let owner = Owner {
            sandbox_id: "sandbox-1".parse().expect("an id"),
            org_id: "org-1".parse().expect("an id"),
            mode: FailureMode::FailClosed,
        };
        let made = |host: &str| {
            let attempt = Attempt {
                protocol: "https",
                host: Some(host.to_owned()),
                path: Some("/\"quoted\"\\\u{1}".to_owned()),
                ..Attempt::default()
            };
            let passed = Passed {
                began: Timestamp::now(),
                lasted: Duration::from_millis(5),
                up: 1,
                down: 2,
            };
            event(&owner, &Decision::of(Reason::Allowed), attempt, passed, 1)
        };
        for count in 0..3 {
            let events: Vec<_> = ["a.test", "b.test"][..count]
                .iter()
                .map(|host| made(host))
                .collect();
            let written = events
                .iter()
                .map(|event| serde_json::to_vec(event).expect("JSON").into());
            let body = body(&written.collect::<Vec<Bytes>>());
            let read: AuditBatch = serde_json::from_slice(&body).expect("a batch");
            assert_eq!(read, AuditBatch { events });
        }
    }
}
