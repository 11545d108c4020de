//! A flow by TLS whose requests are read: what [`crate::intercept`] needs of the rest of netd, and the flow's own
//! records. Decides nothing.

use std::{
    collections::BTreeSet,
    future::Future,
    pin::pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use futures_util::future::BoxFuture;
use jiff::Timestamp;
use sandgate_api::{audit::AlertKind, id::SandboxId};
use sandgate_policy::{FailureMode, Reason};
use sandgate_relay::redact::Needles;
use tokio::net::TcpStream;

use super::{
    Egress,
    dial::NotDialled,
    flow::{Ended, Entry, IDLE},
    refuse,
};
use crate::{
    audit::{Attempt, Owner, Passed},
    intercept::{
        self, Channel, End, Leave, Target, World,
        account::Exchange,
        leases::{Lease, Unavailable},
        near::{Meter, Near},
        pool::Pool,
    },
    metrics::InterceptionEnd,
    sandbox::{Admitted, CutReason, Decision, Met, OverQuota, RequestFacts, Sandbox},
};

/// The surroundings of one flow that is read.
pub(super) struct Surroundings {
    egress: Arc<Egress>,
    admitted: Admitted,
    owner: Owner,
    target: Target,
    has_recorded: AtomicBool,
    /// Once a request is about to go to the host.
    met: Mutex<Option<Met>>,
}

impl Surroundings {
    pub(super) fn new(egress: Arc<Egress>, admitted: Admitted, owner: Owner, target: Target) -> Arc<Self> {
        Arc::new(Self {
            egress,
            admitted,
            owner,
            target,
            has_recorded: AtomicBool::new(false),
            met: Mutex::new(None),
        })
    }

    /// Whether a request of the flow is in the records.
    pub(super) fn has_recorded(&self) -> bool {
        self.has_recorded.load(Ordering::Relaxed)
    }

    fn sandbox(&self) -> &Arc<Sandbox> {
        self.admitted.sandbox()
    }

    /// What `look` says of what has gone to the host.
    fn with_met<T>(&self, look: impl FnOnce(&mut Option<Met>) -> T) -> T {
        look(&mut self.met.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl World for Surroundings {
    fn sandbox_id(&self) -> &SandboxId {
        &self.sandbox().id
    }

    fn admit(&self, facts: RequestFacts) -> Result<Leave, Decision> {
        let admitted = self.admitted.admit_request(facts)?;
        Ok(Leave {
            judgement: admitted.judgement.clone(),
            bindings: Arc::clone(&admitted.bindings),
            books: Some(admitted),
        })
    }

    fn spend(&self, bytes: usize) -> Result<Option<Decision>, OverQuota> {
        self.with_met(|met| {
            let met = match met {
                Some(met) => met,
                None => {
                    let sandbox = self.sandbox();
                    let host = sandbox.host(self.target.name.as_ref(), self.target.to.ip());
                    met.insert(sandbox.meet(host)?)
                }
            };
            if !met.upload().take(bytes) {
                return Err(met.over());
            }
            Ok(met.noted.clone())
        })
    }

    fn use_secrets(&self, secrets: &BTreeSet<&str>) -> Result<Option<Decision>, OverQuota> {
        self.sandbox().use_secrets(secrets.iter().copied())
    }

    fn fails_open(&self) -> bool {
        self.sandbox().failure_mode() == FailureMode::FailOpen
    }

    fn has_room(&self) -> bool {
        self.egress.audit.has_room(&self.owner)
    }

    fn record(&self, decision: &Decision, exchange: Exchange) -> Option<String> {
        let attempt = Attempt {
            method: Some(exchange.method),
            path: exchange.path,
            credential: exchange.credential,
            detail: exchange.detail,
            alert: exchange.is_echoed.then_some(AlertKind::SecretEchoed),
            ..said(
                &self.target,
                match self.target.channel {
                    Channel::Tls => "https",
                    Channel::Clear | Channel::ClearHttp2 => "http",
                },
            )
        };
        self.has_recorded.store(true, Ordering::Relaxed);
        if !decision.is_allowed() && !self.has_room() {
            // Refused whether it can be recorded or not: counted, without a record of its own.
            self.egress.audit.deny(&self.owner, decision, attempt, 1);
            return None;
        }
        let passed = Passed {
            began: exchange.began,
            lasted: exchange.lasted,
            up: exchange.up,
            down: exchange.down,
        };
        let is_plain = decision.reason == Reason::Allowed;
        let beyond = self.with_met(|met| met.as_ref().filter(|_| is_plain).and_then(Met::beyond));
        let decision = beyond.as_ref().unwrap_or(decision);
        Some(self.egress.audit.flow(&self.owner, decision, attempt, passed))
    }

    fn lease<'a>(&'a self, secret: &'a str, version: u64) -> BoxFuture<'a, Result<Lease, Unavailable>> {
        let sandbox = self.sandbox();
        Box::pin(
            sandbox
                .leases
                .value(&*self.egress.broker, &sandbox.id, secret, version),
        )
    }

    fn needles(&self) -> Arc<Needles> {
        self.sandbox().leases.needles()
    }

    fn pool(&self) -> Arc<Pool> {
        Arc::clone(&self.sandbox().upstreams)
    }

    fn dial(&self) -> BoxFuture<'_, Result<TcpStream, NotDialled>> {
        Box::pin(self.egress.dialer.dial(&self.admitted, self.target.to))
    }
}

pub(super) fn said(target: &Target, protocol: &'static str) -> Attempt {
    Attempt {
        protocol,
        host: Some(match &target.name {
            Some(name) => name.as_str().to_owned(),
            None => target.to.ip().to_string(),
        }),
        ip: Some(target.to.ip()),
        port: Some(target.to.port()),
        ..Attempt::default()
    }
}

impl Egress {
    /// Takes an admitted flow that must be read to its end, and records it.
    pub(super) async fn intercept(
        self: &Arc<Self>,
        entry: Entry,
        admitted: Admitted,
        target: Target,
        (near, received): (TcpStream, Vec<u8>),
        mut detail: Option<String>,
    ) {
        let sandbox = Arc::clone(admitted.sandbox());
        let Ok(_slot) = Arc::clone(&sandbox.limits.intercepted).try_acquire_owned() else {
            refuse(&near);
            self.metrics.intercepted(InterceptionEnd::Limited);
            let attempt = Attempt {
                detail: Some("too many connections at once whose requests are read".to_owned()),
                ..said(&target, "tls")
            };
            self.audit
                .deny(&entry.owner, &Decision::of(Reason::Quota), attempt, 1);
            return;
        };
        let decision = admitted.decision.clone();
        let cut = Arc::clone(&admitted.cut);
        let opened = Attempt {
            detail: Some("opened; its requests are read".to_owned()),
            ..said(&target, "tls")
        };
        self.audit
            .begun(&entry.owner, &decision, opened, Passed::nothing(entry.began));
        let meter = Arc::new(Meter::default());
        let world = Surroundings::new(Arc::clone(self), admitted, entry.owner.clone(), target.clone());
        let near = Near::new(near, received, Arc::clone(&meter));
        let work = Box::pin(self.read_requests(&sandbox, world, near, &target, &meter));
        let ended = self.until_cut(work, cut.cut(), &meter).await;
        self.metrics.intercepted(match ended {
            Ended::Well => InterceptionEnd::Closed,
            Ended::Stopped(_) => InterceptionEnd::Stopped,
            Ended::Client(_) => InterceptionEnd::Client,
            Ended::Cut(_) => InterceptionEnd::Cut,
            Ended::Failed(..) | Ended::Over(_) => InterceptionEnd::Failed,
        });
        let (decision, ended) = ended.settle(decision);
        detail = ended.or(detail);
        let attempt = Attempt {
            detail,
            ..said(&target, "tls")
        };
        let passed = Passed {
            began: entry.began,
            lasted: entry.clock.elapsed(),
            up: meter.traffic.up(),
            down: meter.traffic.down(),
        };
        self.metrics.carried(passed.up, passed.down);
        self.audit.flow(&entry.owner, &decision, attempt, passed);
    }

    async fn read_requests(
        &self,
        sandbox: &Arc<Sandbox>,
        world: Arc<Surroundings>,
        near: Near,
        target: &Target,
        meter: &Meter,
    ) -> Ended {
        let generation = sandbox.generation();
        let leased = sandbox.leases.authority(&*self.broker, &sandbox.id, generation);
        let server = match (leased.await, &target.name) {
            (Ok(authority), Some(name)) => authority.server(name).map_err(|error| error.to_string()),
            (Ok(_), None) => Err("a certificate needs a name".to_owned()),
            (Err(error), _) => Err(error.to_string()),
        };
        let server = match server {
            Ok(server) => server,
            Err(error) => return Ended::Failed(Reason::CredentialUnavailable, error),
        };
        let serving = intercept::serve(
            near,
            server,
            target.clone(),
            world,
            Arc::clone(&self.upstream),
            self.tasks.clone(),
        );
        ended(intercept::serve_until_idle(serving, meter, IDLE).await)
    }

    /// Takes the work of a flow to its end, which new rules or netd's own end may bring. The connection is reset unless
    /// it ended well.
    pub(super) async fn until_cut(
        &self,
        work: impl Future<Output = Ended>,
        cut: impl Future<Output = CutReason>,
        meter: &Meter,
    ) -> Ended {
        let end = self.tasks.shutdown();
        let work = pin!(work);
        let ended = tokio::select! {
            ended = work => ended,
            reason = cut => match reason {
                CutReason::Forbidden(decision) => Ended::Cut(decision),
                CutReason::SandboxGone => Ended::Stopped("the sandbox ended"),
            },
            () = end.cancelled() => Ended::Stopped("netd ended"),
        };
        // The work still has the connection: it is dropped behind this.
        if !matches!(ended, Ended::Well) {
            meter.reset();
        }
        ended
    }
}

/// How a flow that was read ended; nothing: by silence.
pub(super) fn ended(end: Option<End>) -> Ended {
    match end {
        None => Ended::Stopped("nothing moved for too long"),
        Some(End::Closed) => Ended::Well,
        Some(End::Client(how)) => Ended::Client(how),
        Some(End::AnotherName) => Ended::Failed(
            Reason::HostMismatch,
            "the handshake names another server than its first message".to_owned(),
        ),
    }
}

impl Passed {
    /// Nothing yet.
    fn nothing(began: Timestamp) -> Self {
        Self {
            began,
            lasted: std::time::Duration::ZERO,
            up: 0,
            down: 0,
        }
    }
}
