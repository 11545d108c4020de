//! Watches that nobody comes before our programs, or takes them away. Owns: looking every few seconds, telling the
//! controller of sandboxes that are not enforced because somebody did, and the keeper of the uplink. Putting ours first
//! again, setting the interface down, or using the uplink no more, is the datapath's
//! ([`crate::kernel::Datapath::guard`]).

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use sandgate_api::feed::FeedError;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    feed::Standing,
    kernel::{Datapath, Guarded},
    sandbox::Sandboxes,
    uplink::Keeper,
};

/// How often every interface is looked at.
const PAUSE: Duration = Duration::from_secs(3);

/// Watches until `end`.
pub async fn watch(
    datapath: Arc<Datapath>,
    sandboxes: Arc<Sandboxes>,
    keeper: Arc<Keeper>,
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
        let (of_uplink, of_sandboxes): (Vec<_>, Vec<_>) =
            found.into_iter().partition(|guarded| guarded.uplink);
        for guarded in &of_uplink {
            match &guarded.outcome {
                Ok(()) => tracing::warn!(
                    "the program on the uplink was gone or another had come before it; ours comes first again"
                ),
                Err(error) => {
                    tracing::error!(%error, "nothing leaves by the uplink any more");
                    keeper.doubt();
                }
            }
        }
        let lost = lost(&sandboxes, &of_sandboxes);
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
