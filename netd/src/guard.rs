//! Watches that nobody comes before our programs. Owns: looking every few seconds, and telling the controller of
//! sandboxes that are not enforced because somebody did. Putting ours first again, or setting the interface down, is the
//! datapath's ([`crate::kernel::Datapath::guard`]).

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use sandgate_api::feed::FeedError;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    feed::Standing,
    kernel::{Datapath, Guarded},
    sandbox::Sandboxes,
};

/// How often every interface is looked at.
const PAUSE: Duration = Duration::from_secs(3);

/// Watches until `end`.
pub async fn watch(
    datapath: Arc<Datapath>,
    sandboxes: Arc<Sandboxes>,
    told: Arc<watch::Sender<Standing>>,
    end: CancellationToken,
) {
    loop {
        tokio::select! {
            () = tokio::time::sleep(PAUSE) => {}
            () = end.cancelled() => return,
        }
        let looking = Arc::clone(&datapath);
        let found = match tokio::task::spawn_blocking(move || looking.guard()).await {
            Ok(Ok(found)) => found,
            Ok(Err(error)) => {
                tracing::error!(%error, "cannot look whether our programs come first");
                continue;
            }
            Err(_panic) => {
                tracing::error!("looking whether our programs come first broke");
                continue;
            }
        };
        let lost = lost(&sandboxes, &found);
        told.send_if_modified(|standing| {
            let is_new = standing.lost != lost;
            standing.lost = lost;
            is_new
        });
    }
}

/// The sandboxes that are not enforced now; says of all what happened.
fn lost(sandboxes: &Sandboxes, found: &[Guarded]) -> Vec<FeedError> {
    let by_interface: BTreeMap<u32, _> = sandboxes
        .all()
        .into_iter()
        .map(|sandbox| (sandbox.endpoint.ifindex, sandbox))
        .collect();
    let mut lost = Vec::new();
    for guarded in found {
        let sandbox = by_interface.get(&guarded.ifindex);
        let sandbox_id = sandbox.map(|sandbox| sandbox.id.to_string());
        match &guarded.outcome {
            Ok(()) => {
                tracing::warn!(
                    sandbox_id,
                    ifindex = guarded.ifindex,
                    "another program had come before ours on the interface of a sandbox; ours come first again"
                );
            }
            Err(error) => {
                tracing::error!(sandbox_id, ifindex = guarded.ifindex, %error, "a sandbox's interface is set down");
                if let Some(sandbox) = sandbox {
                    lost.push(FeedError {
                        sandbox_id: sandbox.id.clone(),
                        message: format!("its interface is set down: {error}"),
                    });
                }
            }
        }
    }
    lost
}
