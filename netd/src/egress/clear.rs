//! Flows of HTTP in clear. Owns: whom such a flow is for, and its records: one for each request, and one for the flow
//! where no request tells of it. What becomes of each request is decided where those by TLS are, in
//! [`crate::intercept`].

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
};

use sandgate_policy::{DomainName, Reason};
use sandgate_relay::http1::head::Host;
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

use super::{
    Egress,
    flow::{Ended, Entry, IDLE, mismatch},
    intercepted::{Surroundings, ended, said},
    refuse,
    sniff::SNIFF_TIME,
};
use crate::{
    audit::{Attempt, Owner, Passed},
    intercept::{
        self, Channel, Target, World,
        near::{Meter, Near},
    },
    sandbox::{Admitted, Cut, Decision, Facts, Sandbox},
};

/// Longest host in a record of one that is refused.
const HOST_MAX: usize = 256;

/// A flow by HTTP/2 whose first request has said whom it is for.
struct Opened {
    cut: Arc<Cut>,
    decision: Decision,
    target: Target,
    world: Arc<Surroundings>,
}

/// One that may not be.
struct Denied {
    attempt: Attempt,
    decision: Decision,
}

impl Egress {
    /// Takes an admitted flow of HTTP/1.x, of which `received` was read already, to its end.
    pub(super) async fn read_in_clear(
        self: &Arc<Self>,
        entry: Entry,
        admitted: Admitted,
        target: Target,
        near: TcpStream,
        received: Vec<u8>,
    ) {
        let meter = Arc::new(Meter::default());
        let near = Near::new(near, received, Arc::clone(&meter));
        let opened = self.opened(&entry.owner, admitted, target);
        let world = Arc::clone(&opened.world) as Arc<dyn World>;
        let serving = intercept::serve_in_clear(near, opened.target.clone(), world, self.tasks.clone());
        let work = async { ended(intercept::serve_until_idle(serving, &meter, IDLE).await) };
        let ended = self.until_cut(work, opened.cut.cut(), &meter).await;
        self.close(&entry, opened, ended, &meter);
    }

    /// The same for HTTP/2, which is admitted by its first request.
    pub(super) async fn read_http2_in_clear(
        self: &Arc<Self>,
        entry: Entry,
        near: TcpStream,
        received: Vec<u8>,
    ) {
        let deny = |denied: Box<Denied>| {
            self.audit.deny(&entry.owner, &denied.decision, denied.attempt, 1);
        };
        let Ok(_slot) = Arc::clone(&entry.sandbox.limits.intercepted).try_acquire_owned() else {
            refuse(&near);
            let detail = "too many connections at once whose requests are read";
            return deny(denied(entry.to, None, Decision::of(Reason::Quota), detail));
        };
        let meter = Arc::new(Meter::default());
        let near = Near::new(near, received, Arc::clone(&meter));
        let (word, told) = (Arc::new(Mutex::new(None)), CancellationToken::new());
        let (tell, ring) = (Arc::clone(&word), told.clone());
        let egress = Arc::clone(self);
        let (sandbox, owner, to) = (Arc::clone(&entry.sandbox), entry.owner.clone(), entry.to);
        let open = move |authority: &str| {
            let opened = egress.open(&sandbox, &owner, to, authority);
            let given = opened.as_ref().ok().map(|opened| {
                let world = Arc::clone(&opened.world) as Arc<dyn World>;
                (opened.target.clone(), world)
            });
            *tell.lock().unwrap_or_else(PoisonError::into_inner) = Some(opened);
            ring.cancel();
            given
        };
        let serving = intercept::serve_http2_in_clear(near, open, self.tasks.clone());
        let mut work = Box::pin(async { ended(intercept::serve_until_idle(serving, &meter, IDLE).await) });
        let mut over = None;
        tokio::select! {
            () = told.cancelled() => {}
            ended = &mut work => over = Some(ended),
            () = tokio::time::sleep(SNIFF_TIME) => {}
        }
        let said = word.lock().unwrap_or_else(PoisonError::into_inner).take();
        match said {
            Some(Ok(opened)) => {
                let ended = match over {
                    Some(ended) => ended,
                    None => self.until_cut(work, opened.cut.cut(), &meter).await,
                };
                self.close(&entry, opened, ended, &meter);
            }
            Some(Err(refused)) => {
                meter.reset();
                deny(refused);
            }
            None => {
                meter.reset();
                let detail = "HTTP/2 without a request that says whom it is for";
                deny(denied(entry.to, None, Decision::of(Reason::Malformed), detail));
            }
        }
    }

    /// Admits a flow of HTTP/2 as one for whom its first request is.
    fn open(
        self: &Arc<Self>,
        sandbox: &Arc<Sandbox>,
        owner: &Owner,
        to: SocketAddr,
        authority: &str,
    ) -> Result<Opened, Box<Denied>> {
        let host = Host::parse(authority.as_bytes())
            .map_err(|why| denied(to, Some(authority), Decision::of(Reason::Malformed), why))?;
        if let Some(why) = mismatch(&host, to) {
            let decision = Decision::of(Reason::HostMismatch);
            return Err(denied(to, Some(authority), decision, why));
        }
        let name = host.name;
        let admitted = sandbox
            .admit(Facts {
                to,
                name: name.clone(),
            })
            .map_err(|decision| denied(to, name.as_ref().map(DomainName::as_str), decision, "by HTTP/2"))?;
        let channel = Channel::ClearHttp2;
        Ok(self.opened(owner, admitted, Target { name, to, channel }))
    }

    fn opened(self: &Arc<Self>, owner: &Owner, admitted: Admitted, target: Target) -> Opened {
        Opened {
            cut: Arc::clone(&admitted.cut),
            decision: admitted.decision.clone(),
            world: Surroundings::new(Arc::clone(self), admitted, owner.clone(), target.clone()),
            target,
        }
    }

    /// Records what the records of its requests do not tell.
    fn close(&self, entry: &Entry, opened: Opened, ended: Ended, meter: &Meter) {
        let passed = Passed {
            began: entry.began,
            lasted: entry.clock.elapsed(),
            up: meter.traffic.up(),
            down: meter.traffic.down(),
        };
        self.metrics.carried(passed.up, passed.down);
        let is_told = opened.world.has_recorded() && !matches!(ended, Ended::Cut(_) | Ended::Failed(..));
        if is_told {
            return;
        }
        let (decision, detail) = ended.settle(opened.decision);
        let attempt = Attempt {
            detail,
            ..said(&opened.target, "http")
        };
        self.audit.flow(&entry.owner, &decision, attempt, passed);
    }
}

fn denied(to: SocketAddr, authority: Option<&str>, decision: Decision, detail: &str) -> Box<Denied> {
    let host = authority.map(|authority| authority.chars().take(HOST_MAX).collect());
    let attempt = Attempt {
        protocol: "http",
        host,
        ip: Some(to.ip()),
        port: Some(to.port()),
        detail: Some(detail.to_owned()),
        ..Attempt::default()
    };
    Box::new(Denied { attempt, decision })
}
